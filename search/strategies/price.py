"""Shadow prices: what one more millisecond buys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from search.strategies.problem import Floats, Problem


def shadow_price(problem: Problem, budget_ms: float) -> float:
    """Nats per token that one more millisecond buys: the latency dual of the linear relaxation, not negative.

    The relaxation walks each site's convex hull of (latency, loss) from the fastest choice, the steepest segments of all sites
    first; the price is the slope of the segment that is next at this budget, so it holds for about one site's change of choice.
    With further limits the relaxation is solved by HiGHS. Raises `Infeasible`. Multiple-choice knapsack (Sinha and Zoltners 1979).
    """
    problem.check_budget(budget_ms)
    if problem.limits:
        return _relaxed(problem, budget_ms)
    segments = [segment for t, loss in zip(problem.latency_ms, problem.loss, strict=True) for segment in _hull(t, loss)]
    spent = problem.fastest_ms
    for price, width in sorted(segments, key=lambda segment: -segment[0]):
        spent += width
        if spent > budget_ms:
            return price
    return 0.0


def _relaxed(problem: Problem, budget_ms: float) -> float:
    """The latency row's dual; 0 where the relaxation finds nothing, because then nothing is for sale."""
    site = np.repeat(np.arange(len(problem.sites)), [len(c) for c in problem.choices])
    one_each: Any = csr_array((np.ones(len(site)), (site, np.arange(len(site)))))
    rows = np.stack([np.concatenate(costs) for costs in (problem.latency_ms, *(limit.costs for limit in problem.limits))])
    budgets = np.array([budget_ms, *(limit.budget for limit in problem.limits)])
    found = linprog(
        np.concatenate(problem.loss),
        A_ub=rows / budgets[:, None],
        b_ub=np.ones(len(budgets)),
        A_eq=one_each,
        b_eq=np.ones(len(problem.sites)),
        method="highs",
    )
    return max(0.0, -float(found.ineqlin.marginals[0]) / budget_ms) if found.status == 0 else 0.0


def _hull(latency: Floats, loss: Floats) -> list[tuple[float, float]]:
    """The descending segments (nats per ms, ms) of the lower convex hull, from the fastest choice to that of least loss."""
    order = np.lexsort((loss, latency))
    corners: list[tuple[float, float]] = []
    for t, y in zip(latency[order].tolist(), loss[order].tolist(), strict=True):
        if corners and y >= corners[-1][1]:
            continue
        while len(corners) > 1 and _above(corners[-2], corners[-1], (t, y)):
            corners.pop()
        corners.append((t, y))
    return [((a[1] - b[1]) / (b[0] - a[0]), b[0] - a[0]) for a, b in pairwise(corners)]


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
