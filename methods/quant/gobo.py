"""GOBO: weights far out in the layer's Gaussian leave the grid; the rest share one small codebook."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.kmeans import lloyd
from methods.quant.grid import Grid
from methods.quant.lut import even_levels, lut_grid
from methods.quant.outliers import at_most, largest
from methods.quant.task import Task

LOG_DENSITY = -4.0


def by_density(task: Task) -> Tensor:
    """The partition; knob `outliers`, the largest share of the elements."""
    return unlikely(task.weight, task.number("outliers"))


def by_gobo(task: Task) -> Grid:
    """The fitter: one set of levels for all elements that are not kept; knob `iterations`, where 0 leaves them evenly spaced."""
    iterations = int(task.number("iterations"))
    if not iterations:
        return even_levels(task.weight, task.fmt)
    rest = task.weight if task.kept is None else task.weight[~task.kept]
    levels = gobo(rest.flatten(), task.fmt.levels, iterations)
    return lut_grid(task.fmt, len(task.weight), levels.view(1, 1, -1))


def unlikely(weight: Tensor, share: float) -> Tensor:
    """The weights whose log density under the layer's own Gaussian is below -4, at most `share` of them, the furthest out first.

    weight: (d_out, d_in) -> bool. The density has the unit of 1 / weight, so that wider layers have more of them.
    GOBO (Zadeh 2020), section 4.
    """
    deviation = weight.double() - weight.double().mean()
    variance = deviation.square().mean()
    distance = deviation.square()
    density = -distance / (2 * variance) - (2 * math.pi * variance).log() / 2
    return (density < LOG_DENSITY) & largest(distance, at_most(share, weight.numel()))


def gobo(values: Tensor, n_levels: int, iterations: int) -> Tensor:
    """Levels (n_levels,) fp64, ascending, for values (n,).

    From the means of bins of equal population, Lloyd's steps as long as the sum of absolute errors falls, `iterations` at most.
    GOBO (Zadeh 2020), section 4.
    """
    values = values.double().sort().values
    levels = torch.stack([part.mean() if len(part) else values.mean() for part in values.tensor_split(n_levels)])
    least = _absolute_error(values, levels)
    for _, moved in zip(range(iterations), lloyd(values[None], torch.ones_like(values)[None], levels[None]), strict=False):
        error = _absolute_error(values, moved[0])
        if error >= least:
            break
        least, levels = error, moved[0]
    return levels


def _absolute_error(values: Tensor, levels: Tensor) -> float:
    nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    return float((values - levels[nearest]).abs().sum())
