"""Scale codecs on tensors: what is stored of a weight's ideal scales and offsets, and what is computed with.

Scales are (n_blocks, n_groups) here: one for each set of rows that share them. The parts of a payload are named by their role,
`scale` or `offset`: `scale` itself, `scale_super` of the second level, and `scale_mean` or `scale_least` where scales are stored about
their mean or above the least of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from methods.formats.codecs import ROW, TENSOR, Codec
from methods.formats.format import Format
from methods.formats.levels import fixed, table

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
E4M3_MAX = 448.0
_LEAST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
"""The smallest scale that is kept: normal ones in the wide formats, fp16 with its subnormals, which llama.cpp's types need."""

Role = Literal["scale", "offset"]
Parts = Mapping[str, Tensor]


def write(fmt: Format, role: Role, ideal: Tensor, like: Parts | None = None, unit: Tensor | None = None) -> dict[str, Tensor]:
    """The payload parts of scales or offsets (n_blocks, n_groups) fp32, each rounded to what the codec can hold.

    A scale that would be stored as zero, as an all-zero group's is, becomes 1, or the smallest that there is with a second level and
    for an element without a zero.
    Unsigned codecs take scales >= 0; a second level without a least takes offsets <= 0, and positive ones become 0.
    like: parts whose second level is taken over, so that scales can be compared as they are stored.
    unit: the ideal scales, in which offsets that are stored as zero points are counted.
    """
    codec = fmt.scales
    if codec.code in FLOATS:
        empty = _LEAST[FLOATS[codec.code]] if fmt.element == "nl" else 1.0
        return {role: _float(ideal, FLOATS[codec.code], empty if role == "scale" else None)}
    if codec.code == "e8m0":
        return {role: _exponent(ideal)}
    if codec.mean:
        return _about_mean(codec, ideal, like)
    if codec.least:
        return _above_least(codec, role, ideal if role == "scale" else _zero_points(fmt, ideal, unit), like)
    if codec.span == TENSOR:
        return _by_tensor(ideal, like)
    return _by_span(codec, role, ideal, _span(codec, fmt, ideal.shape[1]), like)


def read(fmt: Format, role: Role, parts: Parts) -> Tensor:
    """The scales or offsets (n_blocks, n_groups) that parts stand for: bf16 as stored, fp32 where they are computed.

    Zero points are multiplied with the scales, so that `scale` and what belongs to it has to be among the parts.
    """
    codec, own = fmt.scales, parts[role]
    if codec.code in FLOATS:
        return own
    if codec.code == "e8m0":
        return torch.where(own == 0, 2.0**-127, (own.to(torch.int32) << 23).view(torch.float32))
    upper = parts[f"{role}_super"].float()
    if codec.span == TENSOR:
        return table("e4m3", 8)[own.long()] / upper
    if codec.mean:
        each = upper.repeat_interleave(codec.span)[: own.numel()].view(own.shape)
        return parts[f"{role}_mean"] + (own.float() - codec.steps) * each
    if codec.least:
        value = _down(parts[f"{role}_least"], codec, len(own)) + own.float() * _down(upper, codec, len(own))
        return value if role == "scale" else -value * read(fmt, "scale", parts)
    each = upper.repeat_interleave(own.shape[1] // upper.shape[1], 1)
    value = (own.float() - (codec.steps if codec.code[0] == "s" else 0)) * each
    return value if role == "scale" else -value


def spread(fmt: Format, values: Tensor, d_out: int) -> Tensor:
    """(n_blocks, n_groups) -> (d_out, n_groups), every set's value for each of its rows."""
    if fmt.rows == 1:
        return values
    if fmt.rows == -1:
        return values.expand(d_out, -1)
    return values.repeat_interleave(fmt.rows, 0)[:d_out]


def shared(fmt: Format, values: Tensor) -> Tensor:
    """Inverse of `spread`: (d_out, n_groups) -> (n_blocks, n_groups), the first row of every set."""
    return values[:: fmt.rows] if fmt.rows > 0 else values[:1]


def _float(ideal: Tensor, dtype: torch.dtype, empty: float | None) -> Tensor:
    """empty: what takes the place of a value that would be stored as zero; None where it may be zero."""
    # What overflows would decode to NaN; the largest number there is decodes to something.
    stored = ideal.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    return stored if empty is None else torch.where(stored.abs() >= _LEAST[dtype], stored, torch.full_like(stored, empty))


def _exponent(ideal: Tensor) -> Tensor:
    """E8M0: the nearest power of two in the logarithm, 2**(code - 127)."""
    mantissa, exponent = torch.frexp(ideal.float())
    code = exponent - (mantissa < 0.5**0.5).int() + 127
    return torch.where(ideal > 0, code.clamp(0, 254), 127).to(torch.uint8)


def _by_tensor(ideal: Tensor, like: Parts | None) -> dict[str, Tensor]:
    """NVFP4's: E4M3 codes, and the fp32 number (1, 1) by which they are divided, 448 over the largest scale."""
    upper = like["scale_super"] if like else (E4M3_MAX / _positive(ideal.amax())).clamp(max=2.0**120).view(1, 1)
    rungs = fixed("e4m3", 8)
    codes = rungs.codes[rungs.nearest(ideal * upper)]
    return {"scale": codes.clamp(min=1).to(torch.uint8), "scale_super": upper}


def _about_mean(codec: Codec, ideal: Tensor, like: Parts | None) -> dict[str, Tensor]:
    """Double quantization: signed codes of the distance from the mean of all scales, a step for every `span` of them."""
    mean = like["scale_mean"] if like else ideal.mean().view(1)
    centred = (ideal - mean).flatten()
    if like:
        upper = like["scale_super"]
    else:
        blocks = torch.nn.functional.pad(centred, (0, -len(centred) % codec.span)).view(-1, codec.span)
        upper = _positive(blocks.abs().amax(1) / (codec.steps - 1))
    step = upper.repeat_interleave(codec.span)[: len(centred)]
    # No scale may come out zero or negative: below the mean by less than the mean, by however little.
    least = torch.floor(-mean / step) + 1
    least = torch.where(mean + least * step > 0, least, least + 1)
    codes = torch.maximum(torch.round(centred / step), least).clamp(1 - codec.steps, codec.steps - 1)
    return {"scale": (codes + codec.steps).to(torch.uint8).view(ideal.shape), "scale_super": upper, "scale_mean": mean}


def _above_least(codec: Codec, role: Role, ideal: Tensor, like: Parts | None) -> dict[str, Tensor]:
    """Codes of the distance from the least of `span` rows at a group of inputs, in steps that reach the largest.

    A scale that is not above zero, as that of an all-zero group, pays no heed to how far the others reach and becomes the least of them.
    """
    n_rows, n_sets, dtype = len(ideal), -(-len(ideal) // codec.span), FLOATS[codec.second]
    if like:
        least, step = like[f"{role}_least"], like[f"{role}_super"]
    else:
        rows = ideal[torch.arange(n_sets * codec.span).clamp(max=n_rows - 1)].view(n_sets, codec.span, -1)
        low, high = rows.amin(1), rows.amax(1)
        if role == "scale":
            low = _positive(rows.masked_fill(rows <= 0, torch.inf).amin(1).nan_to_num(posinf=0.0))
        least = _float(low, dtype, 1.0 if role == "scale" else None)
        step = _float((high - least.float()).clamp(min=0) / codec.steps, dtype, 1.0)
    codes = torch.round((ideal - _down(least, codec, n_rows)) / _down(step, codec, n_rows)).clamp(0, codec.steps)
    return {role: codes.to(torch.uint8), f"{role}_super": step, f"{role}_least": least}


def _zero_points(fmt: Format, ideal: Tensor, unit: Tensor | None) -> Tensor:
    if unit is None:
        raise ValueError(f"{fmt.name}: its offsets are stored as zero points; give the scales as `unit`")
    return -ideal / _positive(unit)


def _down(values: Tensor, codec: Codec, n_rows: int) -> Tensor:
    """(n_sets, n_groups) -> (n_rows, n_groups) fp32, every set's value for each of its rows."""
    return values.float().repeat_interleave(codec.span, 0)[:n_rows]


def _by_span(codec: Codec, role: Role, ideal: Tensor, n_spans: int, like: Parts | None) -> dict[str, Tensor]:
    """Integer codes times a float for every span, signed ones so that the extreme scale takes the code -2**(b-1)."""
    groups = (ideal if role == "scale" else -ideal).reshape(len(ideal), n_spans, -1)
    signed = codec.code[0] == "s"
    groups = groups if signed else groups.clamp(min=0)
    if like:
        upper = like[f"{role}_super"]
    else:
        low, high = groups.aminmax(dim=-1)
        extreme = torch.where(high > -low, high, low) / (-codec.steps if signed else codec.steps)
        dtype = FLOATS[codec.second]
        least = torch.full_like(extreme, _LEAST[dtype]).copysign(extreme)
        upper = torch.where(extreme.abs() > _LEAST[dtype], extreme, least).to(dtype)
    codes = torch.round(groups / upper.float()[..., None])
    if signed:
        codes = torch.where(codes == 0, 1.0, codes).clamp(-codec.steps, codec.steps - 1) + codec.steps
    else:
        codes = codes.clamp(1 if role == "scale" else 0, codec.steps)
    return {role: codes.to(torch.uint8).view(ideal.shape), f"{role}_super": upper}


def _span(codec: Codec, fmt: Format, n_groups: int) -> int:
    return 1 if codec.span == ROW else n_groups * fmt.group // codec.span


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))
