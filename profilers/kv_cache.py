"""A key/value cache that grows in place: transformers' own copies all of it for every token."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

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
            self.keys = _extended(self, "keys", key_states)
            self.values = _extended(self, "values", value_states)
            return self.keys, self.values

    return GrowingLayer


def _extended(layer: Any, which: str, new: Tensor) -> Tensor:
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
