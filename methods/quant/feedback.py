"""Rounder `feedback`: rounds column by column, and the columns still to come make up for each column's error."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.levels import Ladder
from methods.formats.numerics import ladder_of
from methods.formats.sides import SIDE_DTYPE
from methods.quant.grid import Grid
from methods.quant.task import Rounded

logger = logging.getLogger(__name__)

RoundColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""values (d_out,), column -> (codes, what the codes decode to), both (d_out,) in the dtype of the values."""

BLOCK = 128
_TRIES = 12


def feedback(
    weight: Tensor,
    hessian: Tensor,
    round_column: RoundColumn,
    damping: float,
    *,
    act_order: bool = True,
    block: int = BLOCK,
    kept: Tensor | None = None,
    drift: Tensor | None = None,
) -> Rounded:
    """Codes (d_out, d_in) uint8 that keep `trace(E H E^T)` of the error E small, with H = hessian + damping * mean(diag) * I.

    weight: (d_out, d_in) fp32 or fp64, whose dtype the sweep computes in; hessian: (d_in, d_in), `X^T X / n`.
    act_order: columns of large diag(H) first. A column's grid must be known before the sweep (static groups), so that `round_column`
    depends on nothing that is rounded. Inputs that were never seen carry no feedback: their columns round to nearest.
    kept: (d_out, d_in) bool, elements off the grid. Each takes up the errors before its turn and then keeps its value, as bf16 stores
    it, whose error goes on like any other; `values` of the result holds it, and their codes mean nothing. Columns kept whole come last.
    drift: (d_in, d_in), `(X_dense - X)^T X / n`: what the inputs have lost is made up for, too (`pull`).
    GPTQ (Frantar 2023), algorithm 1, with lazy updates of `block` columns. Deviation: dead columns are rounded, not zeroed.
    """
    d_out, d_in = weight.shape
    order = sweep_order(hessian, act_order, kept)
    factor = inverse_factor(hessian[order][:, order], damping)
    drawn = None if drift is None else pull(drift[order][:, order], factor).to(weight.dtype)
    upper = factor.to(weight.dtype)
    del factor
    pivots = upper.diagonal().tolist()
    columns = weight.T[order]
    held = None if kept is None else kept.T[order]
    values = None if held is None else torch.empty_like(columns)
    codes = torch.empty_like(columns)
    errors = torch.empty(min(block, d_in), d_out, dtype=weight.dtype)
    places = order.tolist()
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        for i in range(start, stop):
            column = columns[i]
            code, value = round_column(column, places[i])
            codes[i] = code
            if held is not None and values is not None:
                value = values[i] = torch.where(held[i], column.to(SIDE_DTYPE).to(column.dtype), value)
            error = torch.sub(column, value, out=errors[i - start]).div_(pivots[i])
            columns[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            if drawn is not None:
                columns[i + 1 : stop].addr_(drawn[i, i + 1 : stop], column)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
        if drawn is not None:
            columns[stop:].addmm_(drawn[start:stop, stop:].T, columns[start:stop])
    return Rounded(_placed(codes.to(torch.uint8), order), None if values is None else _placed(values.float(), order))


def sweep_order(hessian: Tensor, act_order: bool, kept: Tensor | None) -> Tensor:
    """The columns (d_in,) in the order of the sweep."""
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    return order if kept is None else order[kept.all(0)[order].to(torch.uint8).argsort(stable=True)]


def _placed(columns: Tensor, order: Tensor) -> Tensor:
    """(d_in, d_out) in the order of the sweep -> (d_out, d_in) in the order of the weight."""
    result = torch.empty_like(columns)
    result[order] = columns
    return result.T.contiguous()


def pull(drift: Tensor, factor: Tensor) -> Tensor:
    """P (d_in, d_in), strictly upper triangular, fp64: column q of value w adds `w * P[q, j]` to the columns j > q still to come.

    drift: (d_in, d_in), `dX^T X / n` with dX = X_dense - X; factor: `inverse_factor` U of H, both in the order of the sweep.
    Row q is `dX_q X_F^T (H_FF)^-1` for the columns F after q: what F must add so that their part of the output is that which `w dX_q`
    had. With `(H_FF)^-1 = U_FF^T U_FF`, all rows at once are the strict upper triangle of `drift U^T`, times U.
    GPTAQ (Li 2025), the parallel form of its residual term, of which `alpha` times is taken by whoever scales `drift`.
    """
    return (drift.double() @ factor.T).triu_(1) @ factor


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U in fp64 with `U^T U = (hessian + damping * mean(diag) * I)^-1`; hessian: (d_in, d_in).

    The inverse of `upper_factor`: one factorisation, no inverse of the matrix. Damping grows as it says there.
    """
    upper = upper_factor(hessian, damping)
    # Stored by columns, as LAPACK solves in place: every copy of a wide Hessian in fp64 counts.
    identity = torch.eye(len(upper), dtype=upper.dtype).T
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True, out=identity)
    return inverse


def upper_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular R in fp64 with `R R^T = hessian + damping * mean(diag) * I`; hessian: (d_in, d_in).

    With J the reversal of order, J H J = L L^T gives H = R R^T for the upper R = J L J.
    Where the matrix is not positive definite in fp64, damping grows tenfold until it is, with one warning.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("feedback: the Hessian has infinite or NaN entries; check the calibration activations")
    mean = hessian.diagonal().double().mean()
    mean = mean if mean > 0 else torch.ones_like(mean)
    for tries in range(_TRIES):
        used = max(damping, 1e-6) * 10**tries if tries else damping
        reverse = hessian.flip(0, 1).double()
        reverse.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        del reverse
        if not failed:
            if tries:
                logger.warning(
                    "feedback: Hessian of %d inputs needed damping %.3g instead of %.3g", len(hessian), used, damping
                )
            upper: Tensor = lower.flip(0, 1)
            return upper
    raise ValueError(
        f"feedback: the Hessian is not positive semi-definite even with damping {used:.3g}; it is not X^T X of any inputs"
    )


def auto_damping(n_tokens: int, d_in: int) -> float:
    """Damping for a Hessian of `n_tokens` inputs: clip(4 * d_in / n_tokens, 0.01, 10), a part of the mean of its diagonal.

    Few tokens estimate a wide Hessian badly, and feedback then fits their noise and loses to plain rounding on other text. The noise
    falls with tokens an input, and so does the damping that was best on text of another kind: measured on 12 sites of a model of
    135M parameters at 1.3 to 57 tokens an input, where the customary 0.01 was up to 2.4 times worse than plain rounding.
    """
    return min(10.0, max(0.01, 4 * d_in / max(n_tokens, 1)))


def column_rounder(fmt: Format, grid: Grid, d_in: int, dtype: torch.dtype = torch.float32) -> RoundColumn:
    """Rounds a column to nearest on its group's grid, with the arithmetic of `encode` and `decode`."""
    return stacked_rounder([(fmt, grid)], d_in, dtype)


def stacked_rounder(stack: Sequence[tuple[Format, Grid]], d_in: int, dtype: torch.dtype = torch.float32) -> RoundColumn:
    """Rounds columns of several weights, one below the other, each part on its own format's grid.

    Rows never meet in the sweep, so that one sweep over the stack gives every part the codes it would get alone.
    """
    if all(fmt.element == "int" for fmt, _ in stack):
        return _integer_rounder(stack, d_in, dtype)
    rounders = [(_integer_rounder if part[0].element == "int" else _level_rounder)([part], d_in, dtype) for part in stack]
    rows = [len(grid.scale) for _, grid in stack]

    def round_column(values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        pairs = [rounder(part, column) for rounder, part in zip(rounders, torch.split(values, rows), strict=True)]
        return torch.cat([codes for codes, _ in pairs]), torch.cat([decoded for _, decoded in pairs])

    return round_column


def _integer_rounder(stack: Sequence[tuple[Format, Grid]], d_in: int, dtype: torch.dtype) -> RoundColumn:
    finest = math.gcd(*(fmt.group_size(d_in) for fmt, _ in stack))
    scales = torch.cat([_by_column(grid.scale, d_in // finest, dtype) for _, grid in stack], 1).unbind(0)
    offsets = None
    if any(grid.offset is not None for _, grid in stack):
        found = [grid.offset if grid.offset is not None else torch.zeros_like(grid.scale) for _, grid in stack]
        offsets = torch.cat([_by_column(offset, d_in // finest, dtype) for offset in found], 1).unbind(0)
    shifts = [fmt.levels // 2 if fmt.symmetric else 0 for fmt, _ in stack]
    rows = torch.tensor([len(grid.scale) for _, grid in stack])
    shift = torch.tensor(shifts, dtype=dtype).repeat_interleave(rows)
    lowest = torch.tensor([fmt.code_range[0] for fmt, _ in stack], dtype=dtype).repeat_interleave(rows) - shift
    highest = torch.tensor([fmt.code_range[1] for fmt, _ in stack], dtype=dtype).repeat_interleave(rows) - shift

    def round_column(values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        scale = scales[column // finest]
        centred = values if offsets is None else values - offsets[column // finest]
        steps = (centred / scale).round_().clamp_(lowest, highest)
        decoded = steps * scale
        return steps + shift, decoded if offsets is None else decoded.add_(offsets[column // finest])

    return round_column


def _level_rounder(stack: Sequence[tuple[Format, Grid]], d_in: int, dtype: torch.dtype) -> RoundColumn:
    ((fmt, grid),) = stack
    size = fmt.group_size(d_in)
    scales = _by_column(grid.scale, d_in // size, dtype).unbind(0)
    offsets = None if grid.offset is None else _by_column(grid.offset, d_in // size, dtype).unbind(0)
    rungs = ladder_of(fmt, grid.levels)
    assert rungs is not None
    shared = rungs.values.dim() == 1

    def round_column(values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        group = column // size
        steps = (values if offsets is None else values - offsets[group]) / scales[group]
        own = rungs if shared else Ladder(rungs.values[:, group], rungs.codes[:, group], rungs.bounds[:, group])
        codes, taken = own.take(own.nearest(steps[:, None]))
        decoded = taken[:, 0].to(dtype) * scales[group]
        return codes[:, 0].to(dtype), decoded if offsets is None else decoded.add_(offsets[group])

    return round_column


def _by_column(per_group: Tensor, n_columns: int, dtype: torch.dtype) -> Tensor:
    """(d_out, n_groups) -> (n_columns, d_out), every group repeated over the columns of the finest one."""
    return per_group.to(dtype).repeat_interleave(n_columns // per_group.shape[1], 1).T.contiguous()
