"""The grid of a weight: the scale, offset and levels of every group as they are computed with, and what is stored of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.activations import ocp_scale
from methods.formats.elements import OWN_LEVELS, largest, lowest
from methods.formats.format import Format
from methods.formats.numerics import SCALE_DTYPE, own_levels
from methods.threads import shared_out


@dataclass(frozen=True)
class Grid:
    """scale, offset: (d_out, n_groups) as computed with; no scale is zero; offset is None for a symmetric format.

    levels: (d_out, n_groups, n) by code where groups have levels of their own, scales then being 1.
    stored: the payload's parts where they are not `scale` and `offset` themselves; a grid with stored parts is made by `stored`.
    A scale may be negative where its codec can hold that (`range_grid`).
    """

    scale: Tensor
    offset: Tensor | None = None
    levels: Tensor | None = None
    stored: Mapping[str, Tensor] | None = None

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """What the payload holds of the grid."""
        if self.stored is not None:
            return self.stored
        return {"scale": self.scale} if self.offset is None else {"scale": self.scale, "offset": self.offset}


def grouped(weight: Tensor, fmt: Format) -> Tensor:
    """Weight (d_out, d_in) -> (d_out, n_groups, group), fp32; raises ValueError where the group does not divide d_in."""
    d_out, d_in = weight.shape
    return weight.float().reshape(d_out, fmt.groups(d_in), fmt.group_size(d_in))


def pooled(values: Tensor, fmt: Format, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """(d_out, n_groups) -> (n_blocks, n_groups), `pool` over the rows of each set that shares scales, e.g. `lambda v: v.amax(0)`."""
    if fmt.rows == 1:
        return values
    return torch.stack([pool(part) for part in torch.split(values, len(values) if fmt.rows == -1 else fmt.rows)])


def stored(fmt: Format, d_out: int, scale: Tensor, offset: Tensor | None = None, like: Grid | None = None) -> Grid:
    """The grid that a weight has where its ideal scales and offsets, fp32 (n_blocks, n_groups), are stored by the format's codec.

    like: a grid of the same weight whose second level is taken over (`methods.formats.scales.write`).
    """
    upper = None if like is None else like.parts
    parts = scales.write(fmt, "scale", scale, upper)
    used = scales.spread(fmt, scales.read(fmt, "scale", parts), d_out)
    if offset is None:
        return Grid(used) if fmt.rows == 1 and len(parts) == 1 and used is parts["scale"] else Grid(used, stored=parts)
    below = scales.write(fmt, "offset", offset, upper, scale)
    origin = scales.spread(fmt, scales.read(fmt, "offset", {**parts, **below}), d_out)
    plain = fmt.rows == 1 and used is parts["scale"]
    return Grid(used, origin) if plain else Grid(used, origin, stored={**parts, **below})


def level_grid(fmt: Format, d_out: int, parts: Mapping[str, Tensor]) -> Grid:
    """The grid of an element that stores its levels: `levels` (n_blocks, n_groups, n) or `alpha` (d_out, n_groups, q), in bf16.

    `offset` (d_out, n_groups) bf16 belongs to them where the format is asymmetric.
    """
    levels = own_levels(fmt, parts)
    if levels is None:
        raise ValueError(f"{fmt.name}: {fmt.element} has no levels of its own to store")
    spread = scales.spread(fmt, levels.flatten(1), d_out).view(d_out, *levels.shape[1:])
    return Grid(torch.ones(spread.shape[:2]), parts.get("offset"), spread, parts)


def range_grid(low: Tensor, high: Tensor, fmt: Format) -> Grid:
    """The grid that spans [low, high]; low, high: (d_out, n_groups).

    Asymmetric: the lowest code is `low` as stored, the highest is `high`.
    Symmetric integers: the value of larger magnitude takes the code -2**(b-1), which the grid has on one side only, and the scale carries
    its sign: steps of max|w| / 2**(b-1) instead of max|w| / (2**(b-1) - 1); likewise uneven integers (`nl`). Eight bits, and codecs
    without a sign, use both sides alike and a positive scale. Other elements: their largest level is the larger magnitude, but for powers
    of two, which are OCP's: 2**(floor(log2 max|w|) - the element's largest exponent), above which a little is cut off.
    Raises ValueError for elements whose levels are fitted, which span nothing.
    """
    if fmt.element in OWN_LEVELS:
        raise ValueError(f"{fmt.name}: its levels are fitted, not spread over a range; use a fitter for {fmt.element}")
    d_out = len(low)
    low, high = pooled(low, fmt, lambda v: v.amin(0)), pooled(high, fmt, lambda v: v.amax(0))
    if not fmt.symmetric:
        return stored(fmt, d_out, *spanning(low, high, fmt))
    top, reach = torch.maximum(high, -low), largest(fmt.element, fmt.bits)
    if fmt.codec == "e8m0":
        return stored(fmt, d_out, ocp_scale(top, reach))
    if not fmt.lopsided:
        return stored(fmt, d_out, top / reach)
    return stored(fmt, d_out, torch.where(high > -low, high, low) / lowest(fmt.element, fmt.bits))


def spanning(low: Tensor, high: Tensor, fmt: Format, like: Grid | None = None) -> tuple[Tensor, Tensor]:
    """The ideal scale and offset of an asymmetric grid of integers over [low, high]; all (n_blocks, n_groups).

    The highest code is `high` for the offset as it is stored. Zero points are stored after the scale, and for them the range is widened
    to hold zero, so that they are codes and a group far from zero does not coarsen those that are stored with it.
    like: as for `stored`.
    """
    if fmt.scales.least:
        low = low.clamp(max=0)
        return (high.clamp(min=0) - low) / (fmt.levels - 1), low
    origin = scales.read(fmt, "offset", scales.write(fmt, "offset", low, None if like is None else like.parts)).float()
    return (high - origin).clamp(min=0) / (fmt.levels - 1), low


def safe_scale(scale: Tensor) -> Tensor:
    """The scale as stored (bf16), 1 where a group is constant or all zero, so that nothing is ever divided by zero."""
    stored = scale.to(SCALE_DTYPE)
    return torch.where(stored.abs() >= torch.finfo(SCALE_DTYPE).tiny, stored, torch.ones_like(stored))


def payload(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """What `decode` reads: codes (d_out, d_in) uint8 with the parts of their grid."""
    return {"codes": codes, **grid.parts}


def fit_in_chunks(weight: Tensor, fit: Callable[[Tensor], Grid], chunk: int = 2**17) -> Grid:
    """`fit` applied to chunks of rows, small enough to stay in the cache: for fitters that pass over their weights many times.

    Chunks are shared out between torch's threads. The format has to store rows apart (`Format.by_rows`).
    """
    return joined(list(shared_out(fit, torch.split(weight.float(), max(1, chunk // weight.shape[1])))))


def joined(parts: Sequence[Grid]) -> Grid:
    """The grid of weights one below the other, from theirs."""

    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(found) if found else None

    names = parts[0].stored
    kept = None if names is None else {name: torch.cat([part.parts[name] for part in parts]) for name in names}
    return Grid(
        torch.cat([part.scale for part in parts]),
        cat([part.offset for part in parts]),
        cat([part.levels for part in parts]),
        kept,
    )
