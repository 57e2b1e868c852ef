"""Intervals: conformal half-widths, order statistics of a median, normal and paired differences. NumPy and SciPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtri, stdtrit


@dataclass(frozen=True)
class Interval:
    """A value with its bounds, in the value's unit."""

    mean: float
    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not self.lo <= self.mean <= self.hi:
            raise ValueError(f"interval: {self.lo} <= {self.mean} <= {self.hi} does not hold")


def conformal_half_width(residuals: ArrayLike, coverage: float = 0.9) -> float:
    """Half the width of a prediction interval from residuals on points that were not fitted (split or leave-one-out).

    The ceil((n + 1) * coverage)-th smallest absolute residual, which covers a new exchangeable point with at least `coverage`.
    With too few residuals for that order statistic to exist (fewer than 9 for 0.9), Student's t for a new normal residual around
    zero, not less than the greatest residual. Raises ValueError on fewer than 2. Lei et al. 2018, algorithm 2.
    """
    values = _finite(residuals, 2)
    _check(coverage)
    n = len(values)
    order = int(np.ceil((n + 1) * coverage - 1e-9))
    if order <= n:
        return float(np.sort(np.abs(values))[order - 1])
    spread = float(np.sqrt(np.mean(values**2) * (1 + 1 / n)))
    return max(float(stdtrit(n, (1 + coverage) / 2)) * spread, float(np.abs(values).max()))


def median_interval(samples: ArrayLike, coverage: float = 0.95) -> Interval:
    """The median and the narrowest symmetric pair of order statistics that covers it, whatever the distribution.

    With too few samples for `coverage` (fewer than 6 for 0.95) the bounds are the extremes. Raises ValueError on no sample.
    """
    values = np.sort(_finite(samples, 1))
    _check(coverage)
    n = len(values)
    below = 0  # P(lo, the (below + 1)-th smallest, is above the median) = P(Binomial(n, 1/2) <= below)
    while below + 1 < (n + 1) // 2 and float(bdtr(below + 1, n, 0.5)) <= (1 - coverage) / 2:
        below += 1
    return Interval(float(np.median(values)), float(values[below]), float(values[n - 1 - below]))


def normal_interval(mean: float, stderr: float, coverage: float = 0.95) -> Interval:
    """`mean` with normal bounds; stderr: standard error, not negative."""
    _check(coverage)
    if not stderr >= 0:
        raise ValueError(f"normal interval: stderr={stderr}; it must be a number that is not negative")
    half = float(ndtri((1 + coverage) / 2)) * stderr
    return Interval(mean, mean - half, mean + half)


def mean_interval(samples: ArrayLike, coverage: float = 0.95) -> Interval:
    """The mean of independent samples with Student's bounds; raises ValueError on fewer than 2."""
    values = _finite(samples, 2)
    _check(coverage)
    n = len(values)
    half = float(stdtrit(n - 1, (1 + coverage) / 2)) * float(values.std(ddof=1)) / np.sqrt(n)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    first: ArrayLike, second: ArrayLike, coverage: float = 0.95, *, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `first - second` over pairs (the same sequences under two policies), with bootstrap percentile bounds.

    A difference is beyond the noise where the interval leaves out 0. Below 8 pairs the bootstrap is too narrow and Student's bounds
    stand instead. Raises ValueError on unequal lengths or fewer than 2 pairs.
    """
    a, b = _finite(first, 2), _finite(second, 2)
    if len(a) != len(b):
        raise ValueError(f"paired difference: {len(a)} and {len(b)} values; give one of each for every sequence")
    difference = a - b
    if len(difference) < 8:
        return mean_interval(difference, coverage)
    _check(coverage)
    picks = np.random.default_rng(seed).integers(0, len(difference), size=(n_resamples, len(difference)))
    means = difference[picks].mean(axis=1)
    lo, hi = np.quantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    mean = float(difference.mean())
    return Interval(mean, min(float(lo), mean), max(float(hi), mean))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0, ties sharing their mean rank."""
    array = np.asarray(values, dtype=np.float64)
    _, group, counts = np.unique(array, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Rank correlation, ties by mean rank; None where one of the two does not vary or there are fewer than 3 pairs."""
    a, b = ranks(first), ranks(second)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _finite(values: ArrayLike | Sequence[float], least: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        raise ValueError(f"interval: needs a list of at least {least} finite numbers, got {array.shape} {array.tolist()[:5]}")
    return array


def _check(coverage: float) -> None:
    if not 0 < coverage < 1:
        raise ValueError(f"interval: coverage={coverage}; use a number between 0 and 1, 0.9 for ninety per cent")
