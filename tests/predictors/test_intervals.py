"""Intervals against their definitions and their promised coverage."""

import numpy as np
import pytest
from scipy import stats

from predictors.intervals import (
    Interval,
    conformal_half_width,
    mean_interval,
    median_interval,
    normal_interval,
    paired_difference,
    spearman,
)


def test_conformal_takes_the_right_order_statistic() -> None:
    residuals = np.array([-1.0, 2.0, -3.0, 4.0, -5.0, 6.0, -7.0, 8.0, -9.0])
    assert conformal_half_width(residuals, 0.9) == 9.0
    assert conformal_half_width(residuals, 0.8) == 8.0
    assert conformal_half_width(residuals, 0.5) == 5.0
    assert conformal_half_width([*residuals, 10.0], 0.8) == 9.0  # the 8.8th of 11, not the 8th of 10


def test_conformal_covers_with_many_and_with_few() -> None:
    g = np.random.default_rng(0)
    for n in (3, 5, 9, 30):
        inside = [abs(g.normal()) <= conformal_half_width(g.normal(size=n), 0.9) for _ in range(3000)]
        assert 0.88 <= np.mean(inside) <= 0.96


def test_conformal_with_too_few_is_wider_than_the_greatest() -> None:
    assert conformal_half_width([0.1, -0.4, 0.2], 0.9) >= 0.4
    with pytest.raises(ValueError, match="at least 2"):
        conformal_half_width([0.1])


@pytest.mark.parametrize("n", [6, 9, 15, 40])
def test_median_interval_covers_and_is_narrowest(n: int) -> None:
    g = np.random.default_rng(1)
    samples = g.exponential(size=(2000, n))
    found = [median_interval(row, 0.95) for row in samples]
    assert np.mean([i.lo <= np.log(2) <= i.hi for i in found]) >= 0.94
    ordered = np.sort(samples[0])
    below = int(np.flatnonzero(ordered == found[0].lo)[0])
    assert found[0].hi == ordered[n - 1 - below]
    if below + 1 < (n + 1) // 2:  # one order statistic further in would promise too much
        assert stats.binom.cdf(below + 1, n, 0.5) > 0.025


def test_few_samples_give_their_extremes() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0)
    assert median_interval([5.0]) == Interval(5.0, 5.0, 5.0)


def test_normal_and_mean_intervals() -> None:
    interval = normal_interval(2.0, 0.5, 0.95)
    assert interval.hi - 2.0 == pytest.approx(0.5 * 1.959964, rel=1e-5)
    values = [1.0, 2.0, 4.0, 3.5]
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    found = mean_interval(values, 0.9)
    assert (found.lo, found.hi) == pytest.approx(expected)


def test_paired_differences_see_through_what_both_share() -> None:
    g = np.random.default_rng(2)
    shared = g.normal(0, 10, 40)
    better = shared + g.normal(-0.5, 0.3, 40)
    interval = paired_difference(better, shared)
    assert interval.hi < 0 < interval.mean + 1 and interval.hi - interval.lo < 0.4
    nothing = paired_difference(shared + g.normal(0, 0.3, 40), shared)
    assert nothing.lo < 0 < nothing.hi
    assert paired_difference(better, shared) == interval
    few = paired_difference(better[:5], shared[:5])
    assert few == mean_interval(better[:5] - shared[:5])
    with pytest.raises(ValueError, match="for every sequence"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_spearman_matches_scipy_and_knows_when_it_says_nothing() -> None:
    g = np.random.default_rng(3)
    a, b = g.integers(0, 6, 30), g.integers(0, 6, 30)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None


def test_bounds_stand_around_the_mean() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Interval(1.0, 2.0, 3.0)
