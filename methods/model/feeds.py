"""`with_feeds`: the linears whose rows write the inputs of another one, told by their shapes and tested on the running model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from methods.model.attention import Heads
from methods.model.structure import Feed, LayerSpec, Site
from methods.model.trace import folds


def with_feeds(model: Any, sites: tuple[Site, ...], ids: Tensor, logits: Tensor, heads: Heads) -> tuple[Site, ...]:
    """Sets `feed` at down and output projections where a scale of the rows before them divides out exactly, biases included.

    So it does behind a gate and behind ReLU, and not where a norm, another activation or another reader stands between. ids: (1, t);
    logits: (1, t, n_vocab), what the model makes of them; without values (device `meta`) the likeliest layout is taken.
    """
    candidates = {site.name: list(_candidates(site, sites, heads)) for site in sites if len(site.layers) == 1}
    if logits.is_meta:
        found = {
            site.name: candidates[site.name][0] for site in sites if candidates.get(site.name) and _untested(model, site, sites)
        }
    else:
        found = _tested(model, {site.name: site.layers[0].name for site in sites}, candidates, ids, logits)
    return tuple(replace(site, feed=found.get(site.name)) for site in sites)


def _tested(
    model: Any, linears: Mapping[str, str], candidates: Mapping[str, Sequence[Feed]], ids: Tensor, logits: Tensor
) -> dict[str, Feed]:
    """By site, the first candidate that folds; linears: by site, the one that is fed."""
    found: dict[str, Feed] = {}
    for place in range(max(map(len, candidates.values()), default=0)):
        tried = {name: own[place] for name, own in candidates.items() if name not in found and place < len(own)}

        def fold(names: list[str], tried: Mapping[str, Feed] = tried) -> bool:
            return folds(model, ids, logits, {}, {linears[name]: tried[name] for name in names})

        # Sites of one kind side by side, so that a kind that does not fold is told by few runs.
        agreed = agreeing(sorted(tried, key=lambda name: name.rpartition(".")[2]), fold)
        found |= {name: tried[name] for name in agreed}
    return found


def _untested(model: Any, site: Site, sites: tuple[Site, ...]) -> bool:
    """Whether nothing but attention, a gate or ReLU seems to stand before a site, as far as names and modules tell."""
    parent = site.layers[0].name.rpartition(".")[0]
    kinds = {layer.kind for layer in _beside(site, sites)}
    relu = any(isinstance(child, nn.ReLU) for child in model.get_submodule(parent).children())
    return site.kind == "o" or relu or not kinds.isdisjoint({"gate", "gate_up"})


def agreeing(names: list[str], test: Callable[[list[str]], bool]) -> list[str]:
    """Those of the names that pass a test: all at once where they do, else half by half."""
    if not names or test(names):
        return names
    if len(names) == 1:
        return []
    middle = len(names) // 2
    return agreeing(names[:middle], test) + agreeing(names[middle:], test)


def _candidates(site: Site, sites: tuple[Site, ...], heads: Heads) -> Iterator[Feed]:
    """What may write the site's inputs, the likeliest first: linears beside it that are wide enough."""
    for layer in _beside(site, sites):
        if site.kind == "down":
            yield from _of_down(layer, site.d_in)
        elif site.kind == "o" and site.d_in == heads.n_heads * heads.head_dim:
            yield from _of_o(layer, heads)


def _beside(site: Site, sites: tuple[Site, ...]) -> list[LayerSpec]:
    """The linears of the site's parent module, its own among them."""
    parent = site.layers[0].name.rpartition(".")[0]
    own = [layer for other in sites if other.block == site.block for layer in other.layers]
    return [layer for layer in own if layer.name.rpartition(".")[0] == parent]


def _of_down(layer: LayerSpec, d_in: int) -> Iterator[Feed]:
    if layer.kind == "up" and layer.d_out == d_in:
        yield Feed(layer.name, 0, d_in, d_in)
    elif layer.kind == "gate_up" and layer.d_out == 2 * d_in:
        yield Feed(layer.name, d_in, d_in, d_in)
        yield Feed(layer.name, 0, d_in, d_in)


def _of_o(layer: LayerSpec, heads: Heads) -> Iterator[Feed]:
    dim, n_values = heads.head_dim, heads.n_kv_heads
    shared = heads.n_heads // n_values
    width = (heads.n_heads + 2 * n_values) * dim
    if layer.kind == "v" and layer.d_out == n_values * dim:
        yield Feed(layer.name, 0, dim, dim, shared)
    elif layer.kind == "qkv" and layer.d_out == width:
        yield Feed(layer.name, width - n_values * dim, dim, dim, shared)
        # Queries, keys and values of a head, or of a group of heads, side by side.
        yield Feed(layer.name, (shared + 1) * dim, dim, (shared + 2) * dim, shared)
