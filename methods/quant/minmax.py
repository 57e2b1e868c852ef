"""Fitter `minmax`: the grid that spans each group's range, or what an element without a range starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from methods.formats.format import Format
from methods.quant.bcq import greedy
from methods.quant.grid import Grid, grouped, range_grid
from methods.quant.lut import even_levels
from methods.quant.signs import mean_magnitude, ternary_weights

STARTS: Mapping[str, Callable[[Tensor, Format], Grid]] = {
    "bin": mean_magnitude,
    "tern": ternary_weights,
    "bcq": greedy,
    "lut": even_levels,
}
"""Elements that no range fits: a closed form each. Signs scaled to the largest weight would be further from the weights than zeros."""


def minmax(weight: Tensor, fmt: Format) -> Grid:
    """The grid from each group's smallest to its largest weight, or that of `STARTS`; weight: (d_out, d_in)."""
    if fmt.element in STARTS:
        return STARTS[fmt.element](weight, fmt)
    low, high = grouped(weight, fmt).aminmax(dim=-1)
    return range_grid(low, high, fmt)
