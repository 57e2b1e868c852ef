"""Fitter `minmax`: the grid that spans each group's range."""

from __future__ import annotations

from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, grouped, range_grid


def minmax(weight: Tensor, fmt: Format) -> Grid:
    """The grid from each group's smallest to its largest weight; weight: (d_out, d_in)."""
    low, high = grouped(weight, fmt).aminmax(dim=-1)
    return range_grid(low, high, fmt)
