"""`describe`: blocks, linears and sites of a decoder-only language model, found by watching it run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from methods.model.attention import check_alike, check_outputs, heads
from methods.model.experts import UnfusedExperts, UnsupportedModel
from methods.model.feeds import agreeing, with_feeds
from methods.model.structure import LayerSpec, Site, Structure
from methods.model.trace import Trace, folds, probe_tokens, trace
from methods.model.weights import bias_of, is_linear, is_transposed, norm_view, weight_of

__all__ = ["UnsupportedModel", "describe"]

KINDS = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"),
    "o": ("o_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
}
"""Leaf names by kind, in the order in which a site lists its layers. A name that is not here is `other`, which limits nothing."""

ORDER = (*KINDS, "other")
AMBIGUOUS_OUTPUTS = ("c_proj", "out_proj", "dense")
"""The output of the attention or of the MLP, depending on the parent."""

SMALLEST_OUTPUT = 8
"""Linears with fewer outputs are gates of experts and the like: there is nothing to gain there, so they are left alone."""


@dataclass(frozen=True)
class _Layer:
    spec: LayerSpec
    group: tuple[object, ...]
    parent: str
    leaf: str
    experts: str = ""


def describe(model: Any, dtype: str = "bf16") -> Structure:
    """The structure of a causal language model of transformers, which comes back unchanged.

    dtype: what the checkpoint stores its weights in. Fused experts must have been unfused (`methods.model.experts`).
    Linears of one parent that read the same tensor form a site; the experts of a layer form two, whose names carry a `*`:
    `model.layers.0.mlp.experts.*.gate_up_proj`. Raises UnsupportedModel naming what is not understood.
    """
    config = _text_config(model)
    blocks = _blocks(model)
    head, embedding = _paths(model)
    ids = probe_tokens(config.vocab_size)
    seen = trace(model, ids, blocks)
    _check_sequence(blocks, seen)
    attention = heads(model, ids, seen.logits, len(blocks))
    layers = [layer for index, block in enumerate(blocks) for layer in _layers(model, index, block, seen)]
    sites = with_feeds(model, _with_norms(model, _sites(layers, seen), seen), ids, seen.logits, attention)
    head_weight, embedding_weight = (model.get_submodule(path).weight for path in (head, embedding))
    outputs = (layer.d_in for site in sites for layer in site.layers if layer.kind == "o")
    check_outputs(attention, type(model).__name__, outputs)
    return Structure(
        architecture=type(model).__name__,
        blocks=blocks,
        sites=sites,
        head=head,
        embedding=embedding,
        tied=head_weight is embedding_weight or 0 != head_weight.data_ptr() == embedding_weight.data_ptr(),
        d_model=seen.width,
        n_vocab=seen.logits.shape[-1],
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        dtype=dtype,
        n_parameters=sum(p.numel() for p in model.parameters()),
    )


def _text_config(model: Any) -> Any:
    name = type(model).__name__
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoder-only language models are supported")
    check_alike(config, name)
    if not getattr(config, "num_attention_heads", None):
        raise UnsupportedModel(f"{name} has no attention heads (num_attention_heads); only attention decoders are supported")
    return config


def _blocks(model: Any) -> tuple[str, ...]:
    """Paths of the longest list of modules with linears, not counting lists inside of such a list; its modules have to be alike."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        blocks = isinstance(module, nn.ModuleList) and not isinstance(module, UnfusedExperts)
        if blocks and not nested and _holds_linears(module):
            lists[name] = module
    if not lists:
        raise UnsupportedModel(
            f"{type(model).__name__}: no list of like decoder blocks with linear layers was found; "
            "choose a model whose blocks are one nn.ModuleList of one class"
        )
    name = max(lists, key=lambda path: len(lists[path]))
    kinds = Counter(type(block).__name__ for block in lists[name])
    if len(kinds) > 1:
        told = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        raise UnsupportedModel(
            f"{type(model).__name__} is a hybrid: its blocks {name} are {told}; choose a model all of whose blocks are alike"
        )
    return tuple(f"{name}.{index}" for index in range(len(lists[name])))


def _holds_linears(entries: nn.ModuleList) -> bool:
    """Whether each of a list's modules has linears inside and is none itself."""
    return len(entries) > 0 and all(not is_linear(entry) and any(map(is_linear, entry.modules())) for entry in entries)


def _is_stack(entries: nn.ModuleList) -> bool:
    return _holds_linears(entries) and len({type(entry) for entry in entries}) == 1


def _paths(model: Any) -> tuple[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if id(head) not in names or id(embedding) not in names:
        raise UnsupportedModel(
            f"{type(model).__name__} has no output projection to a vocabulary: it is not a causal language model"
        )
    return names[id(head)], names[id(embedding)]


def _check_sequence(blocks: tuple[str, ...], seen: Trace) -> None:
    called = tuple(name for name in seen.calls if name in set(blocks))
    if called != blocks:
        raise UnsupportedModel(
            f"the blocks {blocks[0]} … {blocks[-1]} are not run once each, in order; only a plain stack of decoder blocks is supported"
        )


def _layers(model: Any, index: int, block: str, seen: Trace) -> list[_Layer]:
    """The linears of one block that sites are made of; raises where other weights of the block are not understood."""
    modules = {f"{block}.{name}": module for name, module in model.get_submodule(block).named_modules() if name}
    containers = {name: len(m) for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 1 and _is_stack(m)}
    result, strange, idle = [], [], []
    for name, module in modules.items():
        if _left_alone(name, module, containers):
            continue
        if not is_linear(module):
            strange.append(name)
            continue
        container = next((c for c in containers if name.startswith(f"{c}.")), "")
        if not container and name not in seen.reads:
            idle.append(name)
        result.append(_layer(index, name, module, container, seen))
    if strange:
        kinds = sorted({type(modules[name]).__name__ for name in strange})
        raise UnsupportedModel(
            f"{', '.join(strange[:4])}: weights of {', '.join(kinds)} are not understood (only linears, convolutions, norms, routers "
            "and experts laid out like Mixtral's are, unfused by methods.model.experts.unfuse_experts); choose another model"
        )
    if idle:
        raise UnsupportedModel(f"{', '.join(idle[:4])}: these linears took no part in a forward pass; choose another model")
    return result


def _left_alone(name: str, module: nn.Module, containers: Mapping[str, int]) -> bool:
    """Whether a module has no weight that a site could be made of: vectors, convolutions, routers, gates with few outputs."""
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() > 1]
    if not shapes or isinstance(module, nn.Conv1d):
        return True
    parent = name.rpartition(".")[0]
    experts_beside = {n for path, n in containers.items() if path.rpartition(".")[0] == parent}
    router = len(shapes) == 1 and shapes[0][0] in experts_beside
    return router or (is_linear(module) and weight_of(module).shape[0] < SMALLEST_OUTPUT)


def _layer(index: int, name: str, module: nn.Module, container: str, seen: Trace) -> _Layer:
    parent, _, leaf = name.rpartition(".")
    d_out, d_in = weight_of(module).shape
    kind = _kind(parent, leaf)
    if container:
        leaf = name.removeprefix(f"{container}.").partition(".")[2]
        role = "gate_up" if kind in ("gate", "up", "gate_up") else leaf
        group: tuple[object, ...] = (container, role, d_in)
        parent, kind = f"{container}.*", f"expert_{kind}"
    else:
        group = (parent, seen.reads.get(name), d_in)
    spec = LayerSpec(name, kind, index, d_in, d_out, bias_of(module) is not None, is_transposed(module))
    return _Layer(spec, group, parent, leaf, container)


def _kind(parent: str, leaf: str) -> str:
    for kind, names in KINDS.items():
        if leaf in names:
            return kind
    if leaf in AMBIGUOUS_OUTPUTS:
        return "o" if "att" in parent.rpartition(".")[2] else "down"
    return "other"


def _sites(layers: Iterable[_Layer], seen: Trace) -> tuple[Site, ...]:
    """Groups layers into sites, in the order in which the model computes them."""
    first_call: dict[str, int] = {}
    for position, name in enumerate(seen.calls):
        first_call.setdefault(name, position)
    groups: dict[tuple[object, ...], list[_Layer]] = defaultdict(list)
    for layer in layers:
        groups[layer.group].append(layer)
    never = len(seen.calls)
    ordered = sorted(groups.values(), key=lambda group: min(first_call.get(layer.spec.name, never) for layer in group))
    sites = [_site(group) for group in ordered]
    return tuple(sorted(sites, key=lambda site: site.block))


def _site(group: list[_Layer]) -> Site:
    rank = {kind: position for position, kind in enumerate(ORDER)}
    first = group[0]
    if not first.experts:
        group = sorted(group, key=lambda layer: rank[layer.spec.kind])
    leaves = "+".join(dict.fromkeys(layer.leaf for layer in group))
    kind = _site_kind({layer.spec.kind.removeprefix("expert_") for layer in group})
    return Site(
        name=f"{first.parent}.{leaves}",
        kind=f"expert_{kind}" if first.experts else kind,
        block=first.spec.block,
        layers=tuple(layer.spec for layer in group),
        shares_input=not first.experts,
    )


def _site_kind(kinds: set[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds <= {"q", "k", "v"}:
        return "qkv"
    return "gate_up" if kinds == {"gate", "up"} else "other"


def _with_norms(model: Any, sites: tuple[Site, ...], seen: Trace) -> tuple[Site, ...]:
    """Sets `norm` where a scale folds exactly: one norm writes what the site reads, nothing else reads it, and a test agrees."""
    readers: dict[object, set[str]] = defaultdict(set)
    for reader, read in seen.reads.items():
        readers[read].add(reader)
    candidates = {}
    for site in sites:
        names = {layer.name for layer in site.layers}
        address = seen.reads[site.layers[0].name] if site.shares_input else (0, 0)
        norm = seen.normed.get(address)
        if norm and readers[address] == names and _is_affine(model, norm):
            candidates[site.name] = (norm, names)
    ids = probe_tokens(seen.logits.shape[-1])
    if seen.logits.is_meta:  # nothing to test with: what looks like it folds is taken to
        return tuple(replace(s, norm=candidates[s.name][0]) if s.name in candidates else s for s in sites)
    order = sorted(candidates, key=lambda name: name.rpartition(".")[2])
    agreed = set(agreeing(order, lambda names: folds(model, ids, seen.logits, dict(candidates[name] for name in names))))
    return tuple(replace(s, norm=candidates[s.name][0]) if s.name in agreed else s for s in sites)


def _is_affine(model: Any, norm: str) -> bool:
    try:
        norm_view(model, norm)
    except ValueError:
        return False
    return True
