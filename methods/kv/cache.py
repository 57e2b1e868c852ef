"""`new_cache`: a cache in a format, for a model's forward pass and for `generate`. Imports transformers when called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from methods.formats.numerics import DTYPES
from methods.kv.calibrate import Calibration
from methods.kv.codebook import ChannelCodebook, Codebook, TokenCodebook, Turbo
from methods.kv.codecs import BeforeRotary, Cast, Codec, Float8, Integer, IntegerByChannel, Rotated, Smoothed
from methods.kv.format import CacheFormat
from methods.kv.layers import packed_layer
from methods.kv.rotary import Rotary
from methods.kv.store import Store


def new_cache(model: Any, fmt: CacheFormat, calibration: Calibration | None = None) -> Any:
    """An empty cache of a model; pass it as `past_key_values`, also to `generate`, and use it for one text or batch.

    calibration: of this model and format (`methods.kv.calibrate.calibrate`), for formats that are `calibrated`. Raises ValueError
    where it is missing or superfluous, and where a layer of the model keeps something else than keys and values.
    """
    if fmt.calibrated != (calibration is not None):
        need = "needs a calibration; make one with methods.kv.calibrate.calibrate" if fmt.calibrated else "uses no calibration"
        raise ValueError(f"{fmt.name}: the format {need}")
    if calibration is not None and calibration.format != fmt.name:
        raise ValueError(f"{fmt.name}: the calibration is of {calibration.format}; make one of the format")

    def layer(index: int, made: Any) -> Any:
        fixed = calibration.layers[index] if calibration else {}
        rotary = calibration.rotaries[index] if calibration else None
        return packed_layer(*stores(fmt, fixed, rotary), _window(index, made))

    return with_layers(model, layer)


def stores(fmt: CacheFormat, fixed: Mapping[str, Tensor], rotary: Rotary | None = None) -> tuple[Store, Store]:
    """One layer's empty stores, of keys and of values. fixed: its calibrated constants, empty for formats that need none."""
    keys = Store(_key_codec(fmt, fixed, rotary), fmt.window, fmt.key_block, fmt.sinks)
    return keys, Store(_value_codec(fmt, fixed), fmt.window, 1, fmt.sinks)


def with_layers(model: Any, layer: Callable[[int, Any], Any]) -> Any:
    """The cache that a model's configuration asks for, with layers of one's own: layer(index, the one transformers makes)."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    cache.layers = [layer(index, made) for index, made in enumerate(cache.layers)]
    return cache


def attention_windows(model: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window, or None: what `CacheFormat.size_bytes` takes as `sliding`."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    return tuple(_window(index, made) for index, made in enumerate(cache.layers))


def stored_bytes(cache: Any) -> int:
    """Bytes of the memory that a cache's tensors hold, whatever its format; spare room of buffers counts."""
    storages = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _window(index: int, made: Any) -> int | None:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(made) is DynamicLayer:
        return None
    if type(made) is DynamicSlidingWindowLayer:
        return int(made.sliding_window)
    raise ValueError(f"layer {index} of the cache is a {type(made).__name__}, which holds more than keys and values")


def _tensors(cache: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for layer in cache.layers:
        for store in (getattr(layer, "packed_keys", None), getattr(layer, "packed_values", None)):
            found += store.tensors() if store is not None else ()
        found += [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
    return [tensor for tensor in found if tensor.numel()]


def _key_codec(fmt: CacheFormat, fixed: Mapping[str, Tensor], rotary: Rotary | None) -> Codec:
    if fmt.kind == "kvquant":
        inner = ChannelCodebook(_book(fixed, "key"), fixed["key.low"], fixed["key.high"])
        return inner if rotary is None else BeforeRotary(inner, rotary)
    if fmt.kind == "kivi":
        return IntegerByChannel(fmt.key_bits, fmt.group)
    return _codec(fmt, fmt.key_bits, fixed, "key")


def _value_codec(fmt: CacheFormat, fixed: Mapping[str, Tensor]) -> Codec:
    if fmt.kind == "kvquant":
        return TokenCodebook(_book(fixed, "value"))
    return _codec(fmt, fmt.value_bits, fixed, "value")


def _codec(fmt: CacheFormat, bits: int, fixed: Mapping[str, Tensor], side: str) -> Codec:
    """What keys and values have in common."""
    if fmt.kind == "dense":
        return Cast(DTYPES[fmt.dense])
    if fmt.kind == "fp8":
        return Float8(fixed.get(f"{side}.scale"))
    if fmt.kind == "turbo":
        return Turbo(bits)
    inner = cast(Codec, Integer(bits, fmt.group))
    if fmt.smooth:
        return Smoothed(inner, fixed[f"{side}.shift"], fixed[f"{side}.scale"])
    return Rotated(inner) if fmt.rotated else inner


def _book(fixed: Mapping[str, Tensor], side: str) -> Codebook:
    return Codebook(fixed[f"{side}.levels"], fixed[f"{side}.decoded"])
