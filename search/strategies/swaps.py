"""Latency-preserving swaps: some sites take a better choice, others a faster one, and the total stays just within the budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search.strategies.problem import TOLERANCE, Floats, Indices, Problem


class Swaps:
    """Random neighbours of a policy under a latency budget; every one meets it.

    EvoPress' level switches (Sieberling 2024) under a measured latency instead of a bit count, drawn by nats per millisecond.
    """

    def __init__(self, problem: Problem, budget_ms: float) -> None:
        problem.check_budget(budget_ms)
        self._budget_ms = budget_ms * (1 + TOLERANCE)
        self._loss = _padded(problem.loss)
        self._latency_ms = _padded(problem.latency_ms)
        self._rows = np.arange(len(problem.sites))

    def latency(self, indices: Sequence[int] | NDArray[np.intp]) -> float:
        """Total latency in ms."""
        return float(self._latency_ms[self._rows, np.asarray(indices)].sum())

    def child(self, parent: Indices, generator: np.random.Generator, max_swaps: int, floor_ms: float) -> Indices | None:
        """One to `max_swaps` sites up, others down until the total fits, up again while below the floor; None where that fails.

        The child's total is at least `floor_ms`, or at least its parent's where that is less.
        """
        now = np.array(parent)
        free = np.ones(len(now), dtype=bool)
        for _ in range(int(generator.integers(1, max_swaps + 1))):
            self._move(now, free, generator, up=True)
        while self.latency(now) > self._budget_ms:
            if not self._move(now, free, generator, up=False):
                return None
        self._fill(now, free, floor_ms)
        child = tuple(int(j) for j in now)
        if child == parent or self.latency(child) < min(floor_ms, self.latency(parent)):
            return None
        return child

    def _move(self, now: NDArray[np.intp], free: NDArray[np.bool_], generator: np.random.Generator, *, up: bool) -> bool:
        """Changes one free site in place, drawn by its rate; False where none can move."""
        rates = self._up(now, free) if up else self._down(now, free)
        sites, choices = np.nonzero(np.isfinite(rates))
        if not len(sites):
            return False
        place = np.argsort(np.argsort(-rates[sites, choices], kind="stable"), kind="stable")
        odds = 1.0 / (1.0 + place)  # by rank, not by value: rates of different layers differ by orders of magnitude
        k = int(generator.choice(len(sites), p=odds / odds.sum()))
        now[sites[k]] = choices[k]
        free[sites[k]] = False
        return True

    def _up(self, now: NDArray[np.intp], free: NDArray[np.bool_]) -> Floats:
        """(sites, choices): loss saved for each millisecond added; -inf where the choice is no step up."""
        gain, cost = self._differences(now)
        able = (gain > 0) & (cost > 0) & np.isfinite(cost) & free[:, None]
        return np.where(able, gain / np.where(able, cost, 1.0), -np.inf)

    def _down(self, now: NDArray[np.intp], free: NDArray[np.bool_]) -> Floats:
        """(sites, choices): minus the loss added for each millisecond saved; -inf where the choice is not faster."""
        gain, cost = self._differences(now)
        able = (cost < 0) & free[:, None]
        return np.where(able, gain / np.where(able, -cost, 1.0), -np.inf)

    def _differences(self, now: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Loss saved and milliseconds added by every choice, (sites, choices); padding is -inf and inf."""
        return self._loss[self._rows, now][:, None] - self._loss, self._latency_ms - self._latency_ms[self._rows, now][:, None]

    def _fill(self, now: NDArray[np.intp], free: NDArray[np.bool_], floor_ms: float) -> None:
        """Steps free sites up, the best rate first, in place, until the total reaches the floor; no further, to stay a neighbour."""
        while self.latency(now) < floor_ms:
            rates = self._up(now, free)
            added = self._differences(now)[1]
            rates = np.where(added <= self._budget_ms - self.latency(now), rates, -np.inf)
            i, j = np.unravel_index(int(rates.argmax()), rates.shape)
            if rates[i, j] == -np.inf:
                return
            now[i] = j
            free[i] = False


def _padded(arrays: Sequence[Floats]) -> Floats:
    width = max(len(a) for a in arrays)
    return np.stack([np.pad(a, (0, width - len(a)), constant_values=np.inf) for a in arrays])
