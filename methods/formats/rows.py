"""Multiplying the rows of a stored weight by powers of two: what it decodes to is exactly as many times larger, its codes stay."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import Compressed
from methods.formats.turns import Payload

_BY_ROW = re.compile(r"weight|up|levels|alpha|columns\.value|low_rank\.left")
"""Parts whose first dimension are the rows and whose values are in proportion to the weight."""
_SCALES = re.compile(r"(scale|offset)(_super)?")
_STAYS = re.compile(
    r"down|codes|act\..*|turn\.(right_a|right_b|block|ratio|slots|power)|elements\.(column|count)|columns\.index|low_rank\.right"
    r"|pairs\.mark|residual\d+\.(packed|row)"
)


def lifted(compressed: Compressed, power: Tensor) -> Compressed:
    """The weight with row i times 2**power[i], bit for bit; power: (d_out,) int8, not negative.

    Raises ValueError, with the reason, for a format whose rows share scales, a rotation of the outputs, and what its dtype cannot hold.
    """
    fmt = compressed.format
    if not fmt.lifts:
        raise ValueError(f"{fmt.name} has scales that several rows share")
    factor = torch.exp2(power.float())
    return Compressed.of(fmt, {part: _part(fmt, part, compressed.payload, factor) for part in compressed.payload})


def multiplied(name: str, tensor: Tensor, factor: Tensor) -> Tensor:
    """The tensor (d_out, …) with its rows times powers of two (d_out,); raises ValueError where its dtype cannot hold that exactly."""
    wanted = tensor.double() * factor.double().view(-1, *[1] * (tensor.dim() - 1))
    result = wanted.to(tensor.dtype)
    if not torch.equal(result.double(), wanted):
        raise ValueError(f"{name} times {factor.max():.0f} leaves the range of {str(tensor.dtype).removeprefix('torch.')}")
    return result


def _part(fmt: Format, part: str, payload: Payload, factor: Tensor) -> Tensor:
    """The part of the lifted payload; every part is known to scale or to stay."""
    tensor = payload[part]
    if _STAYS.fullmatch(part):
        return tensor
    if _SCALES.fullmatch(part):
        second = f"{part}_super"
        if second in payload:  # codes of what the second level multiplies
            return tensor
        return _exponents(tensor, factor) if fmt.codec == "e8m0" else multiplied(part, tensor, factor)
    if _BY_ROW.fullmatch(part):
        return multiplied(part, tensor, factor)
    if part == "elements.value":
        return multiplied(part, tensor, factor.repeat_interleave(payload["elements.count"].long()))
    term = re.fullmatch(r"(residual\d+)\.(scale|offset)", part)
    if term:
        return multiplied(part, tensor, factor[payload[f"{term[1]}.row"].long()])
    raise ValueError(f"{part} mixes rows")


def _exponents(codes: Tensor, factor: Tensor) -> Tensor:
    """E8M0 codes (d_out, n_groups) of scales times `factor` (d_out,)."""
    raised = codes.to(torch.int32) + factor.log2().to(torch.int32)[:, None]
    if int(raised.max()) > 254:
        raise ValueError("scale leaves the range of e8m0")
    return raised.to(torch.uint8)
