"""Fitter `imatrix`: the scale of each group with the least squared error, weighted by how large its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, grouped, stored
from methods.quant.minmax import minmax

Ideal = tuple[Tensor, Tensor | None]


def imatrix(weight: Tensor, importance: Tensor, fmt: Format, steps: int) -> Grid:
    """Least squares scales (and offsets) for the codes of `2 * steps + 1` trial scales, the best of each group, `minmax` among them.

    weight: (d_out, d_in); importance: (d_in,), the mean squared inputs. A weight w of input j counts with
    `importance_j * sqrt(sigma^2 + w^2)`, sigma^2 the mean square of its row: large weights matter more, as llama.cpp has it.
    Grids are judged as they are stored, those of two levels on the second level that `minmax` finds; so no group is worse than there.
    0 steps are `minmax`. After llama.cpp's quantization with an importance matrix. Deviations: the sub-scales of a super-block keep its
    fp16 scales; the search has one width for all types. Raises ValueError for elements that are no integers.
    """
    if fmt.element != "int" or fmt.rows != 1:
        raise ValueError(f"imatrix: {fmt.name}; it fits integer grids whose rows have scales of their own, e.g. q4_k")
    groups, full = grouped(weight, fmt), minmax(weight, fmt)
    sigma = weight.float().square().mean(1)[:, None, None]
    cost = importance.float().view(fmt.groups(weight.shape[1]), -1) * (sigma + groups.square()).sqrt()
    best: Ideal = full.scale.float(), None if full.offset is None else full.offset.float()
    least = _error(groups, cost, full, fmt)
    for step in range(-steps, steps + 1) if steps else ():
        trial = _steps(groups, full, fmt, 1 + step / (2.5 * steps))
        scale, offset = _least_squares(groups, cost, trial, fmt)
        grid = stored(fmt, len(weight), scale, offset, full)
        error = _error(groups, cost, grid, fmt)
        better = error < least
        least = torch.where(better, error, least)
        origin = None if offset is None or best[1] is None else torch.where(better, offset, best[1])
        best = torch.where(better, scale, best[0]), origin
    return stored(fmt, len(weight), *best, full)


def _steps(groups: Tensor, full: Grid, fmt: Format, part: float) -> Tensor:
    """The codes, less the shift of a symmetric grid, that groups have where the scale is a part of the range's."""
    scale = full.scale.float()[..., None] * part
    steps = groups if full.offset is None else groups - full.offset.float()[..., None]
    lowest, highest = _range(fmt)
    return (steps / scale).round_().clamp_(lowest, highest)


def _range(fmt: Format) -> tuple[int, int]:
    shift = fmt.levels // 2 if fmt.symmetric else 0
    return fmt.code_range[0] - shift, fmt.code_range[1] - shift


def _least_squares(groups: Tensor, cost: Tensor, steps: Tensor, fmt: Format) -> Ideal:
    """The scale (and offset) of least weighted error for codes: two equations a group, one where the grid is symmetric."""
    product, square = (cost * steps * groups).sum(-1), (cost * steps.square()).sum(-1)
    if fmt.symmetric:
        return _ratio(product, square), None
    total, linear, mean = cost.sum(-1), (cost * steps).sum(-1), (cost * groups).sum(-1)
    scale = _ratio(total * product - linear * mean, total * square - linear.square())
    offset = _ratio(mean - scale * linear, total)
    if fmt.scales.span and not fmt.scales.least:
        # That second level holds no positive offset: at zero, the scale is the best one of a grid without.
        above = offset > 0
        scale, offset = torch.where(above, _ratio(product, square), scale), offset.clamp(max=0)
    return scale, offset


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def _error(groups: Tensor, cost: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """Weighted squared error of every group (d_out, n_groups), its weights rounded to nearest on the grid."""
    scale, origin = grid.scale.float()[..., None], 0.0 if grid.offset is None else grid.offset.float()[..., None]
    steps = ((groups - origin) / scale).round_().clamp_(*_range(fmt))
    return (cost * (steps * scale + origin - groups).square()).sum(-1)
