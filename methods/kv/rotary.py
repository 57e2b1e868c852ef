"""Rotary position embeddings of stored keys: undone before rounding, applied again on reading.

Keys are rotated by their index in the cache. Where a sequence is padded on the left its true positions are smaller by a constant, so
that undoing leaves a constant rotation: still inverted exactly, but not the keys that were calibrated. Pad no batch that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.model.trace import probe_tokens

Tables = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Position ids (1, t) -> cos and sin (1, t, rotated channels)."""

GROWS = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on how long the text has become."""


@dataclass(frozen=True)
class Rotary:
    """The rotation of one layer's keys: the first channels of a head turn, channel i with channel i + half of them."""

    tables: Tables

    def apply(self, keys: Tensor, start: int) -> Tensor:
        """Keys (b, h, t, d) without positions -> fp32 keys at positions start, start + 1, …"""
        turned, rest, cos, sin = self._parts(keys, start)
        return torch.cat((turned * cos + _half_turn(turned) * sin, rest), -1)

    def undo(self, keys: Tensor, start: int) -> Tensor:
        """Inverse of `apply`, also where the embedding scales its rotation."""
        turned, rest, cos, sin = self._parts(keys, start)
        return torch.cat(((turned * cos - _half_turn(turned) * sin) / (cos * cos + sin * sin), rest), -1)

    def _parts(self, keys: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions = torch.arange(start, start + keys.shape[2], device=keys.device)[None]
        cos, sin = (table.float()[:, None] for table in self.tables(positions))
        turned, rest = keys[..., : cos.shape[-1]].float(), keys[..., cos.shape[-1] :].float()
        return turned, rest, cos, sin


class NoInverse(ValueError):
    """The rotation of a model's keys is not understood, so they cannot be stored without it."""


@torch.no_grad()
def rotaries(model: Any, n_layers: int) -> tuple[Rotary | None, ...]:
    """Each layer's rotation; None for layers without a rotary embedding, whose keys carry no position.

    Found by watching the model run and proved on it: keys at shifted positions must be the same once the rotation is undone.
    Raises NoInverse otherwise, and for embeddings whose angles change as the text grows.
    """
    ids = probe_tokens(model.config.get_text_config().vocab_size).to(next(iter(model.parameters())).device)
    tables = _watch(model, ids)
    found = tuple(Rotary(tables[index]) if index in tables else None for index in range(n_layers))
    _prove(model, ids, found)
    return found


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]
"""A module, what it was called with and what it returned."""


def _watch(model: Any, ids: Tensor) -> dict[int, Tables]:
    """Each layer's tables, by index; layers without a rotary embedding are absent."""
    calls: list[Call] = []
    given: dict[int, Tensor] = {}
    handles = []

    def rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append((module, args, kwargs, out))

    def attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_embeddings") is not None:
            given[module.layer_idx] = kwargs["position_embeddings"][0]

    try:
        for module in model.modules():
            if _is_rotary(module):
                handles.append(module.register_forward_hook(rotary, with_kwargs=True))
            elif hasattr(module, "layer_idx"):
                handles.append(module.register_forward_pre_hook(attention, with_kwargs=True))
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tables = {index: _tables(call) for index, cos in given.items() for call in calls if call[3][0] is cos}
    if calls and not tables:
        raise NoInverse(f"{type(model).__name__}: its rotary embedding reaches attention in an unknown way; use int or kivi")
    return tables


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _tables(call: Call) -> Tables:
    """The module's own tables for other positions: the call that was watched, with its position ids exchanged."""
    module, args, kwargs, _ = call
    kinds = getattr(module, "rope_type", "default")
    growing = set(kinds.values() if isinstance(kinds, Mapping) else [kinds]) & set(GROWS)
    if growing:
        raise NoInverse(f"rotary embedding of kind {sorted(growing)[0]}: its angles change as the text grows; use int or kivi")

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.float().to(positions.device) if value.is_floating_point() else positions

        cos, sin = module(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})
        return cos, sin

    return tables


def _prove(model: Any, ids: Tensor, found: Sequence[Rotary | None]) -> None:
    if not any(found):
        return
    shift = 5
    here, there = (_keys(model, ids, first) for first in (0, shift))
    for index, rotary in enumerate(found):
        if rotary is None:
            continue
        plain, moved = rotary.undo(here[index], 0), rotary.undo(there[index], shift)
        error = (plain - moved).abs().max() / plain.abs().max()
        if not error < (1e-3 if here[index].dtype is torch.float32 else 5e-2):
            raise NoInverse(
                f"{type(model).__name__}, layer {index}: undoing the rotary embedding leaves a relative error of {float(error):.2g}; "
                "it pairs channels in another way, use int or kivi"
            )


def _keys(model: Any, ids: Tensor, first: int) -> list[Tensor]:
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
