"""Learner `adaround`: each weight rounds down or up, whichever the output likes better."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from methods.learn import Parameters, Training, constant
from methods.quant.grid import Grid
from methods.quant.learned import Place, adam, position
from methods.quant.task import Knobs, Task

STRETCH = 1.2
"""The sigmoid is stretched to [-0.1, 1.1] and cut to [0, 1], so that rounding is reached at finite parameters."""
WARM_UP = 0.2
"""Part of the steps without the penalty."""
BETA = 20.0, 2.0
"""The penalty's exponent at first and in the end."""


def steady(knobs: Knobs) -> Training:
    """Adam at one rate to the end, for the penalty acts most in the last steps."""
    return replace(adam(knobs), schedule=constant)


class Rectified:
    """A weight of `t` steps takes floor(t) + h(V), with h = clip(1.2 sigmoid(V) - 0.1, 0, 1) and V such that h is the fraction of t.

    AdaRound (Nagel 2020), eqs. 23-24. The penalty is the mean of 1 - |2h - 1|**beta, beta falling from 20 to 2 in a line. Deviation: the
    loss is relative to that of rounding to nearest, so that one weight of the penalty serves every layer.
    """

    soft = True

    def __init__(self, task: Task, grid: Grid) -> None:
        self._task, self._grid = task, grid
        at = position(task.weight, task.fmt, grid)
        self._start = ((at - at.floor() + (STRETCH - 1) / 2) / STRETCH).logit()

    def initial(self) -> Parameters:
        """V, (d_out, n_groups, group)."""
        return {"logit": self._start}

    def place(self, parameters: Parameters, weight: Tensor) -> Place:
        """Within rounding error of floor(t) + h; exactly t where V never moved, so that no weight changes its code by chance."""
        moved = _rectified(parameters["logit"]) - _rectified(self._start)
        return Place(position(weight, self._task.fmt, self._grid) + moved, self._grid)

    def penalty(self, parameters: Parameters, done: float) -> Tensor | None:
        """None while it warms up."""
        if done < WARM_UP:
            return None
        part = (done - WARM_UP) / (1 - WARM_UP)
        beta = BETA[0] + (BETA[1] - BETA[0]) * part
        # |2h - 1|**beta has no finite slope at 0 for beta < 2 only, which is never reached.
        return self._task.number("penalty") * (1 - (2 * _rectified(parameters["logit"]) - 1).abs().pow(beta)).mean()


def _rectified(logit: Tensor) -> Tensor:
    """h in [0, 1]."""
    return (STRETCH * torch.sigmoid(logit) - (STRETCH - 1) / 2).clamp(0, 1)
