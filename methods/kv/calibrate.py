"""What calibrated cache formats know beforehand about a model's keys and values: ranges, shifts and codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.kmeans import kmeans
from methods.kv.codebook import Codebook, inner_range
from methods.kv.codecs import FP8_MAX
from methods.kv.format import OUTLIERS, CacheFormat, n_outliers
from methods.kv.rotary import Rotary, rotaries

SAMPLES = 2**17
"""Elements of a layer that its codebook is fitted to, spread evenly."""


@dataclass(frozen=True)
class Calibration:
    """format: whose; layers: named constants of each layer, all fp32; rotaries: each layer's rotation, which keys are stored without."""

    format: str
    layers: tuple[Mapping[str, Tensor], ...]
    rotaries: tuple[Rotary | None, ...]


@dataclass(frozen=True)
class _Sample:
    """One layer's keys and values (h, n, d) fp32 over all tokens, and the loss's squared gradients in them."""

    keys: Tensor
    values: Tensor
    key_weight: Tensor
    value_weight: Tensor


def calibrate(model: Any, fmt: CacheFormat, tokens: Tensor) -> Calibration:
    """The constants of a calibrated format; tokens: (n_sequences, length) ids, read one sequence at a time, all kept in memory at once.

    Codebooks are weighted by the squared gradient of the next-token loss in each key and value (the diagonal of the Fisher
    information), which takes a backward pass and the memory of its graph. Raises ValueError for a format that needs no calibration.
    """
    if not fmt.calibrated:
        raise ValueError(f"{fmt.name} needs no calibration; give none")
    calls = [_record(model, row[None], fisher=fmt.kind == "kvquant") for row in tokens]
    n_layers = len(calls[0])
    turned = rotaries(model, n_layers) if fmt.kind == "kvquant" else (None,) * n_layers
    layers = []
    for index, rotary in enumerate(turned):
        sample = _sample([call[index] for call in calls], rotary)
        layers.append(_constants(fmt, sample))
    return Calibration(fmt.name, tuple(layers), turned)


def _constants(fmt: CacheFormat, sample: _Sample) -> dict[str, Tensor]:
    if fmt.kind == "kvquant":
        return {**_channel_constants(sample, fmt.key_bits), **_token_constants(sample, fmt.value_bits)}
    found = {}
    for side, x in (("key", sample.keys), ("value", sample.values)):
        if fmt.smooth:
            found.update({f"{side}.{name}": value for name, value in _smoothing(x).items()})
        else:
            top = x.abs().amax((1, 2), keepdim=True)
            found[f"{side}.scale"] = (top if fmt.scale == "head" else top.amax().expand_as(top)).clamp_min(1e-8) / FP8_MAX
    return found


def _smoothing(x: Tensor) -> dict[str, Tensor]:
    """Each channel's middle, and the square root of its half range, which shares the spread between it and the token's scale.

    x: (h, n, d). The static half of WKVQuant's two-dimensional rounding (Yue 2024, section 3.3), which the paper learns from here on.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return {"shift": (high + low) / 2, "scale": ((high - low) / 2).clamp_min(1e-8).sqrt()}


def _channel_constants(sample: _Sample, bits: int) -> dict[str, Tensor]:
    """KVQuant (Hooper 2024), section 3.4: each channel's range without its outliers, half of them at either end."""
    ordered = sample.keys.sort(1).values
    cut = round(OUTLIERS / 2 * (ordered.shape[1] - 1))
    low, high = ordered[:, cut : cut + 1], ordered[:, ordered.shape[1] - 1 - cut :][:, :1]
    half = ((high - low) / 2).clamp_min(1e-8)
    z = (sample.keys - (high + low) / 2) / half
    # An error of the codebook is one of the key times half the channel's range.
    book = fit_codebook(*_thinned(z, sample.key_weight * half * half), bits)
    return {"key.low": low, "key.high": high, "key.levels": book.levels, "key.decoded": book.decoded}


def _token_constants(sample: _Sample, bits: int) -> dict[str, Tensor]:
    rows, weight = (x.transpose(0, 1).flatten(1) for x in (sample.values, sample.value_weight))
    index = (rows - rows.mean(-1, keepdim=True)).abs().topk(n_outliers(rows.shape[-1]), -1).indices
    low, high = inner_range(rows, index)[..., None].unbind(-2)
    half = ((high - low) / 2).clamp_min(1e-8)
    book = fit_codebook(*_thinned((rows - (high + low) / 2) / half, weight * half * half), bits)
    return {"value.levels": book.levels, "value.decoded": book.decoded}


def _thinned(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What lies in the range [-1, 1], thinned out."""
    inside = z.abs() <= 1
    z, weight = z[inside], weight[inside]
    step = -(-z.numel() // SAMPLES)
    return z[::step], weight[::step]


def fit_codebook(z: Tensor, weight: Tensor, bits: int, steps: int = 100) -> Codebook:
    """Weighted k-means: z, weight (n,) -> levels (2**bits,) in ascending order.

    At 2 bits what codes are read as is moved and stretched so that mean and spread of z survive (KVQuant, section 3.6, Q-Norm).
    """
    levels = kmeans(z[None], weight[None], 2**bits, steps)[0]
    decoded = _normed(levels, z.double()) if bits == 2 else levels
    return Codebook(levels.float(), decoded.float())


def _normed(levels: Tensor, z: Tensor) -> Tensor:
    read = levels[torch.bucketize(z, (levels[1:] + levels[:-1]) / 2)]
    return (levels - read.mean()) * (z.std() / read.std().clamp_min(1e-12)) + z.mean()


def _record(model: Any, ids: Tensor, *, fisher: bool) -> list[tuple[Tensor, ...]]:
    """Keys, values and their gradients (1, h, t, d) of every layer for ids (1, t)."""
    from transformers import DynamicCache

    seen: list[tuple[Tensor, Tensor]] = []

    class Recorder(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            pair = [x if x.requires_grad or not fisher else x.detach().requires_grad_() for x in (key_states, value_states)]
            for x in pair if fisher else ():
                x.retain_grad()
            seen.append((pair[0], pair[1]))
            return super().update(pair[0], pair[1], layer_idx, *args, **kwargs)

    with torch.inference_mode(False), torch.set_grad_enabled(fisher):
        ids = ids.clone()
        logits = model(input_ids=ids, past_key_values=Recorder(config=model.config), use_cache=True).logits
        if fisher:
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            torch.autograd.backward(loss)
    return [tuple(t.detach() for x in pair for t in (x, torch.zeros_like(x) if x.grad is None else x.grad)) for pair in seen]


def _sample(calls: list[tuple[Tensor, ...]], rotary: Rotary | None) -> _Sample:
    """All calls of one layer, keys (and their gradients, the rotation being orthogonal up to its scale) before the rotary embedding."""

    def rows(place: int, keys: bool) -> Tensor:
        found = [call[place].float() for call in calls]
        return torch.cat([rotary.undo(x, 0) if rotary and keys else x for x in found], 2)[0]

    keys, key_grad, values, value_grad = rows(0, True), rows(1, True), rows(2, False), rows(3, False)
    return _Sample(keys, values, key_grad.square(), value_grad.square())
