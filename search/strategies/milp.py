"""Mixed-integer programming with SciPy's HiGHS: exact, with further limits and several distinct solutions."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from search.strategies.problem import TOLERANCE, Floats, Indices, Problem

TIME_LIMIT_S = 10.0
_GAP = 1e-6
_SCALE = 1e4  # HiGHS stops at absolute tolerances of 1e-6, so rows and the objective are brought to this size
_TIME_LIMIT_REACHED = 1
_INFEASIBLE = 2


@dataclass(frozen=True)
class MilpSolution:
    """A solution; `bound` is a proven lower bound of the loss, equal to it within 1e-6 relative where `proven`."""

    indices: Indices
    loss: float
    bound: float
    proven: bool


def solve_milp(
    problem: Problem,
    budget_ms: float,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    apart: Sequence[Indices] = (),
    min_distance: int = 1,
) -> MilpSolution | None:
    """The policy of least loss within the latency budget and the problem's limits.

    It differs from each of `apart` at `min_distance` sites or more (no-good cuts). None where no such policy exists, or none was
    found in `time_limit_s`. Raises `Infeasible` where a budget alone cannot be met.
    Q-Palette (Lee 2025), its latency-constrained programme, without fused choices.
    """
    if time_limit_s <= 0 or min_distance < 1:
        raise ValueError(f"milp: time_limit_s={time_limit_s}, min_distance={min_distance}; both must be positive")
    problem.check_budget(budget_ms)
    columns = _Columns.of(problem)
    problem.check_limits()
    rows = [columns.within(problem.latency_ms, budget_ms)]
    rows += [columns.within(limit.costs, limit.budget) for limit in problem.limits]
    if apart:
        rows.append(columns.cuts(apart, min_distance))
    matrix, n_sites = columns.one_each(), len(problem.sites)
    with _without_stdout():
        result = milp(
            columns.cost,
            constraints=[LinearConstraint(matrix, np.ones(n_sites), np.ones(n_sites))]
            + [LinearConstraint(row.matrix, -np.inf, row.upper) for row in rows],
            integrality=np.ones(len(columns.cost), dtype=np.int8),
            bounds=Bounds(0, 1),
            options={"time_limit": time_limit_s, "mip_rel_gap": _GAP},
        )
    if result.x is None:
        if result.status not in (_TIME_LIMIT_REACHED, _INFEASIBLE):
            raise RuntimeError(f"milp: HiGHS stopped without a result: {result.message}")
        return None
    indices = columns.indices(result.x)
    proof = result.mip_dual_bound
    bound = columns.least + (0.0 if proof is None else float(proof) / columns.per_nat)
    return MilpSolution(indices, problem.totals(indices)[0], bound, proven=result.status == 0)


def diverse(
    problem: Problem, budget_ms: float, n: int, *, min_distance: int = 2, time_limit_s: float = TIME_LIMIT_S
) -> list[MilpSolution]:
    """Up to `n` solutions, best first, each `min_distance` sites or more from every one before it; fewer where no more exist.

    `time_limit_s` is for each. Prune the problem first, or the solutions may differ in choices that gain nothing.
    """
    found: list[MilpSolution] = []
    while len(found) < n:
        apart = [solution.indices for solution in found]
        solution = solve_milp(problem, budget_ms, time_limit_s=time_limit_s, apart=apart, min_distance=min_distance)
        if solution is None:
            break
        found.append(solution)
    return found


@dataclass(frozen=True)
class _Rows:
    """`matrix @ x <= upper`."""

    matrix: csr_array[np.float64]
    upper: Floats


@dataclass(frozen=True)
class _Columns:
    """The binary variables of a problem, one a (site, choice), with their scaled costs."""

    site: NDArray[np.intp]
    starts: NDArray[np.intp]
    cost: Floats
    per_nat: float
    least: float

    @classmethod
    def of(cls, problem: Problem) -> _Columns:
        counts = np.array([len(c) for c in problem.choices])
        excess = np.concatenate([loss - loss.min() for loss in problem.loss])
        spread = float(sum(loss.max() - loss.min() for loss in problem.loss))
        per_nat = _SCALE / spread if spread > 0 else 1.0
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        least = float(sum(loss.min() for loss in problem.loss))
        return cls(np.repeat(np.arange(len(counts)), counts), starts, excess * per_nat, per_nat, least)

    def one_each(self) -> csr_array[np.float64]:
        """`matrix @ x == 1`: every site takes one choice."""
        n = len(self.site)
        return csr_array((np.ones(n), (self.site, np.arange(n))), shape=(len(self.starts), n))

    def within(self, costs: tuple[Floats, ...], budget: float) -> _Rows:
        """Excess over the cheapest total within what the budget leaves, scaled so that HiGHS's tolerance is negligible."""
        slack = max(budget - float(sum(c.min() for c in costs)), TOLERANCE * budget)
        excess = np.concatenate([c - c.min() for c in costs])
        row = np.minimum(excess / slack, 2.0) * _SCALE if slack > 0 else np.where(excess > 0, 2.0, 0.0) * _SCALE
        return _Rows(csr_array(row[None]), np.array([_SCALE]))

    def cuts(self, apart: Sequence[Indices], min_distance: int) -> _Rows:
        """No-good cuts: x shares at most n_sites - min_distance choices with each of `apart`."""
        rows = np.zeros((len(apart), len(self.site)))
        for row, indices in zip(rows, apart, strict=True):
            row[self.starts + np.array(indices)] = 1.0
        return _Rows(csr_array(rows), np.full(len(apart), float(len(self.starts) - min_distance)))

    def indices(self, x: Floats) -> Indices:
        ends = [*self.starts[1:], len(x)]
        return tuple(int(np.argmax(x[a:b])) for a, b in zip(self.starts, ends, strict=True))


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Throws away what the process writes to standard output meanwhile.

    HiGHS 1.12 prints a debugging line from C in some solves, without an option against it: it would spoil results on stdout.
    """
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)  # what C has buffered belongs to where it was printed
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
