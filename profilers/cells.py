"""Which kernel calls a site makes under a format: the cells of the latency table that price it."""

from __future__ import annotations

from methods.formats.format import Format
from methods.model.structure import Site, Structure
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


def model_key(structure: Structure, workload: Workload) -> KernelKey:
    """The cell of a whole dense step of a workload: any model of these shapes takes as long, whatever its weights are."""
    shapes = sorted({(site.kind, tuple((layer.d_out, layer.d_in) for layer in site.layers)) for site in structure.sites})
    sizes = (structure.n_heads, structure.n_kv_heads, structure.head_dim, structure.d_model, structure.n_vocab)
    length = workload.context if workload.phase == "decode" else workload.prompt
    op = f"model-{workload.phase}-{digest_of([structure.architecture, shapes, sizes])}"
    return KernelKey(op, structure.dtype, workload.batch, length, len(structure.blocks))
