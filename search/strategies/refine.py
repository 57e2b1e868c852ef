"""Refinement around the exact solutions: latency-preserving swaps and re-solves under re-weighted losses, ranked by a predictor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from methods.policy import Policy
from search.strategies.dp import solve_dp
from search.strategies.problem import TOLERANCE, Floats, Indices, Problem
from search.strategies.strategy import Evaluated, Rank
from search.strategies.swaps import Swaps


@dataclass(frozen=True)
class RefineOptions:
    """How a refinement searches.

    slack: candidates use at least `1 - slack` of what the budget leaves above the fastest total; explore: share of the answers
    drawn at random from the pool; caution: standard deviations subtracted from the predicted log KL (lower confidence bound);
    pool: candidates that are ranked for one ask; spread: standard deviation of the log re-weighting.
    """

    slack: float = 0.02
    explore: float = 0.2
    caution: float = 0.5
    pool: int = 256
    n_parents: int = 4
    max_swaps: int = 3
    n_solves: int = 12
    spread: float = 0.4
    n_buckets: int = 2000

    def __post_init__(self) -> None:
        if not (0 < self.slack <= 1 and 0 <= self.explore <= 1 and self.spread >= 0 and self.caution >= 0):
            raise ValueError(f"refine: {self}; slack in (0, 1], explore in [0, 1], caution and spread not negative")
        if min(self.pool, self.n_parents, self.max_swaps) < 1 or self.n_solves < 0:
            raise ValueError(f"refine: {self}; pool, n_parents and max_swaps are at least 1, n_solves at least 0")


class Refine:
    """A `Strategy` that never proposes a policy above the budget or beyond the problem's limits, and never one twice.

    Its neighbourhoods: one to three sites of a parent take a better choice and others a faster one, until the total stands in the
    band just below the budget (EvoPress' level switches under a latency); and the exact problem solved again with losses times
    `exp(correction)`, where the correction has two coefficients (constant, slope over depth) a kind of site, drawn around those of
    the best policies told so far (SPDY's re-weighting in few dimensions). A supplied predictor ranks the pool.

    seeds: the solver's solutions, proposed first. kind: by site. depth: by site, 0 (first block) to 1 (last).
    """

    def __init__(
        self,
        problem: Problem,
        budget_ms: float,
        seeds: Iterable[Policy],
        rank: Rank,
        *,
        kind: Mapping[str, str],
        depth: Mapping[str, float],
        seed: int = 0,
        options: RefineOptions | None = None,
    ) -> None:
        self._swaps = Swaps(problem, budget_ms)
        self._problem = problem
        self._budget_ms = budget_ms
        self._options = options or RefineOptions()
        self._rank = rank
        self._generator = np.random.default_rng(seed)
        self._basis = _basis([kind[s] for s in problem.sites], np.array([depth[s] for s in problem.sites]))
        self._floor_ms = budget_ms - self._options.slack * (budget_ms - problem.fastest_ms)
        self._waiting = [problem.indices(policy) for policy in seeds]
        for indices in self._waiting:
            if not self._fits(indices):
                raise ValueError(
                    f"refine: a seed takes {problem.totals(indices)[1]:.6g} ms, above the budget {budget_ms:.6g} ms"
                )
        self._seeds = tuple(self._waiting) or (solve_dp(problem, budget_ms),)
        self._known: set[str] = set()
        self._told: dict[Indices, Evaluated] = {}
        self._weights: dict[Indices, Floats] = {}

    def ask(self, n: int) -> list[Policy]:
        """The seeds first; then the best of a pool by the predictor's lower confidence bound, and some of it at random."""
        if n < 1:
            raise ValueError(f"refine: ask({n}); ask for at least one policy")
        answer = self._new(self._waiting)[:n]
        self._waiting = [indices for indices in self._waiting if indices not in answer]
        if len(answer) < n:
            pool = self._new(self._candidates())
            answer += self._chosen([p for p in pool if p not in answer], n - len(answer))
        policies = [self._problem.policy(indices) for indices in answer]
        self._known.update(policy.key() for policy in policies)
        return policies

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        """Remembers every policy, so as not to propose it; those of this problem within the budget become parents by their KL.

        Of two evaluations of a policy the one on more tokens counts. Tell it of one token count at a time where that can be.
        """
        for item in evaluated:
            self._known.add(item.policy.key())
            try:
                indices = self._problem.indices(item.policy)
            except ValueError:
                continue  # a baseline with choices of its own is no parent here
            before = self._told.get(indices)
            if self._fits(indices) and np.isfinite(item.kl) and (before is None or item.n_tokens >= before.n_tokens):
                self._told[indices] = item

    def _fits(self, indices: Indices) -> bool:
        return self._problem.totals(indices)[1] <= self._budget_ms * (1 + TOLERANCE) and self._problem.meets(indices)

    def _parents(self) -> list[Indices]:
        """The told policies of least KL among those on the most tokens, or the seeds."""
        n = self._options.n_parents
        best = sorted(self._told, key=lambda i: (-self._told[i].n_tokens, self._told[i].kl, i))[:n]
        return best or list(self._seeds[:n])

    def _new(self, pool: Iterable[Indices]) -> list[Indices]:
        unique = dict.fromkeys(indices for indices in pool if self._problem.meets(indices))
        return [indices for indices in unique if self._problem.policy(indices).key() not in self._known]

    def _candidates(self) -> list[Indices]:
        parents = self._parents()
        pool = [self._solved(parents) for _ in range(self._options.n_solves)]
        for k in range(self._options.pool):
            child = self._swaps.child(parents[k % len(parents)], self._generator, self._options.max_swaps, self._floor_ms)
            if child is not None:
                pool.append(child)
        return pool

    def _chosen(self, pool: list[Indices], n: int) -> list[Indices]:
        if len(pool) <= n:
            return pool
        mean, std = self._rank([self._problem.policy(indices) for indices in pool])
        n_random = int(self._generator.binomial(n, self._options.explore))
        order = np.argsort(mean - self._options.caution * std, kind="stable")
        best = [pool[i] for i in order[: n - n_random]]
        others = self._generator.choice(order[n - n_random :], size=n_random, replace=False)
        return best + [pool[i] for i in others]

    def _solved(self, parents: Sequence[Indices]) -> Indices:
        """The problem solved again under losses re-weighted around the mean re-weighting of the parents."""
        known = [self._weights[p] for p in parents if p in self._weights]
        centre = np.mean(known, axis=0) if known else np.zeros(self._basis.shape[1])
        weights = centre + self._generator.normal(0.0, self._options.spread, size=len(centre))
        factors = np.exp(self._basis @ weights)
        weighted = self._problem.with_loss([loss * factor for loss, factor in zip(self._problem.loss, factors, strict=True)])
        found = solve_dp(weighted, self._budget_ms, max(self._options.n_buckets, len(factors)))
        self._weights.setdefault(found, weights)
        return found


def _basis(kinds: Sequence[str], depth: NDArray[np.float64]) -> Floats:
    """(sites, 2 * kinds): an indicator of each kind, and the depth from -1 to 1 within it."""
    indicator = np.array([[float(kind == name) for name in sorted(set(kinds))] for kind in kinds])
    return np.concatenate([indicator, indicator * (2 * depth[:, None] - 1)], axis=1)
