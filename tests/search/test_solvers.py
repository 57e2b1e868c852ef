"""The allocators against brute force."""

import pickle

import numpy as np
import pytest

from methods.policy import DENSE, Decision, Policy
from search.strategies.dp import solve_dp
from search.strategies.milp import diverse, solve_milp
from search.strategies.price import shadow_price
from search.strategies.problem import Infeasible, Problem
from search.strategies.solve import solve
from tests.search.problems import every, middle, problem

SEEDS = range(6)


def best(p: Problem, budget_ms: float, size_bytes: float = np.inf) -> float:
    fitting = [loss for _, (loss, t, size) in every(p) if t <= budget_ms * (1 + 1e-9) and size <= size_bytes * (1 + 1e-9)]
    return min(fitting)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ties", [False, True])
def test_milp_is_exact(seed: int, ties: bool) -> None:
    p = problem(seed, ties=ties)
    budget = middle(p)
    solution = solve_milp(p, budget)
    assert solution is not None and solution.proven
    loss, latency, _ = p.totals(solution.indices)
    assert latency <= budget * (1 + 1e-9)
    assert loss == pytest.approx(best(p, budget), rel=1e-6, abs=1e-12)
    assert solution.bound <= loss + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_milp_with_a_size_budget(seed: int) -> None:
    p = problem(seed)
    budget = middle(p, 0.7)
    size = 0.8 * p.totals(solve(p, budget).indices)[2]
    expected = [loss for _, (loss, t, s) in every(p) if t <= budget and s <= size]
    if not expected:
        with pytest.raises(Infeasible, match="bytes"):
            solve(p.limited([p.size_limit(size)]), budget)
        return
    solution = solve(p.limited([p.size_limit(size)]), budget)
    assert solution.loss == pytest.approx(min(expected), rel=1e-6)
    assert solution.size_bytes <= size and solution.latency_ms <= budget


def test_size_and_latency_that_only_conflict_together() -> None:
    fast_is_big = Problem(
        ("a",), ((Decision("x"), Decision("y")),), (np.ones(2),), (np.array([1.0, 2.0]),), (np.array([9.0, 3.0]),)
    )
    with pytest.raises(Infeasible) as caught:
        solve(fast_is_big.limited([fast_is_big.size_limit(5.0)]), 1.5)
    assert caught.value.unit == "bytes" and caught.value.least == 9.0 and caught.value.limits[0][0] == "a"


@pytest.mark.parametrize("seed", SEEDS)
def test_dp_keeps_the_budget_and_its_error_bound(seed: int) -> None:
    p = problem(seed)
    for share in (0.0, 0.1, 0.5, 0.9, 1.5):
        budget = middle(p, share)
        loss, latency, _ = p.totals(solve_dp(p, budget, 200))
        assert latency <= budget * (1 + 1e-9)
        slack = min(budget, p.slowest_ms) - p.fastest_ms
        tightened = min(budget, p.slowest_ms) - len(p.sites) * slack / 200
        assert best(p, budget) - 1e-12 <= loss <= best(p, max(tightened, p.fastest_ms)) + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_dp_at_real_size_is_close_to_the_optimum(seed: int) -> None:
    p = problem(seed, n_sites=120, n_choices=8).pruned().problem
    budget = middle(p)
    exact = solve_milp(p, budget)
    assert exact is not None
    loss, latency, _ = p.totals(solve_dp(p, budget))
    assert latency <= budget * (1 + 1e-9)
    assert exact.bound - 1e-9 <= loss <= exact.loss * 1.01
    coarse, latency, _ = p.totals(solve_dp(p, budget, 120))
    assert latency <= budget * (1 + 1e-9) and coarse <= exact.loss * 1.01  # rounding errors cancel


def test_a_budget_equal_to_one_policy_admits_it() -> None:
    p = problem(1, n_sites=40)
    for j in (0, 1):
        indices = tuple(min(j, len(c) - 1) for c in p.choices)
        loss, latency, _ = p.totals(indices)
        assert solve(p, latency).loss <= loss + 1e-12
        assert p.totals(solve_dp(p, latency))[1] <= latency * (1 + 1e-9)
    fastest = tuple(int(t.argmin()) for t in p.latency_ms)
    assert solve(p, p.fastest_ms).indices == fastest
    assert solve_dp(p, p.fastest_ms) == fastest


@pytest.mark.parametrize("ties", [False, True])
def test_solve_takes_the_optimum_and_maps_back(ties: bool) -> None:
    p = problem(3, ties=ties)
    budget = middle(p)
    solution = solve(p, budget)
    assert solution.method == "milp"
    assert solution.loss == pytest.approx(best(p, budget))
    assert p.indices(solution.policy) == solution.indices
    assert (solution.loss, solution.latency_ms, solution.size_bytes) == p.totals(solution.indices)


def test_without_time_the_dp_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    p = problem(0, n_sites=120, n_choices=10)
    budget = middle(p)
    solution = solve(p, budget, time_limit_s=1e-9)
    assert solution.method == "dp"
    assert "did not finish" in caplog.text
    assert solution.latency_ms <= budget and solution.loss <= 1.01 * solve(p, budget).loss


def test_infeasible_says_what_limits() -> None:
    p = problem(2)
    with pytest.raises(Infeasible) as caught:
        solve(p, 0.9 * p.fastest_ms)
    error = caught.value
    assert error.least == pytest.approx(p.fastest_ms)
    slowest = int(np.argmax([t.min() for t in p.latency_ms]))
    site, decision, cost = error.limits[0]
    assert site == p.sites[slowest] and cost == p.latency_ms[slowest].min()
    assert site in str(error) and decision.label in str(error)
    assert pickle.loads(pickle.dumps(error)).limits == error.limits
    with pytest.raises(Infeasible):
        solve_dp(p, 0.9 * p.fastest_ms)
    with pytest.raises(ValueError, match="finite"):
        solve(p, float("nan"))


@pytest.mark.parametrize("seed", range(3))
def test_diverse_are_the_best_that_stand_apart(seed: int) -> None:
    p = problem(seed)
    budget = middle(p, 0.6)
    found = diverse(p, budget, 4, min_distance=2)
    chosen: list[tuple[int, ...]] = []
    for solution in found:
        apart = [
            loss
            for indices, (loss, t, _) in every(p)
            if t <= budget * (1 + 1e-9) and all(sum(a != b for a, b in zip(indices, c, strict=True)) >= 2 for c in chosen)
        ]
        assert solution.loss == pytest.approx(min(apart), rel=1e-6)
        chosen.append(solution.indices)
    assert len(found) > 1


def test_diverse_stops_where_there_are_no_more() -> None:
    p = problem(0, n_sites=1, n_choices=3)
    assert len(diverse(p, p.slowest_ms, 9, min_distance=1)) == 3


def relaxed(p: Problem, budget_ms: float) -> float:
    """Optimum of the linear relaxation, by the dense simplex."""
    from scipy.optimize import linprog

    n = sum(len(c) for c in p.choices)
    one = np.zeros((len(p.sites), n))
    at = 0
    for i, own in enumerate(p.choices):
        one[i, at : at + len(own)] = 1
        at += len(own)
    result = linprog(
        np.concatenate(p.loss) * 1e3,
        A_ub=np.concatenate(p.latency_ms)[None],
        b_ub=[budget_ms],
        A_eq=one,
        b_eq=np.ones(len(p.sites)),
        bounds=(0, 1),
    )
    return float(result.fun) / 1e3


@pytest.mark.parametrize("seed", SEEDS)
def test_shadow_price_is_the_slope_of_the_relaxation(seed: int) -> None:
    p = problem(seed, n_sites=9, n_choices=6)
    for share in (0.03, 0.2, 0.41):
        budget = middle(p, share)
        step = 1e-5 * budget
        slope = (relaxed(p, budget) - relaxed(p, budget + step)) / step
        assert shadow_price(p, budget) == pytest.approx(slope, rel=1e-3, abs=1e-9)
    assert shadow_price(p, p.slowest_ms) == 0.0


def test_pruning_keeps_the_optimum_and_drops_the_dominated() -> None:
    choices = tuple(Decision.of("m", j=j) for j in range(5))
    loss = np.array([3.0, 1.0, 2.0, 1.0, 1.0])
    latency = np.array([1.0, 2.0, 3.0, 2.0, 2.5])
    size = np.array([1.0, 5.0, 1.0, 4.0, 1.0])
    p = Problem(("s",), (choices,), (loss,), (latency,), (size,))
    assert p.pruned().kept[0].tolist() == [0, 1]
    assert p.limited([p.size_limit(9.0)]).pruned().kept[0].tolist() == [0, 3, 4]
    for seed in SEEDS:
        q = problem(seed, ties=True)
        pruned = q.pruned()
        budget = middle(q)
        assert best(pruned.problem, budget) == best(q, budget)
        indices = tuple(len(k) - 1 for k in pruned.kept)
        assert pruned.problem.totals(indices) == q.totals(pruned.back(indices))


def test_policy_and_indices_are_inverse() -> None:
    p = problem(4)
    indices = (1, 0, 2, 2, 3)
    assert p.indices(p.policy(indices)) == indices
    with pytest.raises(ValueError, match="not one of"):
        p.indices(Policy({**p.policy(indices).sites, "site0": (DENSE,)}))
    with pytest.raises(ValueError, match="does not have"):
        p.indices(Policy({**p.policy(indices).sites, "elsewhere": (Decision("rtn"),)}))


@pytest.mark.parametrize(
    ("column", "value"), [("loss", np.nan), ("latency_ms", np.inf), ("latency_ms", -1.0), ("size_bytes", -1.0)]
)
def test_bad_costs_are_refused(column: str, value: float) -> None:
    p = problem(0)
    columns = {name: list(getattr(p, name)) for name in ("loss", "latency_ms", "size_bytes")}
    columns[column][2] = np.array([value, *columns[column][2][1:]])
    with pytest.raises(ValueError, match=f"{column} of rtn:bits=0 at site2"):
        Problem(p.sites, p.choices, **{name: tuple(arrays) for name, arrays in columns.items()})
    with pytest.raises(ValueError, match="shape"):
        Problem(p.sites, p.choices, p.loss, p.latency_ms, (*p.size_bytes[:-1], np.ones(9)))


def test_solving_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    p = problem(25, n_sites=60, n_choices=8).pruned().problem  # one at which HiGHS itself prints
    diverse(p, middle(p), 3, min_distance=4)
    assert capfd.readouterr().out == ""
