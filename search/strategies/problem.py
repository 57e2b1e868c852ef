"""`Problem`: which choices each site has and what each costs, the input of every allocator. Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from methods.policy import Decision, Policy

Floats = NDArray[np.float64]
Indices = tuple[int, ...]
"""One choice a site, in the order of `Problem.sites`."""

TOLERANCE = 1e-9
"""Relative excess over a budget that is put down to the order of a floating-point sum."""


class Infeasible(ValueError):
    """No policy meets a budget; carries the least that is possible and the sites that limit it.

    limits: (site, its cheapest choice, that choice's cost), the costliest first; costs have the budget's unit, `ms` or `bytes`;
    name: of the limit, "" for the latency budget.
    """

    def __init__(
        self, budget: float, least: float, limits: Sequence[tuple[str, Decision, float]], unit: str = "ms", name: str = ""
    ) -> None:
        self.name = name
        self.budget = budget
        self.least = least
        self.limits = tuple(limits)
        self.unit = unit
        word = "fastest" if unit == "ms" else "smallest"
        worst = ", ".join(f"{site} ({decision.label}, {cost:.4g} {unit})" for site, decision, cost in self.limits[:3])
        super().__init__(
            f"no policy meets {budget:.6g} {unit}: the {word} possible total is {least:.6g} {unit}, limited by {worst}; "
            f"raise the budget or allow cheaper formats there."
        )

    def __reduce__(self) -> tuple[type[Infeasible], tuple[object, ...]]:
        return type(self), (self.budget, self.least, self.limits, self.unit, self.name)


@dataclass(frozen=True, eq=False)
class Limit:
    """A further linear constraint: the costs of the choices, `costs[i]` at site i, sum to at most `budget`, in `unit` (`ms` or `bytes`)."""

    name: str
    costs: tuple[Floats, ...]
    budget: float
    unit: str = "ms"

    def total(self, indices: Sequence[int]) -> float:
        """The cost of a policy."""
        return float(sum(c[j] for c, j in zip(self.costs, indices, strict=True)))


@dataclass(frozen=True, eq=False)
class Problem:
    """A multiple-choice knapsack: one of `choices[i]` at each site `i`, total loss to be minimised under a latency budget.

    loss[i], latency_ms[i], size_bytes[i]: (len(choices[i]),); loss in nats per token, taken to add up over sites;
    finite, latencies and sizes not negative. Latencies are of the sites alone: fixed costs belong in the budget.
    limits: what every policy has to keep besides the latency budget.
    """

    sites: tuple[str, ...]
    choices: tuple[tuple[Decision, ...], ...]
    loss: tuple[Floats, ...]
    latency_ms: tuple[Floats, ...]
    size_bytes: tuple[Floats, ...]
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        columns = {"loss": self.loss, "latency_ms": self.latency_ms, "size_bytes": self.size_bytes}
        for name, arrays in columns.items():
            object.__setattr__(self, name, tuple(_checked(name, self.sites, arrays, self.choices)))
        checked = [replace(x, costs=tuple(_checked(x.name, self.sites, x.costs, self.choices))) for x in self.limits]
        object.__setattr__(self, "limits", tuple(checked))

    @cached_property
    def _position(self) -> tuple[dict[Decision, int], ...]:
        return tuple({decision: j for j, decision in enumerate(choices)} for choices in self.choices)

    @property
    def fastest_ms(self) -> float:
        """The least possible total latency."""
        return float(sum(t.min() for t in self.latency_ms))

    @property
    def slowest_ms(self) -> float:
        """The greatest possible total latency."""
        return float(sum(t.max() for t in self.latency_ms))

    def policy(self, indices: Sequence[int]) -> Policy:
        """The policy that takes choice `indices[i]` at site `i`."""
        if len(indices) != len(self.sites):
            raise ValueError(f"problem: {len(indices)} choices for {len(self.sites)} sites; give one a site")
        return Policy({site: (self.choices[i][indices[i]],) for i, site in enumerate(self.sites)})

    def indices(self, policy: Policy) -> Indices:
        """Inverse of `policy`; raises ValueError where the policy decides something that is no choice here."""
        foreign = sorted(set(policy.sites) - set(self.sites))
        if foreign or policy.model:
            raise ValueError(f"policy {policy.key()} decides {foreign[:3] or policy.model}, which this problem does not have")
        found = []
        for site, position in zip(self.sites, self._position, strict=True):
            decisions = policy.at(site)
            if len(decisions) != 1 or decisions[0] not in position:
                label = " + ".join(d.label for d in decisions)
                raise ValueError(f"policy {policy.key()}: {label} at {site} is not one of {[d.label for d in position]}")
            found.append(position[decisions[0]])
        return tuple(found)

    def totals(self, indices: Sequence[int]) -> tuple[float, float, float]:
        """(loss, latency_ms, size_bytes) summed over sites."""
        columns = (self.loss, self.latency_ms, self.size_bytes)
        loss, latency, size = (float(sum(c[j] for c, j in zip(column, indices, strict=True))) for column in columns)
        return loss, latency, size

    def meets(self, indices: Sequence[int]) -> bool:
        """Whether a policy keeps all limits (not the latency budget, which is no part of the problem)."""
        return all(limit.total(indices) <= limit.budget * (1 + TOLERANCE) for limit in self.limits)

    def with_loss(self, loss: Sequence[Floats]) -> Problem:
        """The same choices, costs and limits under other losses."""
        return replace(self, loss=tuple(loss))

    def limited(self, limits: Sequence[Limit]) -> Problem:
        """The same choices under these limits alone."""
        return replace(self, limits=tuple(limits))

    def size_limit(self, size_bytes: float) -> Limit:
        """At most so many bytes of the sites."""
        return Limit("size", self.size_bytes, size_bytes, "bytes")

    def pruned(self) -> Pruned:
        """Without the choices that another one of the site beats or equals in loss, latency and the costs of all limits.

        The optimum's loss under a latency budget and the limits is unchanged.
        """
        columns = (self.loss, self.latency_ms, *(limit.costs for limit in self.limits))
        kept = tuple(_undominated(np.stack([column[i] for column in columns], axis=1)) for i in range(len(self.sites)))
        choices = tuple(tuple(own[j] for j in keep) for own, keep in zip(self.choices, kept, strict=True))

        def cut(column: tuple[Floats, ...]) -> tuple[Floats, ...]:
            return tuple(a[k] for a, k in zip(column, kept, strict=True))

        limits = tuple(replace(limit, costs=cut(limit.costs)) for limit in self.limits)
        return Pruned(Problem(self.sites, choices, cut(self.loss), cut(self.latency_ms), cut(self.size_bytes), limits), kept)

    def check_budget(self, budget_ms: float) -> None:
        """Raises `Infeasible` where even the fastest choices exceed the budget, ValueError where it is no number."""
        self._check(budget_ms, self.latency_ms, "ms")

    def check_limits(self) -> None:
        """Raises `Infeasible` where even the cheapest choices exceed a limit, ValueError where it is no number."""
        for limit in self.limits:
            self._check(limit.budget, limit.costs, limit.unit, limit.name)

    def _check(self, budget: float, column: tuple[Floats, ...], unit: str, name: str = "") -> None:
        if not np.isfinite(budget):
            raise ValueError(f"problem: budget={budget} {unit}; give a finite number")
        least = float(sum(c.min() for c in column))
        if least > budget * (1 + TOLERANCE):
            best = [int(c.argmin()) for c in column]
            limits = [(s, self.choices[i][best[i]], float(column[i][best[i]])) for i, s in enumerate(self.sites)]
            raise Infeasible(budget, least, sorted(limits, key=lambda item: -item[2])[:10], unit, name)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A problem without dominated choices; `kept[i]` are the original positions of site i's choices."""

    problem: Problem
    kept: tuple[NDArray[np.intp], ...]

    def back(self, indices: Sequence[int]) -> Indices:
        """The same policy's indices in the original problem."""
        return tuple(int(kept[j]) for kept, j in zip(self.kept, indices, strict=True))


def _checked(name: str, sites: Sequence[str], arrays: Sequence[Floats], choices: Sequence[Sequence[Decision]]) -> list[Floats]:
    if not sites or len(set(sites)) != len(sites) or not len(sites) == len(arrays) == len(choices):
        raise ValueError(
            f"problem: {len(sites)} sites, {len(choices)} lists of choices, {len(arrays)} of {name}; one a distinct site"
        )
    checked = []
    for site, array, own in zip(sites, arrays, choices, strict=True):
        values = np.array(array, dtype=np.float64)
        if not own or len(set(own)) != len(own) or values.shape != (len(own),):
            raise ValueError(
                f"problem: {site} has {len(own)} choices and {name} of shape {values.shape}; one a distinct choice"
            )
        floor = -np.inf if name == "loss" else 0.0
        if not np.isfinite(values).all() or (values < floor).any():
            bad = own[int(np.argmax(~np.isfinite(values) | (values < floor)))].label
            raise ValueError(
                f"problem: {name} of {bad} at {site} is not a finite{'' if name == 'loss' else ', non-negative'} number"
            )
        values.flags.writeable = False
        checked.append(values)
    return checked


def _undominated(rows: Floats) -> NDArray[np.intp]:
    """Positions of the rows (n, objectives) that no other row beats or equals; of equal rows the first stays."""
    not_worse = (rows[:, None] <= rows[None]).all(axis=2)
    equal = not_worse & not_worse.T
    first = np.tri(len(rows), k=-1, dtype=bool).T
    beaten = (not_worse & (~equal | first)).any(axis=0)
    return np.flatnonzero(~beaten)
