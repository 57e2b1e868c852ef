"""Compensator `low-rank`: the best correction of a given rank to a weight's error, in the metric of the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.sides import low_rank as stored
from methods.method import Need
from methods.quant.first import hessian
from methods.quant.task import Task


def low_rank(error: Tensor, rank: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The left (d_out, rank) and right (rank, d_in), fp64, of the least `trace((E - L R) M (E - L R)^T)`; error E: (d_out, d_in).

    metric: M as (d_in, d_in), a second moment of the inputs; as (d_in,), its diagonal; None is the identity. rank <= min(d_out, d_in).
    With U the leading eigenvectors of `E M E^T`, U (U^T E) is the truncated SVD of E M^(1/2) times M^(-1/2), without root and inverse:
    M may be singular.
    LoRC (ZeroQuant-V2, Yao 2023), section 4: M = I. LQER (Zhang 2024), section 3.2: diagonal. QERA (Zhang 2025), theorem 1: full.
    """
    error = error.double()
    d_out, d_in = error.shape
    metric = error.new_ones(d_in) if metric is None else metric.double()
    if d_out <= d_in:
        left = _leading((error * metric if metric.ndim == 1 else error @ metric) @ error.T, rank)
    else:
        spread = error * metric.sqrt() if metric.ndim == 1 else error @ _root(metric)
        left = torch.linalg.qr(spread @ _leading(spread.T @ spread, rank)).Q
    return left, left.T @ error


def by_error(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """LoRC; knob `rank`."""
    return _correction(task, dense)


def by_mean_input(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """LQER; knob `rank`. Deviation: the factors are stored in bf16, not in 8 bits."""
    return _correction(task, dense, task.statistic(Need.ABS_MEAN).square())


def by_output(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """QERA; knobs `rank`, `first`."""
    return _correction(task, dense, hessian(task))


def _correction(task: Task, dense: Tensor, metric: Tensor | None = None) -> dict[str, Tensor]:
    """The payload parts of the correction to `dense` (d_out, d_in), of the rank that the task's knob allows; none at rank 0."""
    rank = min(int(task.number("rank")), *task.weight.shape)
    return stored(*low_rank(task.weight - dense, rank, metric)) if rank else {}


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors (n, rank) of the largest eigenvalues of a symmetric matrix (n, n)."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, vectors.shape[1] - rank :]


def _root(metric: Tensor) -> Tensor:
    """R (n, n) with `R R^T` = metric (n, n)."""
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
