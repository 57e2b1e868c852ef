"""Partition `leave-one-out`, rounder `feedback-outliers`: elements that spoil their group's grid, or round badly in the end, leave it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.sides import SIDE_DTYPE
from methods.quant import first
from methods.quant.feedback import column_rounder, feedback, inverse_factor, sweep_order
from methods.quant.grid import Grid, grouped
from methods.quant.outliers import at_most, cast, filled, largest
from methods.quant.rounders import damping
from methods.quant.task import Rounded, Task


def by_leave_one_out(task: Task) -> Tensor:
    """The elements (d_out, d_in) bool whose gain exceeds the knob `threshold`, at most the share `outliers`, the largest first.

    The threshold counts in `mean_j(var(W_j) / [H^-1]_jj)`, a typical element's loss where it is not stored at all.
    Scales and offsets are not yet rounded to what groups of other rows leave them.
    SpQR (Dettmers 2023), section 4. Deviations: elements are chosen once, before the sweep, from the weights as they are; losses count
    with the diagonal of H^-1 instead of its factor's, which depends on the order of the columns; the number is bounded.
    """
    factor = inverse_factor(first.hessian(task), damping(task))
    loss = factor.square().sum(0).reciprocal().to(task.weight.dtype)
    gain = gains(task.weight, loss, first_level(task.fmt))
    unit = (task.weight.var(0, correction=0) * loss).mean()
    return (gain > task.number("threshold") * unit) & largest(gain, at_most(task.number("outliers"), gain.numel()))


def by_outliers(task: Task, grid: Grid) -> Rounded:
    """GPTQ in which an element also leaves the grid for the loss that its rounding turns out to have, when its column's turn comes.

    The loss is `error**2 / U_jj**2`, U of `inverse_factor` in the order of the sweep, and the threshold counts in the mean over columns of
    `var(W_j) / U_jj**2`. Knobs: `threshold`, `outliers`, the share of all that leave the grid, before and during the sweep, `damping`,
    `act_order` and `first`. SpQR (Dettmers 2023), algorithm 1.
    """
    hessian, act_order = first.hessian(task), bool(task.knobs["act_order"])
    kept = torch.zeros_like(task.weight, dtype=torch.bool) if task.kept is None else task.kept.clone()
    loss = sweep_loss(hessian, sweep_order(hessian, act_order, kept), damping(task)).to(task.weight.dtype)
    limit = task.number("threshold") * float((task.weight.var(0, correction=0) * loss).mean())
    inner = column_rounder(task.fmt, grid, task.weight.shape[1])
    places = at_most(task.number("outliers"), kept.numel()) - int(kept.sum())

    def round_column(values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        nonlocal places
        code, value = inner(values, column)
        lost = ((values - value).square() * loss[column]).masked_fill(kept[:, column], 0.0)
        over = lost > limit
        count = min(int(over.sum()), places)
        if not count:
            return code, value
        over &= largest(lost, count)
        places -= count
        kept[:, column] |= over
        return code, torch.where(over, values.to(SIDE_DTYPE).to(values.dtype), value)

    before = kept.clone()
    rounded = feedback(task.weight, hessian, round_column, damping(task), act_order=act_order, kept=before)
    return replace(rounded, kept=kept)


def first_level(fmt: Format) -> Format:
    """The format with the scales of each group as they are: where they are stored above the least of several rows, in bf16 instead."""
    return replace(fmt, codec="bf16") if fmt.scales.least else fmt


def sweep_loss(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """1 / U_jj**2 (d_in,) fp64: what a squared error of column j costs while the columns after it in `order` make up for it."""
    pivots = inverse_factor(hessian[order][:, order], damping).diagonal()
    return torch.empty_like(pivots).index_copy_(0, order, pivots.square().reciprocal())


def gains(weight: Tensor, loss: Tensor, fmt: Format) -> Tensor:
    """By how much `sum(loss * error**2)` of its group falls where an element leaves the grid; weight: (d_out, d_in); loss: (d_in,).

    -> (d_out, d_in). The grid of a group spans its range, which its least and largest element carry: without any other one it is as it
    was, and the gain is the element's own loss.
    """
    losses = _losses(weight, cast(weight, fmt), loss)
    whole, gain = grouped(losses, fmt).sum(-1), grouped(losses, fmt).clone()
    groups = grouped(weight, fmt)
    for extreme in (groups.argmin(-1, keepdim=True), groups.argmax(-1, keepdim=True)):
        left_out = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, extreme, True).view(weight.shape)
        others = _losses(weight, cast(filled(weight, left_out, fmt), fmt), loss).masked_fill(left_out, 0.0)
        gain.scatter_(-1, extreme, (whole - grouped(others, fmt).sum(-1))[..., None])
    return gain.view(weight.shape)


def _losses(weight: Tensor, rounded: Tensor, loss: Tensor) -> Tensor:
    return (weight - rounded).square() * loss
