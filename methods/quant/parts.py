"""The parts by slot and name: each line fits a pure function in a file of its own to the slot's signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.sides import columns, elements
from methods.method import Need, SiteView, Stats
from methods.quant.awq import awq
from methods.quant.feedback import auto_damping, feedback, stacked_rounder
from methods.quant.fold import fold
from methods.quant.grid import Grid
from methods.quant.hqq import hqq
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest
from methods.quant.smooth import smooth
from methods.quant.task import Change, Knobs, Rounded, Task, statistic

Transform = Callable[[SiteView, Mapping[str, Stats], Format, Knobs], Change]
Partition = Callable[[Task], Tensor]
"""-> (d_out, d_in) bool, the elements that leave the grid."""
Fitter = Callable[[Task], Grid]
Rounder = Callable[[Task, Grid], Rounded]
Compensator = Callable[[Task, Tensor], Mapping[str, Tensor]]
"""(task, what the payload decodes to so far (d_out, d_in)) -> further parts of the payload."""


def _smooth(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    norm, name = view.fold_into, next(iter(view.weights))
    folded = fold(norm, smooth(view.weights, statistic(stats[name], name, Need.ABS_MAX), float(knobs["alpha"])))
    return Change(folded.ratio, folded.tensors)


def _awq(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    norm, name = view.fold_into, next(iter(view.weights))
    abs_mean, sample = (statistic(stats[name], name, need) for need in (Need.ABS_MEAN, Need.SAMPLE))
    folded = fold(norm, awq(view.weights, norm, abs_mean, sample, fmt))
    return Change(folded.ratio, folded.tensors)


def _feedback(task: Task, grid: Grid) -> Rounded:
    rounder = stacked_rounder([(task.fmt, grid)], task.weight.shape[1])
    hessian, act_order = task.statistic(Need.HESSIAN), bool(task.knobs["act_order"])
    return feedback(task.weight, hessian, rounder, damping(task), act_order=act_order, kept=task.kept)


def damping(task: Task) -> float:
    """The damping that a task's knob asks for."""
    if task.knobs["damping"] == "auto":
        return auto_damping(task.stats.n_tokens, task.weight.shape[1])
    return task.number("damping")


TRANSFORMS: Mapping[str, Transform] = {"smooth": _smooth, "awq": _awq}

PARTITIONS: Mapping[str, Partition] = {}

FITTERS: Mapping[str, Fitter] = {
    "minmax": lambda task: minmax(task.weight, task.fmt),
    "mse": lambda task: mse(task.weight, task.fmt),
    "hqq": lambda task: hqq(task.weight, task.fmt, int(task.knobs["iterations"])),
}

ROUNDERS: Mapping[str, Rounder] = {
    "nearest": lambda task, grid: Rounded(nearest(task.weight, task.fmt, grid)["codes"]),
    "feedback": _feedback,
}

COMPENSATORS: Mapping[str, Compensator] = {}


def side_of(kept: Tensor, values: Tensor) -> dict[str, Tensor]:
    """The payload parts of kept elements: whole columns where the mask is made of them, sparse rows otherwise."""
    whole = kept.all(0)
    if torch.equal(whole.expand_as(kept), kept):
        return columns(values, whole.nonzero()[:, 0])
    return elements(values, kept)
