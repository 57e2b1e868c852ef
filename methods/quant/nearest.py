"""Rounder `nearest`: every weight takes the nearest value of its grid."""

from __future__ import annotations

from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import encode
from methods.quant.grid import Grid, payload


def nearest(weight: Tensor, fmt: Format, grid: Grid) -> dict[str, Tensor]:
    """The payload of a weight (d_out, d_in)."""
    return payload(encode(weight, fmt, grid.scale, grid.offset, grid.levels), grid)
