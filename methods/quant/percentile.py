"""Fitter `percentile`: the grid that spans each group but for its most extreme weights."""

from __future__ import annotations

from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, fit_in_chunks, grouped
from methods.quant.minmax import minmax


def percentile(weight: Tensor, fmt: Format, percent: float) -> Grid:
    """The grid of `minmax` for the weights clipped to their group's (100 - percent)-th and percent-th percentile.

    weight: (d_out, d_in); percent: 50 < percent <= 100, where 100 is `minmax`. Between two weights the percentile is interpolated.
    """
    return fit_in_chunks(weight, lambda rows: _fit(rows, fmt, percent / 100))


def _fit(weight: Tensor, fmt: Format, part: float) -> Grid:
    groups = grouped(weight, fmt)
    ranks = groups.sort(-1).values
    last = ranks.shape[-1] - 1
    low, high = _at(ranks, (1 - part) * last), _at(ranks, part * last)
    return minmax(groups.clamp(low[..., None], high[..., None]).reshape(weight.shape), fmt)


def _at(ranks: Tensor, place: float) -> Tensor:
    """The value (d_out, n_groups) at a place between two of the sorted weights (d_out, n_groups, group)."""
    below = int(place)
    above = min(below + 1, ranks.shape[-1] - 1)
    return ranks[..., below].lerp(ranks[..., above], place - below)
