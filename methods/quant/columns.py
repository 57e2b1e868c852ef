"""Partition `loud-columns`: the inputs of large magnitude leave the grid, with their columns of the weight."""

from __future__ import annotations

from torch import Tensor

from methods.method import Need
from methods.quant.outliers import at_most, largest
from methods.quant.task import Task


def by_loud_columns(task: Task) -> Tensor:
    """LLM.int8(); knobs `threshold` and `columns`, the largest share."""
    kept = loud_columns(task.statistic(Need.ABS_MAX), task.number("threshold"), task.number("columns"))
    return kept.repeat(len(task.weight), 1)


def loud_columns(abs_max: Tensor, threshold: float, share: float) -> Tensor:
    """The inputs whose largest magnitude reaches the threshold, at most `share` of them, the largest first; abs_max: (d_in,) -> bool.

    LLM.int8() (Dettmers 2022), section 3.2. Deviation: which inputs they are is decided by calibration, not in every call.
    """
    return (abs_max >= threshold) & largest(abs_max, at_most(share, len(abs_max)))
