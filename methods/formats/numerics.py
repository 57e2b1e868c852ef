"""Reference numerics: what a format computes, in fp32 and without regard to speed. Every kernel must agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.activations import rounded
from methods.formats.elements import OWN_LEVELS
from methods.formats.format import Format
from methods.formats.levels import Ladder, fixed, ladder, table
from methods.formats.sides import with_sides
from methods.formats.turns import POWER, inputs_back, is_turned, turned_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_DTYPE = torch.bfloat16
"""Where no codec says otherwise, scales, offsets and levels are stored in bf16: what bf16 checkpoints carry and what the kernels widen
with one shift."""


@dataclass(frozen=True)
class Compressed:
    """A weight under a format: `decode(format, payload)` equals `dense` bit for bit.

    dense: (d_out, d_in) fp32. payload: `weight` (d_out, d_in) of dense formats, of low rank `down` (rank, d_in) and `up` (d_out, rank)
    instead; or the parts of a grid:
    `codes` (d_out, d_in) uint8, and `scale` (d_out, n_groups) and, if asymmetric, `offset` of the same shape in bf16 or as the format's
    codec stores them (`methods.formats.scales`), or `levels` (n_blocks, n_groups, n) of look-up tables, or `alpha` (d_out, n_groups, q)
    of binary codes. Parts with a dot in their name stand beside the grid (`methods.formats.sides`).
    """

    dense: Tensor
    payload: Mapping[str, Tensor]
    format: Format

    @classmethod
    def of(cls, fmt: Format, payload: Mapping[str, Tensor]) -> Compressed:
        """The compressed weight of a payload."""
        return cls(decode(fmt, payload), payload, fmt)


def decode(fmt: Format, payload: Mapping[str, Tensor]) -> Tensor:
    """The weight (d_out, d_in) fp32 that a payload stands for: what its grid decodes to, with what stands beside it."""
    if fmt.rank:
        # Summed in float64 and rounded once, so that neither the order of the sum nor the place in memory shows.
        return (payload["up"].double().contiguous() @ payload["down"].double().contiguous()).float()
    if fmt.dense:
        return payload["weight"].float()
    return with_sides(decode_grid(fmt, payload), payload)


def shape_of(fmt: Format, payload: Mapping[str, Tensor]) -> tuple[int, int]:
    """(d_out, d_in) of the weight that a payload stands for."""
    if fmt.rank:
        return payload["up"].shape[0], payload["down"].shape[1]
    d_out, d_in = payload["weight" if fmt.dense else "codes"].shape
    return d_out, d_in


def decode_grid(fmt: Format, payload: Mapping[str, Tensor]) -> Tensor:
    """The weight (d_out, d_in) fp32 of the grid's parts alone.

    With bf16 scales `scale * u` is exact in fp32 (8 by 8 significant bits), so that one rounding, that of the offset's addition, is all
    there is; a scale of two levels is multiplied out first.
    """
    codes = payload["codes"]
    d_out, d_in = codes.shape
    n_groups = next(payload[part] for part in ("scale", "levels", "alpha") if part in payload).shape[1]
    grid = codes.view(d_out, n_groups, d_in // n_groups)
    own = own_levels(fmt, payload)
    if own is not None:
        values = scales.spread(fmt, own.flatten(1), d_out).view(d_out, n_groups, -1).gather(2, grid.long())
    elif fmt.element == "int":
        values = grid.float() - fmt.levels // 2 if fmt.symmetric else grid.float()
    else:
        values = table(fmt.element, fmt.bits)[grid.long()]
    if "scale" in payload:
        values = values * scales.spread(fmt, scales.read(fmt, "scale", payload), d_out).float()[..., None]
    if not fmt.symmetric:
        values = values + scales.spread(fmt, scales.read(fmt, "offset", payload), d_out).float()[..., None]
    return values.view(d_out, d_in)


def own_levels(fmt: Format, payload: Mapping[str, Tensor]) -> Tensor | None:
    """The levels by code, (n_blocks, n_groups, n) fp32, of elements that store them; None for the others."""
    if fmt.element == "lut":
        return payload["levels"].float()
    return binary_levels(payload["alpha"]) if fmt.element == "bcq" else None


def binary_levels(alpha: Tensor) -> Tensor:
    """The sums of signed terms: level[c] = sum_i a_i where bit i of c is set, - a_i where not; alpha: (…, q) -> (…, 2**q) fp32."""
    q = alpha.shape[-1]
    signs = torch.tensor([[1.0 if code >> i & 1 else -1.0 for i in range(q)] for code in range(2**q)])
    total = alpha.float()[..., :1] * signs[:, 0]
    for term in range(1, q):
        total = total + alpha.float()[..., term : term + 1] * signs[:, term]
    return total


def encode(weight: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None = None, levels: Tensor | None = None) -> Tensor:
    """Nearest codes (d_out, d_in) uint8 of a weight (d_out, d_in) on a fixed grid.

    scale, offset: (d_out, n_groups) as computed with. levels: (d_out, n_groups, n), for elements that store theirs; raises ValueError
    where they lack.
    """
    d_out, d_in = weight.shape
    groups = weight.float().view(d_out, scale.shape[1], d_in // scale.shape[1])
    origin = 0.0 if offset is None else offset.float()[..., None]
    steps = (groups - origin) / scale.float()[..., None]
    rungs = ladder_of(fmt, levels)
    if rungs is not None:
        codes, _ = rungs.take(rungs.nearest(steps))
        return codes.to(torch.uint8).view(d_out, d_in)
    shift = fmt.levels // 2 if fmt.symmetric else 0
    return (torch.round(steps) + shift).clamp_(*fmt.code_range).to(torch.uint8).view(d_out, d_in)


def ladder_of(fmt: Format, levels: Tensor | None = None) -> Ladder | None:
    """The levels of a format's element in order, those of a fitted one from `levels`; None for integers, which are computed."""
    if fmt.element == "int":
        return None
    if fmt.element not in OWN_LEVELS:
        return fixed(fmt.element, fmt.bits)
    if levels is None:
        raise ValueError(f"{fmt.name}: its levels are fitted; give those of the grid")
    return ladder(levels)


def quantize_activation(x: Tensor, fmt: Format, payload: Mapping[str, Tensor] | None = None) -> Tensor:
    """Activations (..., d_in) as the format's kernels see them, in fp32; see `methods.formats.activations.rounded`.

    payload: of the weight, where its inputs are treated in a way of their own: columns kept in 16 bits take their inputs as they are,
    `act.scale` makes the rounding static, and behind a rotation inputs are rounded as they are there.
    """
    if fmt.act_bits == 16:
        return x
    if payload is not None and is_turned(payload):
        return inputs_back(rounded(turned_inputs(x, payload).float(), fmt, payload), payload).float()
    return rounded(x, fmt, payload or {})


def linear(
    x: Tensor, weight: Tensor, fmt: Format, bias: Tensor | None = None, payload: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The format's linear layer: x (..., d_in), decoded weight (d_out, d_in) -> (..., d_out), all fp32."""
    return torch.nn.functional.linear(quantize_activation(x.float(), fmt, payload), weight, bias)


def payload_bits(fmt: Format, payload: Mapping[str, Tensor]) -> int:
    """Bits that a payload takes when packed: narrow codes at their width, everything else at its dtype's.

    Powers of two that other rows take over take none.
    """
    return sum(t.numel() * fmt.widths.get(name, t.element_size() * 8) for name, t in payload.items() if name != POWER)
