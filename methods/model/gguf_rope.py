"""Rotary embeddings as a GGUF describes them: a base, and divisors of the frequencies as a tensor or a rule; and transformers' words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.model.gguf_header import ROTARY_TENSORS, Header, Keys, UnreadableGGUF

EXACT = 1e-6
"""Relative error up to which a rule stands for divisors that a file stores in fp32."""

AS_BUILT = 1e-5
"""Relative error that a model's frequencies, which transformers computes in fp32, may have."""

SPELLINGS: Mapping[str, tuple[str, ...]] = {"phi3": ("default", "longrope")}
"""The rules that a model type takes, where those are not all of them."""

PARTIAL = frozenset({"phi3", "stablelm", "nemotron"})
"""Model types that rotate only the first channels of a head where they are told to."""


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: frequency i of d / 2 is base ** (-2 i / d) / divisors[i], cosines and sines times `scale`.

    rotated: d, the channels of a head that turn; divisors, long: (d / 2,) fp64 for texts up to `original` tokens and beyond.
    rule: transformers' `rope_type` with its parameters, where the file names one or one was recognised; None otherwise.
    """

    base: float
    rotated: int
    divisors: Tensor
    long: Tensor
    scale: float = 1.0
    original: int = 0
    rule: Mapping[str, Any] | None = None

    def frequencies(self) -> Tensor:
        """Radians a token (d / 2,) fp64, for short texts."""
        return plain_frequencies(self.base, self.rotated) / self.divisors


def plain_frequencies(base: float, rotated: int) -> Tensor:
    """Radians a token (rotated / 2,) fp64 without any scaling (RoFormer, section 3.2.2)."""
    return base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


def plain_rope(base: float, rotated: int) -> Rope:
    """A rotary embedding without any scaling."""
    ones = torch.ones(rotated // 2, dtype=torch.float64)
    return Rope(base, rotated, ones, ones, rule={"rope_type": "default"})


def read_rope(keys: Keys, head_dim: int) -> Rope:
    """The rotary embedding of a file; raises UnreadableGGUF naming what cannot be honoured."""
    rotated = int(keys.number("rope.dimension_count", head_dim, 2))
    plain = plain_rope(float(keys.number("rope.freq_base", 10_000.0, 1.01)), rotated)
    context = int(keys.number("context_length", 1, 1))
    original = int(keys.number("rope.scaling.original_context_length", 0)) or context
    kind, factor = _scaling(keys)
    single, *pair = (keys.header.divisors.get(name) for name in ROTARY_TENSORS)
    for divisors in (single, *pair):
        _check_length(keys.header, divisors, rotated)
    if single is not None and (kind is not None or pair != [None, None]):
        raise UnreadableGGUF(
            f"{keys.header.path}: rope_freqs.weight stands beside another rotary scaling; only one can be meant"
        )
    scale = float(keys.number("rope.scaling.attn_factor", 1.0))
    if kind == "longrope":
        long, short = pair
        if long is None or short is None:
            raise UnreadableGGUF(
                f"{keys.header.path}: long rotary factors need rope_factors_long.weight and rope_factors_short.weight"
            )
        return Rope(plain.base, rotated, short, long, scale, original)
    if kind == "yarn":
        return _yarn(keys, plain, factor, original, scale)
    divisors = factor * (plain.divisors if single is None else single)
    rule = recognised(divisors, plain.base) if scale == 1.0 else None
    return Rope(plain.base, rotated, divisors, divisors, scale, context, rule)


def _scaling(keys: Keys) -> tuple[str | None, float]:
    """The kind of scaling, None for none and for the linear one, and the factor of the latter two."""
    kind = keys.take("rope.scaling.type")
    older = keys.number("rope.scale_linear", 0.0)
    factor = float(keys.number("rope.scaling.factor", 0.0) or older or 1.0)
    keys.take("rope.scaling.finetuned")
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise keys.refusal("rope.scaling.type", "is no scaling that is known; none, linear, yarn and longrope are")
    long = any(name in keys.header.divisors for name in ROTARY_TENSORS[1:])
    if (long and kind in ("linear", "yarn")) or ((long or kind == "longrope") and factor != 1.0):
        raise keys.refusal("rope.scaling.factor", "stands beside long rotary factors; only one of them can be meant")
    if kind == "none":
        return ("longrope" if long else None), 1.0
    return ("longrope" if long else None if kind == "linear" else kind), factor


def _yarn(keys: Keys, plain: Rope, factor: float, original: int, scale: float) -> Rope:
    fast = float(keys.number("rope.scaling.yarn_beta_fast", 32.0, 1e-3))
    slow = float(keys.number("rope.scaling.yarn_beta_slow", 1.0, 1e-3))
    for key, neutral in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if keys.take(f"rope.scaling.{key}", neutral) != neutral:
            raise keys.refusal(f"rope.scaling.{key}", f"is not computed here, only {neutral} is")
    return yarn_rope(plain, factor, original, fast, slow, scale)


def yarn_rope(plain: Rope, factor: float, original: int, fast: float, slow: float, scale: float) -> Rope:
    """YaRN (2023), sections 3.2 and 3.4: high frequencies stay, low ones are divided, with a linear ramp between; cosines grow.

    plain: the embedding that is scaled, for texts of `original` tokens; fast, slow: rotations in such a text between which the ramp lies;
    scale: what cosines and sines are multiplied by beside YaRN's own 1 + 0.1 ln(factor).
    """
    d = plain.rotated

    def channel(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(plain.base))

    low, high = max(math.floor(channel(fast)), 0), min(math.ceil(channel(slow)), d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    divisors = 1 / (ramp / factor + 1 - ramp)
    rule = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    scale *= 1 + 0.1 * math.log(max(factor, 1.0))
    rule |= {"beta_fast": fast, "beta_slow": slow, "attention_factor": scale}
    return Rope(plain.base, d, divisors, divisors, scale, original, rule)


def _check_length(header: Header, divisors: Tensor | None, rotated: int) -> None:
    if divisors is not None and (divisors.shape != (rotated // 2,) or not bool((divisors > 0).all())):
        raise UnreadableGGUF(
            f"{header.path}: rotary factors of shape {tuple(divisors.shape)}, where {rotated // 2} positive numbers are expected"
        )


def recognised(divisors: Tensor, base: float) -> dict[str, Any] | None:
    """The rule that gives these divisors (d / 2,) up to `EXACT`: `default`, `linear` or `llama3`; None where none does."""
    first = float(divisors[0])
    if torch.allclose(divisors, divisors[:1], rtol=EXACT, atol=0):
        return {"rope_type": "default"} if abs(first - 1) <= EXACT else {"rope_type": "linear", "factor": _round(first)}
    return _llama3(divisors, plain_frequencies(base, 2 * len(divisors)))


def _llama3(divisors: Tensor, frequencies: Tensor) -> dict[str, Any] | None:
    """Llama 3.1's rule, solved for its parameters; None where the divisors follow another.

    With x = frequency / 2 pi and s = clamp((original x - low) / (high - low), 0, 1), 1 / divisor = (1 - s) / factor + s. Only three of the
    four parameters matter, so `low` is 1.
    """
    factor = _round(float(divisors.max()))
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    inner = (share > 1e-4) & (share < 1 - 1e-4)
    x = frequencies / (2 * math.pi)
    if not inner.any():
        return None
    # One point leaves a parameter open; the published ratio of high to low, 4, is tried then.
    if inner.sum() == 1:
        slope, offset = float((share[inner] + 1 / 3) / x[inner]), 1 / 3
    else:
        design = torch.stack([x[inner], -torch.ones_like(x[inner])], 1)
        slope, offset = torch.linalg.lstsq(design, share[inner, None]).solution.flatten().tolist()
    if slope <= 0 or offset <= 0:
        return None
    high, original = _round(1 + 1 / offset), round(slope / offset)
    rule = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
    s = ((original * x - 1) / (high - 1)).clamp(0, 1)
    exact = torch.allclose(1 / ((1 - s) / factor + s), divisors, rtol=EXACT, atol=0)
    return rule | {"original_max_position_embeddings": original} if exact else None


def _round(value: float) -> float:
    """The value, or the multiple of 1/4 that it is but for the error of fp32."""
    near = round(4 * value) / 4
    return near if abs(value - near) <= 1e-4 * abs(near) else value


def rope_parameters(rope: Rope, model_type: str, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`: the rule, or the divisors one by one (`longrope`) where there is none that the model type takes."""
    parameters: dict[str, Any] = {"rope_theta": rope.base}
    if model_type in PARTIAL:
        parameters["partial_rotary_factor"] = rope.rotated / head_dim
    taken = SPELLINGS.get(model_type)
    if rope.rule is not None and (taken is None or rope.rule["rope_type"] in taken):
        return parameters | dict(rope.rule)
    return parameters | {
        "rope_type": "longrope",
        "short_factor": rope.divisors.tolist(),
        "long_factor": rope.long.tolist(),
        "attention_factor": rope.scale,
        "original_max_position_embeddings": rope.original,
    }


def check_rope(header: Header, model: Any, ropes: Mapping[str, Rope]) -> None:
    """Raises UnreadableGGUF where the model's rotary embeddings are not the file's; ropes: by the name of transformers' buffer."""
    found = {
        name.rpartition(".")[2]: (module, buffer)
        for module_name, module in model.named_modules()
        for name, buffer in module.named_buffers(module_name, recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    }
    for name, rope in ropes.items():
        if name not in found:
            raise UnreadableGGUF(
                f"{header.path}: {type(model).__name__} has no rotary embedding {name} to compare with the file"
            )
        module, buffer = found[name]
        expected = rope.frequencies()
        scale = getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0)
        same = buffer.shape == expected.shape and torch.allclose(buffer.double(), expected, rtol=AS_BUILT, atol=0)
        if not same or abs(scale - rope.scale) > AS_BUILT:
            raise UnreadableGGUF(
                f"{header.path}: the rotary embedding of {type(model).__name__} is not the file's ({rope.rule or 'divisors in a tensor'}); "
                "give the model's folder with safetensors"
            )
