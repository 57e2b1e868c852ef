"""Weighted k-means of scalars, many rows at once, over sorted values: an assignment is `k - 1` cuts, a mean a difference of prefix sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def kmeans(values: Tensor, weights: Tensor, n_levels: int, iterations: int) -> Tensor:
    """Levels (rows, n_levels) fp64, ascending, of small `sum(weights * (values - nearest level)**2)`; values, weights: (rows, n).

    weights >= 0; a row whose weights are all zero counts its values alike. At most `iterations` of Lloyd's steps, fewer where no level
    moves. They start from levels whose density is the cube root of that of the weights, the best one for many levels (Panter and Dite
    1951): where a few values carry most of the weight, levels at quantiles of either end with up to twice the error.
    """
    values, order = values.double().sort(1)
    weights = _nonzero(weights.double().gather(1, order))
    gaps = torch.cat([values[:, :1], values, values[:, -1:]], 1)
    gaps = (gaps[:, 2:] - gaps[:, :-2]) / 2
    # Density f of the weights over x: the integral of f**(1/3) dx is the sum of (weight / gap)**(1/3) * gap.
    levels = _quantiles(values, (weights * gaps.square()) ** (1 / 3), n_levels)
    for _, moved in zip(range(iterations), lloyd(values, weights, levels), strict=False):
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def lloyd(values: Tensor, weights: Tensor, levels: Tensor) -> Iterator[Tensor]:
    """What 1, 2, … of Lloyd's steps make of levels (rows, k) ascending; values (rows, n) ascending, their weights >= 0; all fp64.

    A level that no value is nearest to, or only values of weight zero, stays where it is.
    """
    sums, moments = _running(weights), _running(weights * values)
    first, last = torch.zeros(len(values), 1, dtype=torch.long), torch.full((len(values), 1), values.shape[1])
    while True:
        cuts = torch.cat([first, torch.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2), last], 1)
        inside = sums.gather(1, cuts).diff(dim=1)
        means = moments.gather(1, cuts).diff(dim=1) / inside
        # A difference of running sums is off by an ulp of the sum, which must not take a mean out of its bin.
        low = values.gather(1, cuts[:, :-1].clamp(max=values.shape[1] - 1))
        high = values.gather(1, cuts[:, 1:].clamp(min=1) - 1)
        levels = torch.where(inside > 0, means.clamp(low, high), levels)
        yield levels


def _nonzero(weights: Tensor) -> Tensor:
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))


def _quantiles(values: Tensor, mass: Tensor, n: int) -> Tensor:
    """The values (rows, n) behind which 1/2n, 3/2n, … of the mass stand; values: (rows, m) ascending."""
    before = _running(mass)
    marks = torch.searchsorted(before, before[:, -1:] * ((torch.arange(n) + 0.5) / n))
    return values.gather(1, marks.clamp(min=1) - 1)


def _running(values: Tensor) -> Tensor:
    """(rows, n) -> (rows, n + 1), the sums of the first 0, 1, … n."""
    return torch.cat([values.new_zeros(len(values), 1), values.cumsum(1)], 1)
