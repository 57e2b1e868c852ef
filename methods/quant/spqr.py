"""Partition `leave-one-out`: the elements without which their group's grid would round the others far better leave it."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.feedback import inverse_factor
from methods.quant.first import hessian
from methods.quant.grid import grouped
from methods.quant.outliers import at_most, cast, filled, largest
from methods.quant.rounders import damping
from methods.quant.task import Task


def by_leave_one_out(task: Task) -> Tensor:
    """The elements (d_out, d_in) bool whose gain exceeds the knob `threshold`, at most the share `outliers`, the largest first.

    The threshold counts in `mean_j(var(W_j) / [H^-1]_jj)`, a typical element's loss where it is not stored at all.
    SpQR (Dettmers 2023), section 4. Deviations: elements are chosen once, before the sweep, so that none is added for the error that it
    turns out to have; losses count with the diagonal of H^-1 instead of its factor's, which depends on the order of the columns.
    """
    factor = inverse_factor(hessian(task), damping(task))
    loss = factor.square().sum(0).reciprocal().to(task.weight.dtype)
    gain = gains(task.weight, loss, task.fmt)
    unit = (task.weight.var(0, correction=0) * loss).mean()
    return (gain > task.number("threshold") * unit) & largest(gain, at_most(task.number("outliers"), gain.numel()))


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
