"""Fitter `four-six`: the largest weight of a block becomes 6 or 4, the two ends of E2M1 between which nothing lies."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, grouped, pooled, stored
from methods.quant.minmax import minmax
from methods.quant.mse import squared_error

ENDS = (6, 4)
_ROOM = 256.0
"""The largest E4M3 scale where blocks end at 6, so that a block may end at 4, with a scale half as large again, of at most 448."""


def four_six(weight: Tensor, fmt: Format, end: int = 4) -> Grid:
    """For every block the end of less squared error, 6 where they are equal; weight: (d_out, d_in).

    end: the other one; 6 is `minmax`. Four Over Six (Cook 2025). Raises ValueError for elements other than E2M1 and for powers of two
    as scales, which cannot tell 6 from 4.
    """
    if fmt.element != "e2m1" or fmt.codec == "e8m0":
        raise ValueError(
            f"four-six: {fmt.name}; it chooses between scales of E2M1 blocks that are no powers of two, e.g. nvfp4a16"
        )
    if end == ENDS[0]:
        return minmax(weight, fmt)
    groups, d_out = grouped(weight, fmt), len(weight)
    top = pooled(groups.abs().amax(-1), fmt, lambda v: v.amax(0))
    like = None
    if fmt.codec == "nv":
        like = _with_room(stored(fmt, d_out, top / ENDS[0]))
    scales = top / ENDS[0], top / end
    first, second = (squared_error(groups, stored(fmt, d_out, scale, None, like), fmt) for scale in scales)
    return stored(fmt, d_out, torch.where(second < first, scales[1], scales[0]), None, like)


def _with_room(grid: Grid) -> Grid:
    """The grid with a tensor scale under which its scales end at `_ROOM`."""
    parts = dict(grid.parts)
    parts["scale_super"] = parts["scale_super"] * (_ROOM / 448.0)
    return Grid(grid.scale, stored=parts)
