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
    Deviations: the error is measured in steps of the grid, so that the result does not depend on the weights' scale; every step sees
    the offset as it is stored, and each group keeps the best offset it met, so that more iterations never do harm.
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
    offset = best = start.offset
    least = torch.full(best.shape, torch.inf)
    beta = BETA
    for step in range(iterations + 1):
        codes = ((groups - offset.float()[..., None]) / scale).round_().clamp_(*fmt.code_range)
        ideal = groups - codes * scale
        error = (ideal - offset.float()[..., None]) / scale
        size = error.abs()
        norm = size.pow(NORM).sum(-1)
        better = norm < least
        least, best = torch.where(better, norm, least), torch.where(better, offset, best)
        if step < iterations:
            outlier = error.sign() * (size - size.clamp(min=1e-6).pow(NORM - 1) / beta).relu()
            offset = (ideal - outlier * scale).mean(-1).to(start.scale.dtype)
            beta *= GROWTH
    return Grid(start.scale, best)
