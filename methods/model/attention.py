"""The attention of a model's blocks, as one number each: read off the configuration and off a cache that the model fills.

The one place where sizes that may differ from block to block are read: whoever asks gets a size that holds for all blocks, or a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.model.experts import UnsupportedModel
from methods.model.trace import blind


@dataclass(frozen=True)
class Heads:
    """Of every block: query heads, key/value heads and channels of a head, which keys and values share."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


def check_alike(config: Any, name: str) -> None:
    """Raises UnsupportedModel where a configuration of transformers gives its blocks sizes of their own.

    config: of the text model; name: what the refusal calls the model. Attributes named in `per_layer_config` cannot be read from the
    configuration as a whole (transformers raises a RuntimeError, which `getattr`'s default does not catch), and an architecture that does
    not read the entry ignores it without a word.
    """
    if not getattr(config, "is_heterogeneous", False):
        return
    own = config.to_dict().get("per_layer_config") or {}
    if own:
        blocks = ", ".join(str(int(index)) for index in list(own)[:4])
        what = ", ".join(sorted({attribute for entry in own.values() for attribute in entry}))
        raise UnsupportedModel(
            f"{name}: per_layer_config gives blocks {blocks}{', …' if len(own) > 4 else ''} a {what} of their own, and only models whose "
            "blocks are alike are understood; choose another model, or take the entry out where the architecture does not read it"
        )


@torch.no_grad()
def heads(model: Any, ids: Tensor, logits: Tensor, n_blocks: int) -> Heads:
    """The heads of a causal decoder all of whose blocks keep keys and values of one size, and nothing else, of past tokens.

    ids: (1, t) token ids; logits: (1, t, n_vocab), what the model makes of them without a cache. Raises UnsupportedModel for every other
    model, saying what is different: no cache, states of another kind (hybrids), blocks that share or differ.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    check_alike(config, name)
    n_heads = config.num_attention_heads
    if not isinstance(n_heads, int):
        raise UnsupportedModel(
            f"{name}: num_attention_heads={n_heads} is no single number; only blocks that are alike are understood"
        )
    if logits.is_meta:  # sizes alone
        return Heads(n_heads, *_kept(name, _sized(model, ids.to("meta"), n_blocks)))
    _check_causal(model, ids, logits)
    n_kv_heads, head_dim = _kept(name, _filled(model, ids, logits, n_blocks))
    return Heads(n_heads, n_kv_heads, head_dim)


def check_outputs(found: Heads, name: str, widths: Iterable[int]) -> None:
    """Raises UnsupportedModel where an output projection, whose numbers of inputs are `widths`, reads another number of heads."""
    uneven = sorted({width for width in widths if width != found.n_heads * found.head_dim})
    if uneven:
        raise UnsupportedModel(
            f"{name}: {found.n_heads} heads of {found.head_dim} channels do not make the {uneven[0]} inputs of an output projection; only "
            "models whose blocks are alike are understood, choose another"
        )


def _filled(model: Any, ids: Tensor, logits: Tensor, n_blocks: int) -> Sequence[Any]:
    """The layers of the cache that a model fills with tokens in two calls: one for every block, each with keys and values alone."""
    from transformers import DynamicCache

    name = type(model).__name__
    cache: Any = DynamicCache(config=model.config)
    _check_kinds(name, cache.layers, n_blocks)
    middle = ids.shape[1] // 2
    try:
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :middle], ids[:, middle:])
        ]
    except TypeError as error:
        raise UnsupportedModel(f"{name} takes no cache of keys and values ({error}); choose a decoder-only model") from None
    if any(layer.keys is None for layer in cache.layers):
        raise UnsupportedModel(
            f"{name} keeps no keys and values of past tokens in some of its blocks; choose a decoder-only model whose blocks are attention"
        )
    if (
        torch.cat(parts, 1).float() - logits
    ).abs().max() > 0.05 * logits.abs().max():  # far above another choice of experts by rounding
        raise UnsupportedModel(
            f"{name} computes other logits with a cache than without, so that keys and values are not all it keeps; choose a model all of "
            "whose blocks are attention"
        )
    layers: Sequence[Any] = cache.layers
    return layers


def _sized(model: Any, ids: Tensor, n_blocks: int) -> Sequence[Any]:
    """The layers of the cache that a model without memory fills, which have sizes and no values."""
    from transformers import DynamicCache

    def filled(given: Mapping[str, Tensor]) -> Sequence[Any]:
        cache: Any = DynamicCache(config=model.config)
        _check_kinds(type(model).__name__, cache.layers, n_blocks)
        model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
        layers: Sequence[Any] = cache.layers
        return layers

    return blind(ids, filled)


def _check_causal(model: Any, ids: Tensor, logits: Tensor) -> None:
    """An encoder takes a cache as well, and generates with it: only what it makes of the first tokens tells that it sees the others."""
    middle = ids.shape[1] // 2
    other = torch.cat([ids[:, :middle], ids[:, :1].expand(-1, ids.shape[1] - middle)], 1)
    found = model(input_ids=other, use_cache=False).logits.float()
    if (found - logits)[:, :middle].abs().max() > 1e-3 * logits.abs().max():
        raise UnsupportedModel(
            f"{type(model).__name__} reads tokens ahead, as an encoder does (is_decoder is not set); choose a decoder-only model"
        )


def _check_kinds(name: str, layers: Sequence[Any], n_blocks: int) -> None:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    other = Counter(type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer))
    if other:
        told = ", ".join(f"{kind} in {count} of {len(layers)} blocks" for kind, count in other.items())
        raise UnsupportedModel(
            f"{name} is a hybrid: it keeps something else than keys and values of past tokens ({told}); choose a model all of whose blocks "
            "are attention"
        )
    if len(layers) != n_blocks:
        raise UnsupportedModel(
            f"{name} keeps keys and values for {len(layers)} blocks, and {n_blocks} were found; only a plain stack of decoder blocks is "
            "supported"
        )


def _kept(name: str, layers: Sequence[Any]) -> tuple[int, int]:
    """Key/value heads and channels of a head, where every block keeps the same."""
    sizes = Counter((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers)
    if len(sizes) > 1:
        told = ", ".join(f"{heads} key/value heads of {dim} in {count} blocks" for (heads, dim, _), count in sizes.items())
        raise UnsupportedModel(f"{name} has {told}; only models whose blocks are alike are understood, choose another")
    n_kv_heads, key, value = next(iter(sizes))
    if key != value:
        raise UnsupportedModel(
            f"{name} keeps {key} channels a head as keys and {value} as values, as latent attention does; only keys and values of one "
            "size are understood, choose another model"
        )
    return int(n_kv_heads), int(key)
