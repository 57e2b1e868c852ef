"""Fitter `hqq`: a float offset that minimises a robust norm of the rounding error, by half-quadratic splitting."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, fit_in_chunks, grouped
from methods.quant.minmax import minmax

NORM = 0.7
BETA = 10.0
GROWTH = 1.01


def hqq(weight: Tensor, fmt: Format, iterations: int = 20) -> Grid:
    """min over the offset z of `||W - Q_z(W)||_p`, p = 0.7, with the min-max scale kept; weight: (d_out, d_in).

    Splits `E = W - Q(W)`: E is shrunk towards zero, sign(d) relu(|d| - |d|**(p-1) / beta), then z is the mean of what is left.
    Deviations: the error is measured in steps of the grid, so that the result does not depend on the weights' scale; each group keeps
    the offset that is best as it is stored, of all that were met, so that more iterations never do harm. The iteration itself goes on
    in fp32: a step is often smaller than what the stored dtype rounds away, and would stand still there.
    0 iterations are `minmax`. Raises ValueError for a symmetric format, which has no offset to solve for.
    """
    if fmt.symmetric:
        raise ValueError(f"hqq: {fmt.name} is symmetric and has no offset to solve for; use {fmt.name}-asym")
    return fit_in_chunks(weight, lambda rows: _fit(rows, fmt, iterations))


def _fit(weight: Tensor, fmt: Format, iterations: int) -> Grid:
    start = minmax(weight, fmt)
    assert start.offset is not None
    groups = grouped(weight, fmt)
    scale = start.scale.float()[..., None]
    best = start.offset
    offset = best.float()[..., None]
    least = torch.full(best.shape, torch.inf)
    beta = BETA
    for step in range(iterations + 1):
        kept = offset.to(best.dtype)
        norm = _left(groups, scale, kept.float(), fmt)[1].abs().pow_(NORM).sum(-1)
        better = norm < least
        least, best = torch.where(better, norm, least), torch.where(better, kept[..., 0], best)
        if step < iterations:
            ideal, error = _left(groups, scale, offset, fmt)
            size = error.abs()
            outlier = error.sign() * (size - size.clamp(min=1e-6).pow(NORM - 1) / beta).relu()
            offset = (ideal - outlier * scale).mean(-1, keepdim=True)
            beta *= GROWTH
    return Grid(start.scale, best)


def _left(groups: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """What the codes leave of the weights, (d_out, n_groups, group): an offset for each of them, and the error in steps of the grid."""
    ideal = groups - ((groups - offset) / scale).round_().clamp_(*fmt.code_range) * scale
    return ideal, (ideal - offset) / scale
