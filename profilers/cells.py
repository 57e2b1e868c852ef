"""Which cells of the latency table price a step: the kernel calls of its sites, what it computes outside of them, and all of it at once."""

from __future__ import annotations

from dataclasses import dataclass

from methods.formats.format import Format
from methods.model.structure import Site, Structure
from profilers.cached_attention import Heads
from profilers.table import KernelKey
from profilers.target import digest_of
from profilers.workload import Workload


def site_cells(site: Site, fmt: Format, tokens: int, experts_per_token: int = 0) -> tuple[tuple[KernelKey, int], ...]:
    """Cells and how often each is called in one step with `tokens` tokens in flight.

    Layers that share an input are one fused call. Experts: routing spreads `tokens * experts_per_token` rows evenly over as many
    experts as they reach, an expectation rather than a bound.
    """
    if site.shares_input:
        return ((KernelKey("linear", fmt.name, tokens, site.d_out, site.d_in), 1),)
    rows = tokens * max(1, experts_per_token)
    reached = min(len(site.layers), rows)
    layer = site.layers[0]
    return ((KernelKey("linear", fmt.name, -(-rows // reached), layer.d_out, layer.d_in), reached),)


@dataclass(frozen=True)
class Widths:
    """What the operators outside of the linears depend on: channels of the stream between blocks, heads, tokens there are.

    inner: channels of a gated activation, 0 where there is none.
    """

    hidden: int
    heads: Heads
    vocabulary: int
    inner: int


def widths_of(structure: Structure) -> Widths:
    """A model's; experts' activations are no part of them."""
    heads = Heads(structure.n_heads, structure.n_kv_heads, structure.head_dim)
    gated = any(layer.kind in ("gate", "gate_up") for _, layer in structure.layers())
    inner = max((layer.d_in for _, layer in structure.layers() if layer.kind == "down"), default=0) if gated else 0
    return Widths(structure.d_model, heads, structure.n_vocab, inner)


Cells = tuple[tuple[KernelKey, int], ...]
"""Cells and how often each is called in a step."""


def operator_cells(widths: Widths, workload: Workload, dtype: str, cache: str = "", n_blocks: int = 1) -> Cells:
    """What a step computes besides linears: attention (m sequences, n new tokens, k in the cache), two norms a block and the last one,
    the embedding (m tokens of k, n channels), picking the most likely of n tokens for m sequences, and what a block does between them
    (rotary embedding, gated activation of k channels, additions: m tokens of n channels).

    dtype: the target's compute dtype; cache: a name of `methods.kv.format`, the dtype's own by default.
    """
    rows, decode = workload.tokens_in_flight, workload.phase == "decode"
    new, held = (1, workload.context) if decode else (workload.prompt, 0)
    return (
        (KernelKey(widths.heads.op(), cache or f"kv-{dtype}", workload.batch, new, held), n_blocks),
        (KernelKey("norm", dtype, rows, widths.hidden, 1), 2 * n_blocks + 1),
        (KernelKey("embedding", dtype, rows, widths.hidden, widths.vocabulary), 1),
        (KernelKey("sampling", dtype, workload.batch, widths.vocabulary, 1), 1),
        (KernelKey(widths.heads.op("elementwise"), dtype, rows, widths.hidden, widths.inner), n_blocks),
    )


def outside_cells(structure: Structure, workload: Workload, dtype: str, cache: str = "") -> Cells:
    """Everything outside of a model's sites that is a cell: its operators, and the head for one position a sequence."""
    head = KernelKey("linear", structure.dtype, workload.batch, structure.n_vocab, structure.d_model)
    return (*operator_cells(widths_of(structure), workload, dtype, cache, len(structure.blocks)), (head, 1))


def model_key(structure: Structure, workload: Workload) -> KernelKey:
    """The cell of a whole dense step of a workload: any model of these shapes takes as long, whatever its weights are."""
    shapes = sorted({(site.kind, tuple((layer.d_out, layer.d_in) for layer in site.layers)) for site in structure.sites})
    sizes = (structure.n_heads, structure.n_kv_heads, structure.head_dim, structure.d_model, structure.n_vocab)
    length = workload.context if workload.phase == "decode" else workload.prompt
    op = f"model-{workload.phase}-{digest_of([structure.architecture, shapes, sizes])}"
    return KernelKey(op, structure.dtype, workload.batch, length, len(structure.blocks))


def workload_of(key: KernelKey) -> Workload:
    """The workload of a cell of `model_key`."""
    if key.op.startswith("model-decode-"):
        return Workload("decode", key.m, context=key.n)
    return Workload("prefill", key.m, prompt=key.n)
