"""What every strategy promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from methods.policy import Decision, Policy
from search.strategies.problem import Problem
from search.strategies.refine import Refine
from search.strategies.solve import solve
from search.strategies.strategy import Evaluated, Strategy
from tests.search.problems import middle, problem
from tests.search.test_refine import OPTIONS, additive, facts

Make = Callable[[Problem, float, Sequence[Policy], int], Strategy]


def _refine(p: Problem, budget_ms: float, seeds: Sequence[Policy], seed: int) -> Strategy:
    kind, depth = facts(p)
    return Refine(p, budget_ms, seeds, additive(p), kind=kind, depth=depth, seed=seed, options=OPTIONS)


STRATEGIES: Mapping[str, Make] = {"refine": _refine}
"""A strategy of a problem, a budget, the solver's solutions and a seed."""


def told(p: Problem, policies: Sequence[Policy]) -> list[Evaluated]:
    """Policies with a loss that is not the additive one."""
    found = []
    for policy in policies:
        loss, latency_ms, size_bytes = p.totals(p.indices(policy))
        found.append(Evaluated(policy, loss + 1e-9 * size_bytes, 0.0, 1024, latency_ms))
    return found


def proposals(make: Make, p: Problem, budget_ms: float, rounds: int, seed: int = 0) -> list[Policy]:
    """What is asked for: twice before each telling."""
    strategy, seen = make(p, budget_ms, [solve(p, budget_ms).policy], seed), []
    for _ in range(rounds):
        policies = strategy.ask(3)
        policies += strategy.ask(3)
        strategy.tell(told(p, policies))
        seen += policies
    return seen


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_stays_within_the_budget_and_never_repeats(name: str, share: float) -> None:
    within_the_budget_and_never_twice(STRATEGIES[name], share)


def within_the_budget_and_never_twice(make: Make, share: float) -> None:
    p = problem(2, n_sites=18).pruned().problem
    budget = middle(p, share)
    seen = proposals(make, p, budget, 4)
    assert seen[0].key() == solve(p, budget).policy.key()
    assert len(seen) > 5 and len({policy.key() for policy in seen}) == len(seen)
    assert all(p.totals(p.indices(policy))[1] <= budget * (1 + 1e-9) for policy in seen)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_seed_decides(name: str) -> None:
    deterministic_in_its_seed(STRATEGIES[name])


def deterministic_in_its_seed(make: Make) -> None:
    p = problem(1, n_sites=14)
    first, again, other = ([policy.key() for policy in proposals(make, p, middle(p), 3, seed)] for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_was_told_is_not_proposed_and_a_small_space_ends(name: str) -> None:
    ends_without_what_was_told(STRATEGIES[name])


def ends_without_what_was_told(make: Make) -> None:
    p = problem(2, n_sites=3, n_choices=3)
    strategy = make(p, p.slowest_ms, [], 0)
    known = p.policy((0, 0, 0))
    strategy.tell([*told(p, [known]), Evaluated(Policy({"elsewhere": (Decision("rtn"),)}), 1e-9, 0.0, 1024, 1.0)])
    seen: list[str] = []
    while policies := strategy.ask(4):
        seen += [policy.key() for policy in policies]
        strategy.tell(told(p, policies))
    assert known.key() not in seen
    assert len(set(seen)) == len(seen) > 0
