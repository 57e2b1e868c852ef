"""Grids of learned levels: how any set of levels becomes one, and the evenly spaced levels that they start from."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import SCALE_DTYPE
from methods.quant.grid import Grid, grouped, level_grid, pooled


def even_levels(weight: Tensor, fmt: Format) -> Grid:
    """Levels evenly spaced from a group's smallest to its largest weight, as an integer grid with an offset; weight: (d_out, d_in)."""
    low, high = grouped(weight, fmt).aminmax(dim=-1)
    low, high = pooled(low, fmt, lambda v: v.amin(0)), pooled(high, fmt, lambda v: v.amax(0))
    steps = torch.arange(fmt.levels) / (fmt.levels - 1)
    return lut_grid(fmt, len(weight), low[..., None] + (high - low)[..., None] * steps)


def lut_grid(fmt: Format, d_out: int, levels: Tensor) -> Grid:
    """The grid of levels (n_blocks, n_groups, n), any set of n = 2**bits numbers a group; they are stored in bf16.

    n_blocks: `fmt.blocks(d_out)`, one for each row, or 1 where the whole weight shares its levels (`lut3a16-whole`).
    Raises ValueError for another number of levels or sets.
    """
    if levels.dim() != 3 or levels.shape[0] != fmt.blocks(d_out) or levels.shape[2] != fmt.levels:
        raise ValueError(f"{fmt.name}: levels {tuple(levels.shape)}; give ({fmt.blocks(d_out)}, n_groups, {fmt.levels})")
    return level_grid(fmt, d_out, {"levels": levels.to(SCALE_DTYPE)})
