"""Learner `omniquant`: clipping of each group's range, and a scale that is folded into the norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from methods.learn import Parameters, Training
from methods.method import Need, SiteView, Stats
from methods.quant.grid import Grid
from methods.quant.learned import Place, adam, clipped_grid, position
from methods.quant.smooth import smooth
from methods.quant.task import Knobs, Task, statistic


def adam_scaled(knobs: Knobs) -> Training:
    """Adam with a rate for the clipping and one for the scale."""
    rates = {"low": float(knobs["rate"]), "high": float(knobs["rate"]), "scale": float(knobs["scale_rate"])}
    return replace(adam(knobs), rate=rates)


class Clipped:
    """Rounding to nearest on the grid that spans sigmoid(b) * min and sigmoid(g) * max of each group.

    OmniQuant (Shao 2023), eq. 2: learnable weight clipping.
    """

    soft = False

    def __init__(self, task: Task, grid: Grid) -> None:
        self._task, self._shape = task, grid.scale.shape

    def initial(self) -> Parameters:
        """low, high: (d_out, n_groups), before the sigmoid."""
        start = clip_start(self._task)
        return {"low": torch.full(self._shape, start), "high": torch.full(self._shape, start)}

    def place(self, parameters: Parameters, weight: Tensor) -> Place:
        """The grid follows the weight's range."""
        low, high = (torch.sigmoid(parameters[name]) for name in ("low", "high"))
        grid = clipped_grid(weight, self._task.fmt, low, high)
        return Place(position(weight, self._task.fmt, grid), grid)

    def penalty(self, parameters: Parameters, done: float) -> Tensor | None:
        """None."""
        return None


def clip_start(task: Task) -> float:
    """The logit to start from. Automatic: 4, as published, by which a range loses 1.8 %, or so much that it loses half a step at most."""
    asked = task.knobs["clip_init"]
    return max(4.0, math.log(2 * task.fmt.levels)) if asked == "auto" else float(asked)


def equivalent_scale(view: SiteView, stats: Mapping[str, Stats], knobs: Knobs) -> Tensor | None:
    """Learnable equivalent transformation (eq. 3), at first SmoothQuant's scale for alpha = 0.5; None where the site has no norm.

    Deviation: no shift, which needs biases, and no scale between a linear and another one.
    """
    if not knobs["transform"] or view.norm is None:
        return None
    name = next(iter(view.weights))
    return smooth(view.weights, statistic(stats[name], name, Need.ABS_MAX), 0.5)
