"""What the first tokens of all sequences share counts more where keys and values are computed, for every later token reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.method import Need
from methods.model.structure import Site
from methods.quant.task import Task

READ_BY_ALL = frozenset({"k", "v", "qkv"})
"""Kinds of linears whose outputs other tokens read."""


def hessian(task: Task) -> Tensor:
    """The second moment (d_in, d_in) of the inputs, with what first tokens share counted as `times` says."""
    rows = task.statistic(Need.FIRST)
    return _counted(task, task.statistic(Need.HESSIAN), rows, rows)


def drift(task: Task) -> Tensor:
    """`(X_dense - X)^T X / n` (d_in, d_in), with what first tokens share counted as `times` says."""
    return _counted(task, task.statistic(Need.DRIFT), task.statistic(Need.FIRST_DRIFT), task.statistic(Need.FIRST))


def sample(task: Task) -> Tensor:
    """Sampled inputs (n, d_in) without first tokens, these, and a row of what they share: as large as often they count among n rows.

    A first token counts once, as any other, and what they share `times` as often. The sample alone where the knob `first` is 1.
    """
    rows = task.statistic(Need.SAMPLE)
    if task.knobs.get("first", 1.0) == 1 or not len(first := task.statistic(Need.FIRST)):
        return rows
    each = (len(rows) / max(task.stats.n_tokens, 1)) ** 0.5
    shared = (len(rows) * (times(task) - 1) / _length(task)) ** 0.5
    return torch.cat([rows, each * first, *([shared * first.mean(0, keepdim=True)] if shared else [])])


def times(task: Task) -> float:
    """How often the first token of a sequence counts at the site of a task; knob `first`: a number, or auto, the tokens of a sequence.

    Where a language model has nothing to look for, its heads attend to the first token (Xiao 2023, attention sinks), whose key and value
    so enter the output of every token of the sequence: an error there is made as often as the sequence has tokens. Measured by gradients
    of the KL divergence in a model of 135M parameters, an error of a first token's keys and values weighs 100 to 4,000 times one of
    another token's in most blocks, and one of its other linears' outputs 0.005 to 6 times: those sites count it once.
    It is the mean input of the first tokens that counts so often. A sink is nearly the same whatever the token is; in models without one
    first tokens share little, and their mean is small. One direction costs the other tokens next to nothing.
    """
    if not reads_first(task.view.site):
        return 1.0
    if task.knobs.get("first", 1.0) != "auto":
        return float(task.knobs.get("first", 1.0))
    return _length(task)


def others(task: Task) -> float:
    """Mean diagonal of the second moment without what first tokens share, as a part of that of `hessian`: for damping, at every site.

    Damping stands for what few tokens leave unknown, and is measured in the mean of the diagonal. Where a linear makes the sink, the
    first token alone is that mean: in one down_proj 99.8 % of it, so that three quarters of it were 800 times the median eigenvalue and
    nothing was left to feed back. 1 where the knob `first` is 1, or no first token is known.
    """
    if task.knobs.get("first", 1.0) == 1 or not len(rows := task.statistic(Need.FIRST)):
        return 1.0
    shared = float(rows.mean(0).square().mean()) / _length(task)
    plain = float(task.statistic(Need.HESSIAN).diagonal().mean())
    return (plain - shared) / (plain + (times(task) - 1) * shared) if plain > shared else 1.0


def reads_first(site: Site) -> bool:
    """Whether a site computes keys or values."""
    return any(layer.kind in READ_BY_ALL for layer in site.layers)


def _length(task: Task) -> float:
    """Tokens of a sequence."""
    return task.stats.n_tokens / max(len(task.statistic(Need.FIRST)), 1)


def _counted(task: Task, moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`moment + (times - 1) / length * mean(left) mean(right)^T`; the same tensor where nothing is added."""
    extra = (times(task) - 1) / max(_length(task), 1.0)
    return torch.addr(moment, left.mean(0), right.mean(0), alpha=extra) if extra and len(right) else moment
