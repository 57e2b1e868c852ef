"""Fitter `mse`: the range of each group whose rounded weights are nearest to the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.elements import OWN_LEVELS
from methods.formats.format import Format
from methods.formats.numerics import ladder_of
from methods.quant.grid import Grid, fit_in_chunks, grouped, pooled, stored
from methods.quant.minmax import minmax

SHRINK = tuple(1 - step / 25 for step in range(1, 18))
"""Parts of the min-max range that are tried: 0.96, 0.92, …, 0.32. Two bits and whole rows want the small ones."""
LEAST = {2: 0.32, 3: 0.44, 4: 0.56, 5: 0.64, 6: 0.72, 7: 0.8, 8: 0.84}
"""The smallest part worth trying, by bits, where groups share a scale: the finer the grid, the less clipping pays."""
FULL = tuple(1 + step / 25 for step in range(4, -1, -1))
"""Wider scales for a symmetric grid's other sign, whose longer half lies on the side without the extreme value."""
AROUND = tuple(1 + step / 25 for step in (*range(-10, 0), *range(1, 11)))
"""For signs and ternary weights, whose scale starts near the best one instead of at the largest weight."""
POWERS = (2.0, 0.5)
"""For scales that are powers of two."""

Ideal = tuple[Tensor, Tensor | None]
"""Scales and offsets (n_blocks, n_groups) fp32 before they are stored."""


def mse(weight: Tensor, fmt: Format) -> Grid:
    """For every group the candidate of least squared rounding error, `minmax` among them; weight: (d_out, d_in).

    Never worse than `minmax` in any group: candidates are judged as they are stored, those of two levels on the second level of `minmax`.
    On minifloats with a scale a channel this searches LLM-FP4's real exponent bias, of which such a scale is the power of two.
    Raises ValueError for elements whose levels are fitted one by one.
    """
    if fmt.element in OWN_LEVELS:
        raise ValueError(f"mse: {fmt.name} has levels that are fitted one by one; use a fitter for {fmt.element}")
    return fit_in_chunks(weight, lambda rows: _fit(rows, fmt)) if fmt.by_rows else _fit(weight.float(), fmt)


def _fit(weight: Tensor, fmt: Format) -> Grid:
    groups, d_out = grouped(weight, fmt), len(weight)
    full = minmax(weight, fmt)
    best, best_offset = _ideal(full, fmt)
    least = squared_error(groups, full, fmt)
    for scale, offset in _candidates(groups, full, fmt):
        error = squared_error(groups, stored(fmt, d_out, scale, offset, full), fmt)
        better = error < least
        least = torch.where(better, error, least)
        best_offset = None if offset is None or best_offset is None else torch.where(better, offset, best_offset)
        best = torch.where(better, scale, best)
    return stored(fmt, d_out, best, best_offset, full)


def _ideal(grid: Grid, fmt: Format) -> Ideal:
    offset = None if grid.offset is None else scales.shared(fmt, grid.offset.float())
    return scales.shared(fmt, grid.scale.float()), offset


def _candidates(groups: Tensor, full: Grid, fmt: Format) -> Iterator[Ideal]:
    scale, _ = _ideal(full, fmt)
    if fmt.symmetric:
        for part in _parts(fmt):
            yield scale * part, None
        if fmt.lopsided:
            for part in [*FULL, *_parts(fmt)]:
                yield scale * -part, None
        return
    low, high = groups.aminmax(dim=-1)
    low, high = pooled(low, fmt, lambda v: v.amin(0)), pooled(high, fmt, lambda v: v.amax(0))
    for part in _parts(fmt):
        cut = (high - low) * ((1 - part) / 2)
        origin = scales.read(fmt, "offset", scales.write(fmt, "offset", low + cut, full.parts)).float()
        yield (high - cut - origin).clamp(min=0) / (fmt.levels - 1), low + cut


def _parts(fmt: Format) -> Sequence[float]:
    if fmt.codec == "e8m0":
        return POWERS
    if fmt.element in ("bin", "tern"):
        return AROUND
    return [part for part in SHRINK if fmt.group == -1 or part > LEAST[fmt.bits] - 1e-9]


def squared_error(groups: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """Of each set of groups that share a scale, (n_blocks, n_groups), with the arithmetic of `encode` and `decode`."""
    scale = grid.scale.float()[..., None]
    offset = 0.0 if grid.offset is None else grid.offset.float()[..., None]
    steps = (groups - offset) / scale
    rungs = ladder_of(fmt)
    if rungs is not None:
        steps = rungs.values[rungs.nearest(steps)]
    else:
        shift = fmt.levels // 2 if fmt.symmetric else 0
        lowest, highest = fmt.code_range
        steps = steps.round_().clamp_(lowest - shift, highest - shift)
    return pooled(steps.mul_(scale).add_(offset).sub_(groups).square_().sum(-1), fmt, lambda v: v.sum(0))
