"""transformers' cache layers over packed stores. Imports transformers when a layer is first asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from methods.kv.store import Store


def packed_layer(keys: Store, values: Store, sliding_window: int | None = None) -> Any:
    """An empty layer for `transformers.Cache.layers`; sliding_window: of the layer's attention, whose past is dropped behind it."""
    full, sliding = _classes()
    return full(keys, values) if sliding_window is None else sliding(keys, values, sliding_window)


class _Packed:
    """`packed_keys` and `packed_values` hold everything; `keys` and `values` stay None, since nothing is kept decoded.

    Stands before a class of transformers, which answers what is not answered here (sizes of masks, for example).
    """

    dtype: torch.dtype
    device: torch.device

    def __init__(self, keys: Store, values: Store, **options: Any) -> None:
        super().__init__(**options)
        self.is_initialized = False
        self._empty = keys, values
        self.packed_keys, self.packed_values = self._empty
        # A rollback leaves no trace only where nothing is rounded later than it comes in, or in groups.
        self.is_croppable = all(store.window == 0 and store.block == 1 for store in self._empty)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes dtype and device; there is nothing to allocate."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The past as it is stored with the new tokens (b, h, t, d) in full precision behind it; these are stored afterwards."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = behind(self.packed_keys, key_states), behind(self.packed_values, value_states)
        self.packed_keys = self.packed_keys.append(key_states)
        self.packed_values = self.packed_values.append(value_states)
        return seen

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.packed_keys.length

    def reset(self) -> None:
        """Drops everything."""
        self.is_initialized = False
        self.packed_keys, self.packed_values = self._empty

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens, their number given as a negative one; raises ValueError where a group would be divided."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: {tokens_to_remove} is positive; give the negative of how many tokens to remove")
        cut = self.packed_keys.cut(-tokens_to_remove), self.packed_values.cut(-tokens_to_remove)
        self.packed_keys, self.packed_values = cut

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Not supported: raises ValueError."""
        raise ValueError("packed caches are not offloaded; make the cache without offloading")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.packed_keys, self.packed_values = self.packed_keys.each(change), self.packed_values.each(change)


class _PackedSliding(_Packed):
    """Drops what the attention window has left behind; returns and reports what transformers' sliding layer does."""

    sliding_window: int
    _sliding_window_tensor: Tensor

    def __init__(self, keys: Store, values: Store, sliding_window: int) -> None:
        super().__init__(keys, values, sliding_window=sliding_window)
        self.is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Also moves the window's size, which transformers hands out with the cache, to the device."""
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """At most window - 1 past tokens, and the new ones behind them."""
        seen = min(self.get_seq_length(), self.sliding_window - 1) + key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        self.cumulative_length = self.get_seq_length()
        left = max(0, self.cumulative_length - self.sliding_window + 1)
        self.packed_keys, self.packed_values = self.packed_keys.dropped(left), self.packed_values.dropped(left)
        return keys[:, :, -seen:], values[:, :, -seen:]

    def reset(self) -> None:
        """Drops everything."""
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens while nothing has left the attention window; raises ValueError afterwards."""
        if tokens_to_remove and self.get_seq_length() >= self.sliding_window:
            raise ValueError("crop: tokens before the sliding window are gone; crop before the window is full")
        super().crop(tokens_to_remove)
        self.cumulative_length = self.get_seq_length()

    def activate_past_recording(self) -> None:
        """Not supported: raises ValueError."""
        raise ValueError("packed sliding caches record no past; use a dense cache for assisted decoding")


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    full = type("PackedLayer", (_Packed, DynamicLayer), {})
    return full, type("PackedSlidingLayer", (_PackedSliding, DynamicSlidingWindowLayer), {})


def behind(store: Store, new: Tensor) -> Tensor:
    """New tokens (b, h, t, d) behind all that a store holds, as attention sees them."""
    past = store.read()
    return new if past is None else torch.cat((past, new), 2)
