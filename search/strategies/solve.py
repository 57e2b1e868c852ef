"""One entry to the exact solvers: the best policy of a problem under a budget, with its shadow price."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from methods.policy import Policy
from search.strategies.dp import N_BUCKETS, solve_dp
from search.strategies.milp import MilpSolution, solve_milp
from search.strategies.price import shadow_price
from search.strategies.problem import TOLERANCE, Indices, Infeasible, Problem

_log = logging.getLogger(__name__)

Solver = Literal["milp", "milp-time-limit", "dp"]


@dataclass(frozen=True)
class Solution:
    """The policy of least additive loss under a budget.

    bound: proven lower bound of the loss; method: `milp` proved it optimal, `milp-time-limit` did not, `dp` means the bucketed
    solution was the better one; shadow_price: nats per token that one more millisecond buys, at the margin.
    """

    policy: Policy
    indices: Indices
    loss: float
    latency_ms: float
    size_bytes: float
    bound: float
    method: Solver
    shadow_price: float


def solve(problem: Problem, budget_ms: float, *, time_limit_s: float = 10.0) -> Solution:
    """The best policy within the latency budget and the problem's limits.

    The integer programme; where HiGHS runs out of time, the better of its solution and the bucketed dynamic programme's, which knows no
    limits and is only for problems without. Raises `Infeasible` with what limits the budget.
    """
    pruned = problem.pruned()
    small = pruned.problem
    exact = solve_milp(small, budget_ms, time_limit_s=time_limit_s)
    indices: Indices
    method: Solver
    if not small.limits:
        indices, method = _better(small, budget_ms, exact)
    elif exact is not None:
        indices, method = exact.indices, "milp" if exact.proven else "milp-time-limit"
    else:
        raise _explained(small, budget_ms, time_limit_s)
    indices = pruned.back(indices)
    loss, latency_ms, total_bytes = problem.totals(indices)
    bound = exact.bound if exact else float("-inf")
    price = shadow_price(small, budget_ms)
    return Solution(problem.policy(indices), indices, loss, latency_ms, total_bytes, bound, method, price)


def _better(problem: Problem, budget_ms: float, exact: MilpSolution | None) -> tuple[Indices, Solver]:
    """The programme's solution unless it is missing, above the budget by HiGHS's tolerance, or unproven and beaten."""
    fits = exact is not None and problem.totals(exact.indices)[1] <= budget_ms * (1 + TOLERANCE)
    if exact is not None and fits and exact.proven:
        return exact.indices, "milp"
    bucketed = solve_dp(problem, budget_ms, max(N_BUCKETS, len(problem.sites)))
    if exact is not None and fits and exact.loss <= problem.totals(bucketed)[0]:
        return exact.indices, "milp-time-limit"
    _log.warning("solve: HiGHS did not finish in time; the bucketed dynamic programme's solution is taken")
    return bucketed, "dp"


def _explained(problem: Problem, budget_ms: float, time_limit_s: float) -> Exception:
    """Why the budget and the limits together gave nothing: the first limit that no policy keeps besides those before it, or time."""
    for index, limit in enumerate(problem.limits):
        before = problem.limited(problem.limits[:index]).with_loss(limit.costs)
        least = solve_milp(before, budget_ms, time_limit_s=time_limit_s)
        if least is not None and least.bound > limit.budget * (1 + TOLERANCE):
            columns = zip(problem.sites, problem.choices, limit.costs, least.indices, strict=True)
            parts = sorted(((s, own[j], float(cost[j])) for s, own, cost, j in columns), key=lambda item: -item[2])
            return Infeasible(limit.budget, least.loss, parts[:10], limit.unit, limit.name)
    return RuntimeError(f"solve: nothing found in {time_limit_s:g} s under {budget_ms:g} ms and the other limits; allow more")
