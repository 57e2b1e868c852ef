"""The rounders as parts of a recipe: each gives its function the statistics and knobs that it reads."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from methods.quant import first
from methods.quant.feedback import RoundColumn, auto_damping, column_rounder, feedback
from methods.quant.greedy import refine
from methods.quant.grid import Grid
from methods.quant.ldlq import ldlq
from methods.quant.nearest import nearest
from methods.quant.obq import obq
from methods.quant.stochastic import stochastic
from methods.quant.task import Rounded, Task


def damping(task: Task) -> float:
    """The damping that a task's knob asks for, as a part of the mean diagonal of `first.hessian`."""
    chosen = task.knobs["damping"]
    part = auto_damping(task.stats.n_tokens, task.weight.shape[1]) if chosen == "auto" else float(chosen)
    return part * first.others(task)


def by_nearest(task: Task, grid: Grid) -> Rounded:
    """The nearest value of the grid."""
    return Rounded(nearest(task.weight, task.fmt, grid)["codes"])


def by_feedback(task: Task, grid: Grid) -> Rounded:
    """GPTQ; knobs `damping`, `act_order`, `first`."""
    act_order = bool(task.knobs["act_order"])
    return feedback(task.weight, first.hessian(task), _columns(task, grid), damping(task), act_order=act_order, kept=task.kept)


def by_drift(task: Task, grid: Grid) -> Rounded:
    """GPTAQ; knobs `damping`, `act_order`, `first`, and `alpha`, the part of the drift that is made up for."""
    hessian, drift = first.hessian(task), task.number("alpha") * first.drift(task)
    act_order = bool(task.knobs["act_order"])
    return feedback(task.weight, hessian, _columns(task, grid), damping(task), act_order=act_order, kept=task.kept, drift=drift)


def by_ldlq(task: Task, grid: Grid) -> Rounded:
    """LDLQ; knobs `damping`, `first` and `order`: last-first, which is also where there is no such knob, or first-last."""
    order = torch.arange(task.weight.shape[1])
    order = order.flip(0) if task.knobs.get("order", "last-first") == "last-first" else order
    return ldlq(task.weight, first.hessian(task), _columns(task, grid), damping(task), order, kept=task.kept)


def by_obq(task: Task, grid: Grid) -> Rounded:
    """OBQ; knobs `damping`, `first` and `order`: cheapest or first-last."""
    cheapest, hessian = task.knobs["order"] == "cheapest", first.hessian(task)
    return obq(task.weight, hessian, task.fmt, grid, damping(task), cheapest=cheapest, kept=task.kept)


def by_chance(task: Task, grid: Grid) -> Rounded:
    """Stochastic rounding; knobs `noise` and `seed`, from which every layer draws numbers of its own."""
    generator = torch.Generator().manual_seed(int(task.knobs["seed"]) * 2**32 + zlib.crc32(task.name.encode()))
    return Rounded(stochastic(task.weight, task.fmt, grid, task.number("noise"), generator))


def refined(rounder: Callable[[Task, Grid], Rounded]) -> Callable[[Task, Grid], Rounded]:
    """A rounder with greedy passes after it; knobs `damping`, `first` and `passes`, beside its own."""
    return lambda task, grid: refine(task, grid, rounder(task, grid), damping(task), int(task.knobs["passes"]))


def _columns(task: Task, grid: Grid) -> RoundColumn:
    return column_rounder(task.fmt, grid, task.weight.shape[1])
