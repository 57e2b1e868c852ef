"""Learner `signround`: offsets before rounding and the ends of each group's range, by signed gradient descent."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from methods.learn import Parameters, SignSGD, Training
from methods.quant.grid import Grid, grouped
from methods.quant.learned import Place, adam, clipped_grid, position
from methods.quant.task import Knobs, Task

BOUNDS = {"offset": (-0.5, 0.5), "low": (0.0, 1.0), "high": (0.0, 1.0)}


def signed(knobs: Knobs) -> Training:
    """Signed gradient descent; the automatic rate, 1 / steps, is that with which an offset can just reach its bound."""
    rate = 1 / max(1, int(knobs["steps"])) if knobs["rate"] == "auto" else float(knobs["rate"])
    return replace(adam({**knobs, "rate": rate}), optimizer=SignSGD, bounds=BOUNDS)


class Offsets:
    """`round(W / s + V)` with V in [-0.5, 0.5], on the grid that spans beta * min and alpha * max of each group, both in [0, 1].

    SignRound (Cheng 2023), section 3. The fitted grid is not read: it is that of `minmax`, at alpha = beta = 1.
    """

    soft = False

    def __init__(self, task: Task, grid: Grid) -> None:
        self._task, self._shape = task, grid.scale.shape

    def initial(self) -> Parameters:
        """offset V (d_out, n_groups, group); low beta, high alpha (d_out, n_groups)."""
        groups = grouped(self._task.weight, self._task.fmt)
        return {"offset": torch.zeros_like(groups), "low": torch.ones(self._shape), "high": torch.ones(self._shape)}

    def place(self, parameters: Parameters, weight: Tensor) -> Place:
        """The grid follows the weight's range."""
        grid = clipped_grid(weight, self._task.fmt, parameters["low"], parameters["high"])
        return Place(position(weight, self._task.fmt, grid) + parameters["offset"], grid)

    def penalty(self, parameters: Parameters, done: float) -> Tensor | None:
        """None."""
        return None
