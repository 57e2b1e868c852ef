"""Fitter `kl`: clips every group of a row at the part of its range that keeps the row's distribution of weights best."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, fit_in_chunks, grouped
from methods.quant.minmax import minmax
from methods.quant.mse import SHRINK

BINS = 8
"""Bins of the histogram to a step of the grid."""


def kl(weight: Tensor, fmt: Format) -> Grid:
    """The grid of `minmax` for a part of each group's range, one for all groups of a row; weight: (d_out, d_in).

    Weights are placed within their group's range and counted over the row, those beyond the clipped range in its outermost bins. Of the
    parts 1 and `SHRINK` it takes that of least divergence of this histogram from the one that rounding leaves: what lies within the range,
    spread evenly over the occupied bins of each step. Symmetric formats clip around zero, others around the middle of the range.
    The calibration of TensorRT (Migacz 2017), made for activations, on the distribution of weights.
    """
    return fit_in_chunks(weight, lambda rows: _fit(rows, fmt))


def _fit(weight: Tensor, fmt: Format) -> Grid:
    groups = grouped(weight, fmt)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    place = torch.where(high > low, (groups - low) / (high - low), 0.5).flatten(1)
    best = torch.ones(len(weight))
    least = divergence(place, fmt.levels)
    for part in SHRINK:
        found = divergence((place - 0.5) / part + 0.5, fmt.levels)
        best, least = torch.where(found < least, part, best), torch.minimum(found, least)
    cut = (high - low) * ((1 - best[:, None, None]) / 2)
    return minmax(groups.clamp(low + cut, high - cut).view_as(weight), fmt)


def divergence(place: Tensor, levels: int) -> Tensor:
    """Kullback-Leibler divergence (rows,) in nats of values from what is left of them by `levels` even steps from 0 to 1.

    place: (rows, n), what lies outside [0, 1] being clipped. Infinite where a step holds nothing but what was clipped to it.
    """
    rows, n_bins = len(place), levels * BINS
    inside = ((place >= 0) & (place <= 1)).to(place.dtype)
    bins = (place * n_bins).floor_().clamp_(0, n_bins - 1).long()
    empty = torch.zeros(rows, n_bins, dtype=place.dtype)
    counted = empty.scatter_add(1, bins, torch.ones_like(place)).view(rows, levels, BINS)
    within = empty.scatter_add(1, bins, inside).view(rows, levels, BINS).sum(-1, keepdim=True)
    occupied = counted > 0
    spread = within / occupied.sum(-1, keepdim=True).clamp(min=1)
    p = counted / place.shape[1]
    q = (spread / within.sum((1, 2), keepdim=True)).expand_as(p)
    return torch.where(occupied, p * (p.clamp(min=1e-30) / q).log(), 0.0).sum((1, 2))
