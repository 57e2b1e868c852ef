"""Fitter `bcq`: weights as sums of a few signed terms, `w = sum_i a_i b_i (+ z)` with b_i = -1 or 1, by alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.levels import ladder
from methods.formats.numerics import SCALE_DTYPE, binary_levels
from methods.quant.grid import Grid, grouped, level_grid

_RIDGE = 1e-6


def greedy(weight: Tensor, fmt: Format) -> Grid:
    """Each term the mean magnitude of what those before left, z the mean of the group where the format has an offset.

    weight: (d_out, d_in). With one term and no offset: mean|w|. Network sketching (Guo 2017), algorithm 1.
    """
    return _grid(weight, fmt, *_greedy(grouped(weight, fmt), fmt))


def bcq(weight: Tensor, fmt: Format, rounds: int) -> Grid:
    """`rounds` times nearest codes, then the terms (and z) that are least squares for them; weight: (d_out, d_in).

    0 rounds are `greedy`. Every group keeps the terms of least squared error, as stored, that it met, so that more rounds never do harm.
    Alternating multi-bit quantization (Xu 2018), section 3; LUT-GEMM (Park 2022) for the offset. Deviation: a small ridge, where codes
    leave terms undetermined.
    """
    groups = grouped(weight, fmt)
    alpha, offset = _greedy(groups, fmt)
    best, least = (alpha, offset), _error(groups, alpha, offset)
    for _ in range(rounds):
        alpha, offset = _solve(groups, _signs(groups, alpha, offset), offset)
        error = _error(groups, alpha, offset)
        better = error < least
        least = torch.where(better, error, least)
        origin = None if offset is None or best[1] is None else torch.where(better, offset, best[1])
        best = torch.where(better[..., None], alpha, best[0]), origin
    return _grid(weight, fmt, *best)


def from_integer(fmt: Format, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The terms and offset of an integer grid `scale * u + offset`: a_i = scale 2**(i-1), z = offset + scale (2**q - 1) / 2.

    scale, offset: (d_out, n_groups) fp32 -> (d_out, n_groups, q) and (d_out, n_groups) fp32. LUT-GEMM (Park 2022), section 3.2: uniform
    grids are binary codes whose bits are the code's own.
    """
    powers = torch.tensor([2.0 ** (i - 1) for i in range(fmt.bits)])
    return scale[..., None] * powers, offset + scale * ((fmt.levels - 1) / 2)


def _greedy(groups: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    offset = None if fmt.symmetric else _stored(groups.mean(-1))
    rest = groups if offset is None else groups - offset[..., None]
    terms = []
    for _ in range(fmt.bits):
        term = _stored(rest.abs().mean(-1))
        rest = rest - torch.where(rest > 0, 1.0, -1.0) * term[..., None]
        terms.append(term)
    return torch.stack(terms, -1), offset


def _signs(groups: Tensor, alpha: Tensor, offset: Tensor | None) -> Tensor:
    """b (d_out, n_groups, group, q) of the nearest codes."""
    rungs = ladder(binary_levels(alpha))
    codes = rungs.codes.gather(-1, rungs.nearest(groups if offset is None else groups - offset[..., None]))
    return torch.stack([(codes >> i & 1) * 2.0 - 1 for i in range(alpha.shape[-1])], -1)


def _solve(groups: Tensor, signs: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    basis = signs if offset is None else torch.cat([signs, torch.ones_like(signs[..., :1])], -1)
    gram = basis.transpose(-1, -2) @ basis
    ridge = _RIDGE * groups.shape[-1] * torch.eye(gram.shape[-1])
    found = torch.linalg.solve(gram + ridge, basis.transpose(-1, -2) @ groups[..., None])[..., 0]
    if offset is None:
        return _stored(found), None
    return _stored(found[..., :-1]), _stored(found[..., -1])


def _error(groups: Tensor, alpha: Tensor, offset: Tensor | None) -> Tensor:
    rungs = ladder(binary_levels(alpha))
    values = groups if offset is None else groups - offset[..., None]
    return (rungs.values.gather(-1, rungs.nearest(values)) - values).square().sum(-1)


def _grid(weight: Tensor, fmt: Format, alpha: Tensor, offset: Tensor | None) -> Grid:
    parts = {"alpha": alpha.to(SCALE_DTYPE)}
    return level_grid(fmt, len(weight), parts if offset is None else {**parts, "offset": offset.to(SCALE_DTYPE)})


def _stored(values: Tensor) -> Tensor:
    return values.to(SCALE_DTYPE).float()
