"""The first token of a sequence counts more where keys and values are computed, for every later token reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.method import Need
from methods.model.structure import Site
from methods.quant.task import Task

READ_BY_ALL = frozenset({"k", "v", "qkv"})
"""Kinds of linears whose outputs other tokens read."""


def hessian(task: Task) -> Tensor:
    """The second moment (d_in, d_in) of the inputs, first tokens counted as `first_weight` says."""
    return _counted(task, task.statistic(Need.HESSIAN), task.statistic(Need.FIRST), task.statistic(Need.FIRST))


def drift(task: Task) -> Tensor:
    """`(X_dense - X)^T X / n` (d_in, d_in), first tokens counted as `first_weight` says."""
    return _counted(task, task.statistic(Need.DRIFT), task.statistic(Need.FIRST_DRIFT), task.statistic(Need.FIRST))


def first_weight(task: Task) -> float:
    """How often a first token counts at the site of a task; knob `first`: a number, or auto, the number of tokens of a sequence.

    In a language model most heads spend most of their attention on the first token (Xiao 2023, attention sinks): its key and value enter
    the output of every token, so that an error of theirs is made as often as the sequence has tokens. An ordinary token is read by few.
    Measured by gradients of the KL divergence, an error of a first token's keys and values weighs 100 to 4,000 times one of another
    token's in most blocks of a model of 135M parameters; errors of its other outputs weigh no more than those of other tokens, which is
    why other sites count it once. As the first tokens of all sequences are nearly alike there, they cost the others little.
    """
    if not reads_first(task.view.site):
        return 1.0
    if task.knobs.get("first", 1.0) != "auto":
        return float(task.knobs.get("first", 1.0))
    return task.stats.n_tokens / max(len(task.statistic(Need.FIRST)), 1)


def reads_first(site: Site) -> bool:
    """Whether a site computes keys or values of one sequence's tokens."""
    return any(layer.kind in READ_BY_ALL for layer in site.layers)


def _counted(task: Task, moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`moment + (weight - 1) * left^T right / n`; the same tensor where the weight is 1 or no first token is known."""
    extra = (first_weight(task) - 1) / max(task.stats.n_tokens, 1)
    return torch.addmm(moment, left.T, right, alpha=extra) if extra and len(right) else moment
