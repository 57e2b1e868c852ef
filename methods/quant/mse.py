"""Fitter `mse`: the range of each group whose rounded weights are nearest to the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.elements import OWN_LEVELS
from methods.formats.format import Format
from methods.formats.numerics import ladder_of
from methods.quant.grid import Grid, fit_in_chunks, grouped, pooled, spanning, stored
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

COARSE = 2
"""Of so many neighbouring parts one is tried first."""

Ideal = tuple[Tensor, Tensor | None]
"""Scales and offsets (n_blocks, n_groups) fp32 before they are stored."""


def mse(weight: Tensor, fmt: Format) -> Grid:
    """For every group the candidate of least squared rounding error, `minmax` among them; weight: (d_out, d_in).

    Every second part of the range is tried, then the neighbours of the best: the error is smooth in the scale but for what single weights
    do when they round the other way.
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
    candidate = _symmetric(full, fmt) if fmt.symmetric else _asymmetric(groups, full, fmt)
    best, best_offset = _ideal(full, fmt)
    least = squared_error(groups, full, fmt)

    def tried(parts: Tensor) -> None:
        """Takes the candidate of a part, one for all groups or one each, where it is better than the best so far."""
        nonlocal best, best_offset, least
        scale, offset = candidate(parts)
        error = squared_error(groups, stored(fmt, d_out, scale, offset, full), fmt)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
        best_offset = None if offset is None or best_offset is None else torch.where(better, offset, best_offset)
        chosen.copy_(torch.where(better, parts, chosen))

    ladder = torch.tensor(_ladder(fmt))
    chosen = torch.ones_like(least)
    coarse = ladder if len(ladder) <= 2 * COARSE else ladder[COARSE // 2 :: COARSE]
    for part in coarse:
        tried(part.expand_as(chosen))
    if len(coarse) < len(ladder):
        at = (ladder - chosen[..., None]).abs().argmin(-1)
        for step in range(-(COARSE // 2), COARSE // 2 + 1):
            if step:
                tried(ladder[(at + step).clamp(0, len(ladder) - 1)])
    return stored(fmt, d_out, best, best_offset, full)


def _ideal(grid: Grid, fmt: Format) -> Ideal:
    offset = None if grid.offset is None else scales.shared(fmt, grid.offset.float())
    return scales.shared(fmt, grid.scale.float()), offset


def _symmetric(full: Grid, fmt: Format) -> Callable[[Tensor], Ideal]:
    scale, _ = _ideal(full, fmt)
    return lambda parts: (scale * parts, None)


def _asymmetric(groups: Tensor, full: Grid, fmt: Format) -> Callable[[Tensor], Ideal]:
    low, high = groups.aminmax(dim=-1)
    low, high = pooled(low, fmt, lambda v: v.amin(0)), pooled(high, fmt, lambda v: v.amax(0))

    def candidate(parts: Tensor) -> Ideal:
        cut = (high - low) * ((1 - parts) / 2)
        return spanning(low + cut, high - cut, fmt, full)

    return candidate


def _ladder(fmt: Format) -> list[float]:
    """The parts that are tried, neighbours side by side; negative ones are of a symmetric grid's other sign."""
    if fmt.codec == "e8m0":
        return list(POWERS)
    if fmt.element in ("bin", "tern"):
        return list(AROUND)
    parts = [part for part in SHRINK if fmt.group == -1 or part > LEAST[fmt.bits] - 1e-9]
    lopsided = fmt.symmetric and fmt.lopsided
    return [*parts[::-1], 1.0, *([-part for part in (*FULL, *parts)] if lopsided else [])]


def squared_error(groups: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """Of each set of groups that share a scale, (n_blocks, n_groups), with the arithmetic of `encode` and `decode`."""
    scale = grid.scale.float()[..., None]
    centred = groups if grid.offset is None else groups - grid.offset.float()[..., None]
    steps = centred / scale
    rungs = ladder_of(fmt)
    if rungs is not None:
        steps = rungs.values[rungs.nearest(steps)]
    else:
        shift = fmt.levels // 2 if fmt.symmetric else 0
        lowest, highest = fmt.code_range
        steps = steps.round_().clamp_(lowest - shift, highest - shift)
    # offset + steps * scale - weight in one pass, and its squares and their sum in another
    error = torch.addcmul(centred, steps, scale, value=-1, out=steps)
    return pooled(torch.linalg.vecdot(error, error), fmt, lambda v: v.sum(0))
