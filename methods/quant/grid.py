"""The grid of a weight: the scale and offset of every group, as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import SCALE_DTYPE


@dataclass(frozen=True)
class Grid:
    """scale, offset: (d_out, n_groups) bf16; no scale is zero; offset is None for a symmetric format.

    A symmetric scale below 8 bits may be negative (`range_grid`).
    """

    scale: Tensor
    offset: Tensor | None = None


def grouped(weight: Tensor, fmt: Format) -> Tensor:
    """Weight (d_out, d_in) -> (d_out, n_groups, group), fp32; raises ValueError where the group does not divide d_in."""
    d_out, d_in = weight.shape
    return weight.float().reshape(d_out, fmt.groups(d_in), fmt.group_size(d_in))


def range_grid(low: Tensor, high: Tensor, fmt: Format) -> Grid:
    """The grid that spans [low, high]; low, high: (d_out, n_groups).

    Asymmetric: the lowest code is `low` as stored, the highest is `high`.
    Symmetric: the value of larger magnitude takes the code -2**(b-1), which the grid has on one side only, and the scale carries its
    sign: steps of max|w| / 2**(b-1) instead of max|w| / (2**(b-1) - 1). Eight bits use [-127, 127] and a positive scale.
    """
    if not fmt.symmetric:
        offset = low.to(SCALE_DTYPE)
        return Grid(safe_scale((high - offset.float()).clamp(min=0) / (fmt.levels - 1)), offset)
    if fmt.bits == 8:
        return Grid(safe_scale(torch.maximum(high, -low) / 127))
    extreme = torch.where(high > -low, high, low)
    return Grid(safe_scale(extreme / -(fmt.levels // 2)))


def safe_scale(scale: Tensor) -> Tensor:
    """The scale as stored (bf16), 1 where a group is constant or all zero, so that nothing is ever divided by zero."""
    stored = scale.to(SCALE_DTYPE)
    return torch.where(stored.abs() >= torch.finfo(SCALE_DTYPE).tiny, stored, torch.ones_like(stored))


def payload(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """What `decode` reads: codes (d_out, d_in) uint8 with their grid."""
    offset = {} if grid.offset is None else {"offset": grid.offset}
    return {"codes": codes, "scale": grid.scale, **offset}


def fit_in_chunks(weight: Tensor, fit: Callable[[Tensor], Grid], chunk: int = 2**16) -> Grid:
    """`fit` applied to chunks of rows, small enough to stay in the cache: for fitters that pass over their weights many times."""
    parts = [fit(part) for part in torch.split(weight.float(), max(1, chunk // weight.shape[1]))]
    offsets = [part.offset for part in parts if part.offset is not None]
    return Grid(torch.cat([part.scale for part in parts]), torch.cat(offsets) if offsets else None)
