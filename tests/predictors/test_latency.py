"""The whole-model latency map: planted coefficients, honest errors, safe budgets."""

import json

import numpy as np
import pytest

from predictors.latency import LatencyModel, Run, fit_latency, unit_slope


def runs(seed: int, n: int, *, b0: float = 1.2, b1: float = 1.08, switch: float = 0.0, noise: float = 0.01) -> list[Run]:
    g = np.random.default_rng(seed)
    found = []
    for k in range(n):
        total = float(g.uniform(5, 12))
        features = {"launches": float(g.integers(100, 200)), "switches": float(g.integers(0, 60))}
        measured = (b0 + b1 * total + switch * features["switches"]) * float(np.exp(g.normal(0, noise)))
        found.append(Run(f"{k:02d}", total, measured, 0.999 * measured, 1.001 * measured, features))
    return found


def test_recovers_planted_coefficients() -> None:
    model = fit_latency(runs(0, 12, noise=0.0))
    assert (model.b0, model.b1, model.terms) == (pytest.approx(1.2), pytest.approx(1.08), ())
    model = fit_latency(runs(0, 14, switch=0.03, noise=0.0))
    assert [name for name, _ in model.terms] == ["switches"]
    assert model.terms[0][1] == pytest.approx(0.03, rel=0.05)
    assert model.b1 == pytest.approx(1.08, rel=0.02)
    assert model.formula.startswith("1.") and model.formula.endswith(" ms x switches")


def test_an_extra_term_has_to_pay() -> None:
    taken = [fit_latency(runs(seed, 12)).terms for seed in range(8)]
    assert sum(terms == () for terms in taken) >= 5
    assert fit_latency(runs(0, 7, switch=0.03)).terms[0][0] == "switches"
    assert fit_latency(runs(0, 3, switch=0.03)).terms == ()


@pytest.mark.parametrize("n", [5, 10, 16])
def test_intervals_cover_new_measurements(n: int) -> None:
    inside = []
    for seed in range(40):
        both = runs(seed, n + 20, switch=0.01)
        model = fit_latency(both[:n])
        predicted = [model.predict(run.sum_ms, run.features) for run in both[n:]]
        inside += [p.lo <= run.measured_ms <= p.hi for p, run in zip(predicted, both[n:], strict=True)]
    assert (0.8 if n < 9 else 0.86) <= np.mean(inside) <= 0.97


def test_leave_one_out_error_is_what_refitting_gives() -> None:
    measured = runs(1, 6, switch=0.02)
    model = fit_latency(measured)
    absolute = []
    for k, run in enumerate(measured):
        other = fit_latency(measured[:k] + measured[k + 1 :])
        absolute.append(abs(other.predict(run.sum_ms, run.features).mean / run.measured_ms - 1))
    assert model.loo_error.mean == pytest.approx(np.mean(absolute))
    assert model.loo_error.max == pytest.approx(np.max(absolute))


def test_intervals_grow_away_from_the_runs() -> None:
    model = fit_latency(runs(2, 8))
    lo, hi = model.range_ms

    def relative(total: float) -> float:
        interval = model.predict(total)
        return (interval.hi - interval.lo) / interval.mean

    assert relative(3 * hi) > relative((lo + hi) / 2)
    assert relative(0.1 * lo) > relative((lo + hi) / 2)


def test_never_surer_than_the_measurements() -> None:
    exact = [Run(str(k), s, 1 + s, 0.9 * (1 + s), 1.1 * (1 + s)) for k, s in enumerate((2.0, 4.0, 7.0, 9.0))]
    interval = fit_latency(exact).predict(5.0)
    assert interval.hi / interval.mean >= 1.1


@pytest.mark.parametrize("b0", [-0.5, 0.0, 2.0])
def test_budget_is_the_largest_sum_that_surely_fits(b0: float) -> None:
    model = fit_latency(runs(3, 10, b0=b0))
    budget = model.budget(9.0)
    assert model.predict(budget).hi <= 9.0
    assert model.predict(budget * 1.0001).hi > 9.0


def test_impossible_budgets_say_so() -> None:
    model = fit_latency(runs(3, 10, b0=4.0))
    with pytest.raises(ValueError, match="cannot be met"):
        model.budget(3.0)
    with pytest.raises(ValueError, match="surely"):
        model.budget(model.b0 + 1e-3)


def test_the_order_of_runs_does_not_matter() -> None:
    measured = runs(4, 9)
    assert fit_latency(measured) == fit_latency(measured[::-1])


def test_survives_json() -> None:
    model = fit_latency(runs(5, 14, switch=0.03))
    again = LatencyModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again == model
    features = {"switches": 10.0}
    assert again.predict(8.0, features) == model.predict(8.0, features)
    with pytest.raises(ValueError, match="version"):
        LatencyModel.from_dict({**model.to_dict(), "version": 0})
    with pytest.raises(ValueError, match="runs: expected a list, found nothing; fit it again"):
        LatencyModel.from_dict({name: value for name, value in model.to_dict().items() if name != "runs"})
    with pytest.raises(ValueError, match="switches"):
        model.predict(8.0)


def test_bad_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 3"):
        fit_latency(runs(0, 2))
    with pytest.raises(ValueError, match="differ"):
        fit_latency([Run(str(k), 5.0, 6.0 + k, 6.0, 9.0) for k in range(4)])
    with pytest.raises(ValueError, match="more kernel time gave less"):
        fit_latency([Run(str(k), s, 10 - s, 9 - s, 11 - s) for k, s in enumerate((2.0, 4.0, 5.0, 6.0))])
    with pytest.raises(ValueError, match="different features"):
        fit_latency([*runs(0, 4), Run("x", 5.0, 6.0, 6.0, 6.0)])
    with pytest.raises(ValueError, match="lo <= measured_ms"):
        Run("x", 5.0, 6.0, 6.5, 7.0)


def test_unit_slope_counts_kernel_time_as_it_is() -> None:
    """Runs in which noise turned the slope around: `fit_latency` refuses them, and this map still says how coarse it is."""
    runs = [Run(f"p{k}", 1 + 0.1 * k, 5 - 0.05 * k, 4.9 - 0.05 * k, 5.1 - 0.05 * k) for k in range(6)]
    with pytest.raises(ValueError, match="b1="):
        fit_latency(runs)
    model = unit_slope(runs)
    assert model.predict(1.5).mean - model.predict(1.0).mean == pytest.approx(0.5)
    rest = [run.measured_ms - run.sum_ms for run in runs]
    others = sum(rest[1:]) / 5
    assert model.residuals[0] == pytest.approx((rest[0] - others) / runs[0].measured_ms)


def test_a_disturbed_run_counts_less() -> None:
    """One of twelve took 30 % longer, and its own interval says so; told as steady, it would bend the map."""
    sums = [4.0 + k for k in range(12)]
    steady = [Run(f"p{k}", s, 5 + 1.2 * s, (5 + 1.2 * s) * 0.99, (5 + 1.2 * s) * 1.01) for k, s in enumerate(sums)]
    slow = 1.3 * steady[2].measured_ms
    hidden, told = (Run("p2", sums[2], slow, slow * (1 - w), slow * (1 + w)) for w in (0.01, 0.25))
    bent, straight = (fit_latency([*steady[:2], run, *steady[3:]]) for run in (hidden, told))
    true = 5 + 1.2 * sums[0]
    assert abs(straight.predict(sums[0]).mean / true - 1) < 0.005 < 0.04 < abs(bent.predict(sums[0]).mean / true - 1)
    assert fit_latency(steady).predict(sums[0]).mean == pytest.approx(true, rel=1e-6)
