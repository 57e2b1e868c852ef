"""Rounder `obq`: every row rounds its cheapest weight first, and the weights still to come make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import decode
from methods.quant.feedback import inverse_factor
from methods.quant.grid import Grid
from methods.quant.nearest import nearest
from methods.quant.task import Rounded

LIMIT = 2048
"""The most inputs: rows, each with an order and so with an elimination of its own, cost d_in**3 each."""
_CHUNK = 2**24
_ROUNDING = 1e-4


def obq(
    weight: Tensor,
    hessian: Tensor,
    fmt: Format,
    grid: Grid,
    damping: float,
    *,
    cheapest: bool = True,
    kept: Tensor | None = None,
) -> Rounded:
    """Codes (d_out, d_in) uint8 that keep `trace(E H E^T)` of the error E small, with H = hessian + damping * mean(diag) * I.

    weight: (d_out, d_in); hessian: (d_in, d_in), `X^T X / n`; everything is computed in fp64.
    cheapest: the weight of least `error^2 / [H^-1]_jj` is next, but one that has left the grid's range goes before it, the farthest
    first; otherwise columns go from first to last, which is `feedback` in that order. kept: (d_out, d_in) bool, elements that are never
    rounded, so that they take up what all others leave. Every step of the grid must be of one width.
    Optimal Brain Quantizer (Frantar 2022), equation 7 and its rule for outliers. Raises ValueError above 2048 inputs.
    """
    d_out, d_in = weight.shape
    if d_in > LIMIT:
        raise ValueError(f"obq: d_in={d_in}; it costs d_in**3 a row, use gptq above {LIMIT} inputs")
    factor = inverse_factor(hessian, damping)
    inverse = factor.T @ factor
    free = torch.zeros_like(weight, dtype=torch.bool) if kept is None else kept
    rows = max(1, _CHUNK // d_in**2)
    values = weight.to(torch.float64, copy=True)
    for at in range(0, d_out, rows):
        part = slice(at, at + rows)
        own = Grid(grid.scale[part], None if grid.offset is None else grid.offset[part])
        _eliminate_(values[part], inverse, fmt, own, free[part], cheapest)
    return Rounded(nearest(values, fmt, grid)["codes"], None if kept is None else values.float())


def _eliminate_(weight: Tensor, inverse: Tensor, fmt: Format, grid: Grid, free: Tensor, cheapest: bool) -> None:
    """Puts the weight (rows, d_in) on the grid, but for the elements that are `free`, which only take up errors.

    Row by row, the inverse of what is left of H is `inverse` less the sum of `v v^T` over the steps so far, of which only the diagonal
    and the columns that are asked for are ever computed.
    """
    n, d_in = weight.shape
    row = torch.arange(n)
    width = grid.scale.double().abs().repeat_interleave(d_in // grid.scale.shape[1], 1)
    done, steps = torch.zeros_like(free), int((~free).sum(1).max())
    vectors = torch.zeros(n, steps, d_in, dtype=weight.dtype)
    diagonal = inverse.diagonal().repeat(n, 1)
    for step in range(steps):
        error = weight - decode(fmt, nearest(weight, fmt, grid)).double()
        rank = _rank(error, diagonal, width) if cheapest else torch.arange(d_in, dtype=weight.dtype).repeat(n, 1)
        least, chosen = rank.masked_fill(done | free, torch.inf).min(1)
        before = vectors[:, :step]
        column = inverse[chosen] - (before[row, :, chosen].unsqueeze(1) @ before).squeeze(1)
        column = column.masked_fill(done | least.isinf()[:, None], 0.0)
        pivot = column[row, chosen]
        pivot = torch.where(pivot > 0, pivot, torch.ones_like(pivot))
        target = weight[row, chosen] - error[row, chosen]
        weight -= (error[row, chosen] / pivot)[:, None] * column
        weight[row, chosen] = torch.where(least.isinf(), weight[row, chosen], target)
        vectors[:, step] = column / pivot.sqrt()[:, None]
        diagonal -= vectors[:, step].square()
        done[row, chosen] |= least.isfinite()


def _rank(error: Tensor, diagonal: Tensor, width: Tensor) -> Tensor:
    """What to round next is least: outside the range (negative, the farther the less), else by the cost of rounding it now."""
    far = error.abs() / width
    return torch.where(far > 0.5 + _ROUNDING, -far, error.square() / diagonal)
