"""Elements that leave the grid: how the few are chosen, and what a fitter sees of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import decode
from methods.quant.grid import Grid, grouped
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.task import Task


def at_most(share: float, count: int) -> int:
    """How many of `count` a share allows; a share that is a whole number of them is not cut by rounding."""
    return int(share * count + 1e-9)


def largest(score: Tensor, n: int) -> Tensor:
    """Where the n largest values of a tensor stand; score: any shape -> bool of that shape, n of them True."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.reshape(-1).topk(n, sorted=False).indices] = True
    return mask.view(score.shape)


def cast(weight: Tensor, fmt: Format) -> Tensor:
    """What a weight (d_out, d_in) becomes when it is rounded to nearest, on the grid that spans its groups' ranges."""
    return decode(fmt, nearest(weight, fmt, minmax(weight, fmt)))


def of_the_rest(fit: Callable[[Task], Grid]) -> Callable[[Task], Grid]:
    """A fitter that pays no heed to kept elements, whatever it does with the weight: they have values that move no grid."""

    def fit_rest(task: Task) -> Grid:
        return fit(task if task.kept is None else replace(task, weight=filled(task.weight, task.kept, task.fmt)))

    return fit_rest


def filled(weight: Tensor, kept: Tensor, fmt: Format) -> Tensor:
    """The weight with each kept element at zero, or at the nearest value to it that the others of its group span.

    weight: (d_out, d_in); kept: (d_out, d_in) bool. So ranges are those of the others exactly, and an error that is summed over a group
    counts the kept elements for (almost) nothing: zero is on every symmetric grid. A group that is kept as a whole becomes zero.
    """
    groups = grouped(weight, fmt)
    mask = kept.reshape(groups.shape)
    low = groups.masked_fill(mask, torch.inf).amin(-1, keepdim=True)
    high = groups.masked_fill(mask, -torch.inf).amax(-1, keepdim=True)
    whole = mask.all(-1, keepdim=True)
    fill = torch.zeros_like(low).clamp(low.masked_fill(whole, 0.0), high.masked_fill(whole, 0.0))
    return torch.where(mask, fill, groups).reshape(weight.shape)
