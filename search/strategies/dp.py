"""Dynamic programming over latency buckets: within rounding of the optimum, never above the budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search.strategies.problem import TOLERANCE, Indices, Problem

N_BUCKETS = 10_000


def solve_dp(problem: Problem, budget_ms: float, n_buckets: int = N_BUCKETS) -> Indices:
    """Choices whose exact total latency fits the budget, with nearly the least total loss.

    What is divided into `n_buckets` is the slack, the budget (or the slowest total, if less) minus the fastest total. Latencies are
    rounded to the nearest bucket, so that errors cancel, and of the solutions for every number of buckets the best whose exact sum
    fits is taken: its loss is at most that of the optimum under `budget - n_sites * slack / n_buckets`.
    Cost O(choices * n_buckets), memory 2 * n_sites * n_buckets bytes. Raises `Infeasible`.
    SPDY (Frantar 2022), eq. 5, with bucketed excess over the fastest choice instead of bucketed times.
    """
    n_sites = len(problem.sites)
    if n_buckets < n_sites:
        raise ValueError(f"dp: n_buckets={n_buckets} for {n_sites} sites; use at least one a site")
    problem.check_budget(budget_ms)
    slack = max(min(budget_ms, problem.slowest_ms) - problem.fastest_ms, 0.0)
    top = n_buckets + n_sites // 4  # rounding errors may cancel in our favour
    steps = [_buckets(t - t.min(), slack, n_buckets, top) for t in problem.latency_ms]
    best = np.zeros(top + 1)
    taken: list[NDArray[np.uint16]] = []
    for loss, step in zip(problem.loss, steps, strict=True):
        best, choice = _add_site(best, loss, step)
        taken.append(choice)
    for bucket in range(top, -1, -1):
        indices = _backtrack(taken, steps, bucket)
        if problem.totals(indices)[1] <= budget_ms * (1 + TOLERANCE):
            return _filled(problem, indices, budget_ms)
    raise AssertionError("rounding to the nearest bucket is off by at most half a bucket a site")


def _backtrack(taken: list[NDArray[np.uint16]], steps: list[NDArray[np.int64]], bucket: int) -> list[int]:
    indices = []
    for choice, step in zip(reversed(taken), reversed(steps), strict=True):
        j = int(choice[bucket])
        indices.append(j)
        bucket -= int(step[j])
    return indices[::-1]


def _filled(problem: Problem, indices: list[int], budget_ms: float) -> Indices:
    """Spends what rounding up left over: while a single change of choice lowers the loss and fits, takes the best one."""
    left = budget_ms - problem.totals(indices)[1]
    while True:
        best = (0.0, 0, 0)
        for i, (loss, latency) in enumerate(zip(problem.loss, problem.latency_ms, strict=True)):
            gain = np.where(latency - latency[indices[i]] <= left, loss[indices[i]] - loss, 0.0)
            j = int(gain.argmax())
            best = max(best, (float(gain[j]), i, j))
        gained, i, j = best
        if gained <= 0.0:
            return tuple(indices)
        left -= float(problem.latency_ms[i][j] - problem.latency_ms[i][indices[i]])
        indices[i] = j


def _buckets(excess: NDArray[np.float64], slack: float, n_buckets: int, top: int) -> NDArray[np.int64]:
    """Excess latencies in buckets, to the nearest; what exceeds the slack gets top + 1, which fits nowhere."""
    fits = excess <= slack * (1 + TOLERANCE)
    exact = excess / slack * n_buckets if slack > 0.0 else np.zeros_like(excess)
    return np.where(fits, np.rint(np.where(fits, exact, 0.0)), top + 1).astype(np.int64)


def _add_site(
    best: NDArray[np.float64], loss: NDArray[np.float64], step: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.uint16]]:
    """One more site: least loss within each number of buckets, and the choice that reaches it. best: (top + 1,)."""
    after = np.full_like(best, np.inf)
    choice = np.zeros(len(best), dtype=np.uint16)
    for j in np.argsort(step, kind="stable"):
        width = int(step[j])
        if width >= len(best):
            continue
        reached = best[: len(best) - width] + loss[j]
        better = reached < after[width:]
        after[width:][better] = reached[better]
        choice[width:][better] = j
    return after, choice
