"""Fitter `mse`: the range of each group whose rounded weights are nearest to the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, fit_in_chunks, grouped, range_grid, safe_scale
from methods.quant.minmax import minmax

SHRINK = tuple(1 - step / 25 for step in range(1, 18))
"""Parts of the min-max range that are tried: 0.96, 0.92, …, 0.32. Two bits and whole rows want the small ones."""
LEAST = {2: 0.32, 3: 0.44, 4: 0.56, 8: 0.84}
"""The smallest part worth trying, by bits, where groups share a scale: the finer the grid, the less clipping pays."""
FULL = tuple(1 + step / 25 for step in range(4, -1, -1))
"""Wider scales for a symmetric grid's other sign, whose longer half lies on the side without the extreme value."""


def mse(weight: Tensor, fmt: Format) -> Grid:
    """For every group the candidate of least squared rounding error, `minmax` among them; weight: (d_out, d_in).

    Never worse than `minmax` in any group.
    """
    return fit_in_chunks(weight, lambda rows: _fit(rows, fmt))


def _fit(weight: Tensor, fmt: Format) -> Grid:
    groups = grouped(weight, fmt)
    best = minmax(weight, fmt)
    least = _squared_error(groups, best, fmt)
    for grid in _candidates(groups, best, fmt):
        error = _squared_error(groups, grid, fmt)
        better = error < least
        least = torch.where(better, error, least)
        offset = None if grid.offset is None or best.offset is None else torch.where(better, grid.offset, best.offset)
        best = Grid(torch.where(better, grid.scale, best.scale), offset)
    return best


def _candidates(groups: Tensor, full: Grid, fmt: Format) -> Iterator[Grid]:
    shrink = [part for part in SHRINK if fmt.group == -1 or part > LEAST[fmt.bits] - 1e-9]
    if fmt.symmetric:
        scale = full.scale.float()
        for part in shrink:
            yield Grid(safe_scale(scale * part))
        if fmt.bits < 8:
            for part in [*FULL, *shrink]:
                yield Grid(safe_scale(scale * -part))
        return
    low, high = groups.aminmax(dim=-1)
    for part in shrink:
        cut = (high - low) * ((1 - part) / 2)
        yield range_grid(low + cut, high - cut, fmt)


def _squared_error(groups: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """Of each group (d_out, n_groups), with the arithmetic of `encode` and `decode`."""
    scale = grid.scale.float()[..., None]
    offset = 0.0 if grid.offset is None else grid.offset.float()[..., None]
    shift = fmt.levels // 2 if fmt.symmetric else 0
    lowest, highest = fmt.code_range
    codes = ((groups - offset) / scale).round_().clamp_(lowest - shift, highest - shift)
    return codes.mul_(scale).add_(offset).sub_(groups).square_().sum(-1)
