"""Outlier-victim pairs: where one of two neighbours is beyond the grid, the other becomes zero and both codes serve the one."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.sides import abfloat, pairs
from methods.quant.grid import Grid, fit_in_chunks, grouped, safe_scale
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.task import Rounded, Task

WIDEST = 7
"""The last step of the grid for normal values; its 16th code marks the victim of a pair."""
SEARCH = tuple(3 * (1 + step / 50) for step in range(-25, 51))
"""Ends of the normal range that are tried, in standard deviations of the group about zero: around 3, in steps of 2 %."""

_OUTLIERS = torch.arange(1, 8, dtype=torch.uint8)
"""Code 0 is the victim's, so that 8 steps have none."""


def by_pair_scale(task: Task) -> Grid:
    """The fitter; knob `pairs`: false leaves outliers on the grid that spans them."""
    return olive(task.weight, task.fmt) if task.knobs["pairs"] else minmax(task.weight, task.fmt)


def by_pairs(task: Task, grid: Grid) -> Rounded:
    """The rounder; knob `pairs`."""
    if task.knobs["pairs"]:
        return Rounded(pair_codes(task.weight, task.fmt, grid))
    return Rounded(nearest(task.weight, task.fmt, grid)["codes"])


def as_pairs(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """What tells the decoder that codes stand in pairs; knob `pairs`."""
    return pairs() if task.knobs["pairs"] else {}


def olive(weight: Tensor, fmt: Format) -> Grid:
    """The scale of each group, of those in `SEARCH`, with the least squared error of its pairs; weight: (d_out, d_in).

    OliVe (Guo 2023), section 4.
    """
    return fit_in_chunks(weight, lambda rows: _fit(grouped(rows, fmt)))


def pair_codes(weight: Tensor, fmt: Format, grid: Grid) -> Tensor:
    """Codes (d_out, d_in) uint8 of a weight in pairs, decoded with `methods.formats.sides.pairs`; 0 where an element is a victim.

    The larger of two neighbours is an outlier where it rounds beyond `WIDEST` steps. OliVe (Guo 2023), algorithm 1.
    """
    steps = grouped(weight, fmt) / grid.scale.float()[..., None]
    normal, outlier, victim = _pairs(steps)
    codes = torch.where(outlier, _outlier_code(steps), (normal + 8).to(torch.uint8))
    return codes.masked_fill(victim, 0).view(weight.shape)


def _fit(groups: Tensor) -> Grid:
    deviation = groups.square().mean(-1).sqrt()
    pairs_of = groups.abs().view(*groups.shape[:2], -1, 2)
    best = safe_scale(deviation * (SEARCH[0] / WIDEST))
    least = _squared_error(pairs_of, best)
    for end in SEARCH[1:]:
        scale = safe_scale(deviation * (end / WIDEST))
        error = _squared_error(pairs_of, scale)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return Grid(best)


def _squared_error(magnitudes: Tensor, scale: Tensor) -> Tensor:
    """Of each group (d_out, n_groups), as `pair_codes` rounds it; magnitudes: (d_out, n_groups, group / 2, 2)."""
    steps = magnitudes / scale.float()[..., None, None]
    errors = (steps - steps.round()).square_().sum(-1)
    outliers = steps.amax(-1).round() > WIDEST
    larger, victim = steps[outliers].amax(-1), steps[outliers].amin(-1)
    errors[outliers] = (larger - abfloat(_outlier_code(larger))).square() + victim.square()
    return errors.sum(-1) * scale.float().square()


def _pairs(steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each element rounded to the normal range, and whether it is an outlier, or the victim of one; steps: (…, group)."""
    normal = steps.round()
    beside = _swapped(steps)
    first = torch.arange(steps.shape[-1]) % 2 == 0
    larger = (steps.abs() > beside.abs()) | ((steps.abs() == beside.abs()) & first)
    outlier = (normal.abs() > WIDEST) & larger
    victim = _swapped(outlier)
    return normal.clamp(-WIDEST, WIDEST), outlier, victim


def _swapped(values: Tensor) -> Tensor:
    """The other element of each pair, in its place; values: (…, group)."""
    return values.view(*values.shape[:-1], -1, 2).flip(-1).reshape(values.shape)


def _outlier_code(steps: Tensor) -> Tensor:
    """The nearest outlier's code, uint8."""
    magnitudes = abfloat(_OUTLIERS)
    nearest = torch.bucketize(steps.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
    return _OUTLIERS[nearest] + 8 * (steps < 0).to(torch.uint8)
