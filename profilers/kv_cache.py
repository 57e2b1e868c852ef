"""Key/value caches of dense models: one that grows in place, and one of fixed length for CUDA graphs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from methods.formats.numerics import DTYPES
from methods.kv import cache as packed
from methods.kv.calibrate import Calibration
from methods.kv.format import CacheFormat

if TYPE_CHECKING:
    from transformers import DynamicCache

_SPARE = 256
"""Tokens of room that a layer takes beyond what it needs."""


def new_cache(model: Any, fmt: CacheFormat | None = None, calibration: Calibration | None = None) -> DynamicCache:
    """The cache that a model's configuration asks for; pass it as `past_key_values`, also to `generate`.

    Without a format, and in that of the model's own dtype, full-attention layers grow in place and layers with a sliding window stay as
    transformers makes them. In another format every layer is packed (`methods.kv.cache.new_cache`).
    """
    from transformers.cache_utils import DynamicLayer

    if fmt is not None and (fmt.kind != "dense" or DTYPES[fmt.dense] != model.get_input_embeddings().weight.dtype):
        return packed.new_cache(model, fmt, calibration)  # type: ignore[no-any-return]
    growing = _growing_layer()
    cache = packed.with_layers(model, lambda index, made: growing() if type(made) is DynamicLayer else made)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = growing
    return cache  # type: ignore[no-any-return]


def fixed_cache(model: Any, length: int) -> tuple[Any, Tensor]:
    """A cache for `length` tokens whose memory never moves, and how many of them it holds: an int64 on the model's device.

    The caller fills that in after every forward pass; the pass writes behind it. Layers with a sliding window keep everything too, and
    their mask is what forgets. Raises ValueError where a layer keeps something else than keys and values.
    """
    place = torch.zeros((), dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    packed.attention_windows(model)  # raises
    fixed = _fixed_layer()
    return packed.with_layers(model, lambda index, made: fixed(length, place)), place


@functools.cache
def _fixed_layer() -> type[Any]:
    from transformers.cache_utils import StaticLayer

    class FixedLayer(StaticLayer):  # type: ignore[no-untyped-call]
        """transformers' static layer, but all layers share one length: theirs would have to be put back one by one after a step."""

        def __init__(self, length: int, place: Tensor) -> None:
            super().__init__(length)
            self.cumulative_length = place

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """All of the memory, with the new tokens (batch, heads, tokens, dim) behind those it holds: masks hide the rest."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            n_new = key_states.shape[2]
            at = self.cumulative_length + torch.arange(n_new, device=key_states.device) if n_new > 1 else self.cumulative_length
            keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
            return keys.index_copy_(2, at.view(-1), key_states), values.index_copy_(2, at.view(-1), value_states)

    return FixedLayer


@functools.cache
def _growing_layer() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
        """`keys` and `values` are views of buffers with room behind them; whoever replaces them (beam search) is noticed."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """The cache with the new tokens (batch, heads, tokens, dim) behind it."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.keys = extended(self, "keys", key_states)
            self.values = extended(self, "values", value_states)
            return self.keys, self.values

    return GrowingLayer


def extended(layer: Any, which: str, new: Tensor) -> Tensor:
    """`new` (batch, heads, tokens, dim) behind `layer.keys` or `layer.values`, in a buffer of the layer's that has room for it."""
    now: Tensor = getattr(layer, which)
    state = vars(layer)
    length = now.shape[2] + new.shape[2]
    buffer: Tensor | None = state.get(f"_{which}_buffer")
    if buffer is None or buffer.shape[2] < length or now.data_ptr() != buffer.data_ptr() or now.shape[0] != buffer.shape[0]:
        batch, heads, _, dim = new.shape
        buffer = new.new_empty((batch, heads, length + max(_SPARE, length // 2), dim))
        buffer[:, :, : now.shape[2]] = now
        state[f"_{which}_buffer"] = buffer
    buffer[:, :, now.shape[2] : length] = new
    return buffer[:, :, :length]
