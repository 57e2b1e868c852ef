"""Learner `lkd`: the weights themselves, rounded to nearest at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.learn import Parameters
from methods.quant.grid import Grid
from methods.quant.learned import Place, position
from methods.quant.task import Task


class Latent:
    """Rounding to nearest of a latent weight, with the gradient passed straight through, on the grid fitted to the weight.

    ZeroQuant (Yao 2022), layer-by-layer knowledge distillation. What is learned is the latent weight's distance from the weight, in steps
    of the grid, so that one learning rate serves every layer and group. Deviation: the grid stays.
    """

    soft = False

    def __init__(self, task: Task, grid: Grid) -> None:
        self._task, self._grid = task, grid

    def initial(self) -> Parameters:
        """moved: (d_out, n_groups, group)."""
        return {"moved": torch.zeros_like(position(self._task.weight, self._task.fmt, self._grid))}

    def place(self, parameters: Parameters, weight: Tensor) -> Place:
        """The grid is the fitted one."""
        return Place(position(weight, self._task.fmt, self._grid) + parameters["moved"], self._grid)

    def penalty(self, parameters: Parameters, done: float) -> Tensor | None:
        """None."""
        return None
