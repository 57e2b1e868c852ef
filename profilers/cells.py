"""Which kernel calls a site makes under a format: the cells of the latency table that price it."""

from __future__ import annotations

from methods.formats.format import Format
from methods.model.structure import Site
from profilers.table import KernelKey


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
