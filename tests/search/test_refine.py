"""Refinement: its promises on every proposal, and that it gets somewhere."""

from collections.abc import Sequence

import numpy as np
import pytest

from methods.policy import Decision, Policy
from search.strategies.problem import Problem
from search.strategies.refine import Refine, RefineOptions
from search.strategies.solve import solve
from search.strategies.strategy import Evaluated, Rank, Strategy
from search.strategies.swaps import Swaps
from tests.search.problems import middle, problem

KINDS = ("q+k+v", "o", "down")
OPTIONS = RefineOptions(pool=60, n_solves=4, n_buckets=300)


def facts(p: Problem) -> tuple[dict[str, str], dict[str, float]]:
    n = len(p.sites)
    return {s: KINDS[i % 3] for i, s in enumerate(p.sites)}, {s: i / (n - 1) for i, s in enumerate(p.sites)}


def additive(p: Problem) -> Rank:
    def rank(policies: Sequence[Policy]) -> tuple[np.ndarray, np.ndarray]:
        values = np.log([p.totals(p.indices(policy))[0] for policy in policies])
        return values, np.full(len(values), 0.1)

    return rank


def truth(p: Problem, seed: int = 7) -> np.ndarray:
    """Hidden factors by kind, slope over depth and some noise: what the additive score does not know."""
    g = np.random.default_rng(seed)
    kinds = np.exp(g.normal(0, 0.7, 3))
    n = len(p.sites)
    return np.array([kinds[i % 3] * np.exp(1.0 * i / n) for i in range(n)])


def run(p: Problem, budget: float, rounds: int, seed: int = 0, options: RefineOptions = OPTIONS) -> list[Evaluated]:
    kind, depth = facts(p)
    factors = truth(p)
    strategy: Strategy = Refine(
        p, budget, [solve(p, budget).policy], additive(p), kind=kind, depth=depth, seed=seed, options=options
    )
    seen: list[Evaluated] = []
    for _ in range(rounds):
        policies = strategy.ask(6)
        told = []
        for policy in policies:
            indices = p.indices(policy)
            kl = sum(float(loss[j]) * f for loss, j, f in zip(p.loss, indices, factors, strict=True))
            told.append(Evaluated(policy, kl, 0.0, 1024, p.totals(indices)[1]))
        strategy.tell(told)
        seen += told
    return seen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_never_above_the_budget_and_never_twice(seed: int, share: float) -> None:
    p = problem(seed, n_sites=18).pruned().problem
    budget = middle(p, share)
    seen = run(p, budget, 5, seed)
    assert all(item.latency_ms <= budget * (1 + 1e-9) for item in seen)
    assert len({item.policy.key() for item in seen}) == len(seen)
    assert seen[0].policy.key() == solve(p, budget).policy.key()


def test_deterministic_in_the_seed() -> None:
    p = problem(1, n_sites=18).pruned().problem
    budget = middle(p)
    first, again, other = (run(p, budget, 4, seed) for seed in (3, 3, 4))
    assert [item.policy.key() for item in first] == [item.policy.key() for item in again]
    assert [item.policy.key() for item in first] != [item.policy.key() for item in other]


@pytest.mark.parametrize("seed", [2, 4])  # where the additive optimum is not the true one
def test_learns_what_the_score_does_not_know(seed: int) -> None:
    p = problem(seed, n_sites=30, n_choices=12).pruned().problem
    budget = middle(p, 0.1)
    seen = run(p, budget, 12)
    factors = truth(p)
    ideal = solve(p.with_loss([loss * f for loss, f in zip(p.loss, factors, strict=True)]), budget).loss
    start, best = seen[0].kl, min(item.kl for item in seen)
    assert start > 1.005 * ideal
    assert best < start - 0.5 * (start - ideal)


def test_a_seed_above_the_budget_is_refused() -> None:
    p = problem(0, n_sites=6)
    slowest = p.policy([int(t.argmax()) for t in p.latency_ms])
    kind, depth = facts(p)
    with pytest.raises(ValueError, match="above the budget"):
        Refine(p, middle(p), [slowest], additive(p), kind=kind, depth=depth)


def test_told_policies_are_not_proposed_and_foreign_ones_no_parents() -> None:
    p = problem(2, n_sites=3, n_choices=3)
    kind, depth = facts(p)
    strategy = Refine(p, p.slowest_ms, [], additive(p), kind=kind, depth=depth, options=OPTIONS)
    told = p.policy((0, 0, 0))
    foreign = Policy({"elsewhere": (Decision("rtn"),)})
    strategy.tell([Evaluated(told, 1e-9, 0, 10, 1.0), Evaluated(foreign, 1e-9, 0, 10, 1.0)])
    proposed: list[str] = []
    while policies := strategy.ask(4):
        proposed += [policy.key() for policy in policies]
    assert told.key() not in proposed and len(set(proposed)) == len(proposed) > 0


def test_the_rank_decides() -> None:
    p = problem(4, n_sites=18).pruned().problem
    budget = middle(p)
    kind, depth = facts(p)
    options = RefineOptions(pool=60, n_solves=0, explore=0.0, caution=0.0)
    favourite = p.sites[3]

    def rank(policies: Sequence[Policy]) -> tuple[np.ndarray, np.ndarray]:
        fast = p.choices[3][int(p.latency_ms[3].argmin())]
        return np.array([0.0 if policy.at(favourite) == (fast,) else 1.0 for policy in policies]), np.zeros(len(policies))

    strategy = Refine(p, budget, [], rank, kind=kind, depth=depth, options=options)
    fast = p.choices[3][int(p.latency_ms[3].argmin())]
    assert all(policy.at(favourite) == (fast,) for policy in strategy.ask(4))


def test_solving_again_learns_the_weights_of_kinds() -> None:
    p = problem(2, n_sites=30, n_choices=12).pruned().problem
    budget = middle(p, 0.1)
    seen = run(p, budget, 12, options=RefineOptions(pool=1, n_solves=12, n_buckets=300))
    assert min(item.kl for item in seen[6:]) < 0.995 * seen[0].kl


def test_children_descend_from_the_best_told() -> None:
    p = problem(4, n_sites=90, n_choices=12).pruned().problem
    budget = middle(p)
    kind, depth = facts(p)
    start = solve(p, budget).indices
    g = np.random.default_rng(0)
    best = solve(p.with_loss([loss * np.exp(g.normal(0, 2)) for loss in p.loss]), budget).indices

    def nearer_to_best(policies: Sequence[Policy]) -> list[bool]:
        children = [np.array(p.indices(policy)) for policy in policies]
        return [bool((child != best).sum() < (child != start).sum()) for child in children]

    options = RefineOptions(pool=40, n_solves=0, max_swaps=1, n_parents=1)
    strategy = Refine(p, budget, [], additive(p), kind=kind, depth=depth, options=options)
    strategy.tell([Evaluated(p.policy(start), 0.5, 0, 10, 1.0), Evaluated(p.policy(best), 0.1, 0, 10, 1.0)])
    assert all(nearer_to_best(strategy.ask(6)))
    strategy.tell([Evaluated(p.policy(start), 0.9, 0, 20, 1.0)])  # on more tokens, so it counts more than a lower KL on fewer
    assert not any(nearer_to_best(strategy.ask(6)))


def test_a_swap_spends_the_budget() -> None:
    p = problem(6, n_sites=30).pruned().problem
    budget = middle(p)
    parent = solve(p, budget).indices
    g = np.random.default_rng(0)
    floor = budget - 0.05 * (budget - p.fastest_ms)
    children = [Swaps(p, budget).child(parent, g, 3, floor) for _ in range(50)]
    found = [child for child in children if child is not None]
    assert len(found) > 25
    for child in found:
        latency = p.totals(child)[1]
        assert min(floor, p.totals(parent)[1]) <= latency <= budget * (1 + 1e-9)
        assert child != parent
