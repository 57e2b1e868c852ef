"""Partition `sensitive-columns`: the columns whose rounding would move the layer's output most leave the grid."""

from __future__ import annotations

from torch import Tensor

from methods.quant.first import hessian
from methods.quant.outliers import at_most, cast, largest
from methods.quant.task import Task


def by_sensitive_columns(task: Task) -> Tensor:
    """OWQ; knob `columns`, the share of them. Deviation: it is min-max rounding that they are sensitive to, whatever the fitter."""
    return sensitive_columns(task.weight, cast(task.weight, task.fmt), hessian(task), task.number("columns")).repeat(
        len(task.weight), 1
    )


def sensitive_columns(weight: Tensor, rounded: Tensor, hessian: Tensor, share: float) -> Tensor:
    """The columns of largest `H_jj * ||W_j - Q(W_j)||**2`, `share` of them; weight, rounded: (d_out, d_in); hessian: (d_in, d_in).

    -> (d_in,) bool. OWQ (Lee 2024), eq. 3, with the weights rounded to nearest as Q.
    """
    sensitivity = hessian.diagonal() * (weight - rounded).square().sum(0)
    return largest(sensitivity, at_most(share, len(sensitivity)))
