"""SqueezeLLM: levels of each row by k-means that counts a weight by its sensitivity; the most sensitive and the largest leave the grid."""

from __future__ import annotations

from torch import Tensor

from methods.formats.format import Format
from methods.kmeans import kmeans
from methods.method import Need
from methods.quant.grid import Grid, grouped
from methods.quant.lut import even_levels, lut_grid
from methods.quant.outliers import at_most, largest
from methods.quant.task import Task


def by_sensitivity(task: Task) -> Tensor:
    """The partition; knobs `sensitive` and `large`, shares of the elements."""
    fisher = task.statistic(Need.FISHER)
    return sensitive_or_large(task.weight, fisher, task.number("sensitive"), task.number("large"))


def by_fisher(task: Task) -> Grid:
    """The fitter: levels for every group, over the elements that are not kept; knob `iterations`, where 0 leaves them evenly spaced."""
    fisher = task.statistic(Need.FISHER)
    weights = fisher if task.kept is None else fisher.masked_fill(task.kept, 0.0)
    return fisher_grid(task.weight, weights, task.fmt, int(task.number("iterations")))


def sensitive_or_large(weight: Tensor, fisher: Tensor, sensitive: float, large: float) -> Tensor:
    """The share `sensitive` of largest Fisher information, and the share `large` of largest magnitude; weight, fisher: (d_out, d_in).

    -> (d_out, d_in) bool; what is both counts once. SqueezeLLM (Kim 2023), section 4.2.
    """
    first = largest(fisher, at_most(sensitive, fisher.numel()))
    return first | largest(weight.abs(), at_most(large, weight.numel()))


def fisher_grid(weight: Tensor, fisher: Tensor, fmt: Format, iterations: int) -> Grid:
    """The levels of small `sum(fisher * (weight - level)**2)` in each group; weight, fisher: (d_out, d_in), the mean squared gradient.

    SqueezeLLM (Kim 2023), eq. 3, by k-means.
    """
    if not iterations:
        return even_levels(weight, fmt)
    values, weights = grouped(weight, fmt), grouped(fisher, fmt)
    levels = kmeans(values.flatten(0, 1), weights.flatten(0, 1), fmt.levels, iterations)
    return lut_grid(fmt, len(weight), levels.view(*values.shape[:2], -1))
