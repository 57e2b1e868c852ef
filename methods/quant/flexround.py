"""Learner `flexround`: weights round after a division that is learned for each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.learn import Parameters
from methods.quant.grid import Grid, grouped, safe_scale
from methods.quant.learned import Place
from methods.quant.task import Task


class Divided:
    """`s1 * round(W / (s1 * S2 * s3))`: s1 a group's scale, S2 a divisor for every weight and s3 for every row, both 1 at first.

    FlexRound (Lee 2023), section 3. All three are learned as logarithms, which keeps them positive and is the same to first order. A float
    offset takes no part in the division, so that large weights move furthest with it as without.
    """

    soft = False

    def __init__(self, task: Task, grid: Grid) -> None:
        self._task, self._grid = task, grid

    def initial(self) -> Parameters:
        """Logarithms: scale (d_out, n_groups) relative to the fitted one, weight (d_out, n_groups, group), row (d_out, 1, 1)."""
        groups = grouped(self._task.weight, self._task.fmt)
        rows, n_groups, _ = groups.shape
        return {"scale": torch.zeros(rows, n_groups), "weight": torch.zeros_like(groups), "row": torch.zeros(rows, 1, 1)}

    def place(self, parameters: Parameters, weight: Tensor) -> Place:
        """The grid has the learned scale, in its stored dtype."""
        grid = Grid(safe_scale(self._grid.scale.float() * parameters["scale"].exp()), self._grid.offset)
        offset = 0.0 if grid.offset is None else grid.offset.float()[..., None]
        divided = grouped(weight, self._task.fmt) / (parameters["weight"] + parameters["row"]).exp()
        return Place((divided - offset) / grid.scale.float()[..., None], grid)

    def penalty(self, parameters: Parameters, done: float) -> Tensor | None:
        """None."""
        return None
