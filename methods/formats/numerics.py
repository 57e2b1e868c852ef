"""Reference numerics: what a format computes, in fp32 and without regard to speed. Every kernel must agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats.format import Format

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_DTYPE = torch.bfloat16
"""Scales and offsets are stored in bf16: what bf16 checkpoints carry and what the kernels widen with one shift."""


@dataclass(frozen=True)
class Compressed:
    """A weight under a format: `decode(format, payload)` equals `dense` bit for bit.

    dense: (d_out, d_in) fp32. payload: `weight` (dense formats) or
    `codes` (d_out, d_in) uint8 in [0, 2**bits), `scale` (d_out, n_groups) bf16 and, if asymmetric, `offset` of the same shape.
    """

    dense: Tensor
    payload: Mapping[str, Tensor]
    format: Format

    @classmethod
    def of(cls, fmt: Format, payload: Mapping[str, Tensor]) -> Compressed:
        """The compressed weight of a payload."""
        return cls(decode(fmt, payload), payload, fmt)


def decode(fmt: Format, payload: Mapping[str, Tensor]) -> Tensor:
    """The weight (d_out, d_in) fp32 that a payload stands for.

    `scale * u` is exact in fp32 (8 by 8 significant bits), so that one rounding, that of the offset's addition, is all there is.
    """
    if fmt.dense:
        return payload["weight"].float()
    codes, scale = payload["codes"], payload["scale"].float()
    d_out, d_in = codes.shape
    grid = codes.float().view(d_out, scale.shape[1], d_in // scale.shape[1])
    if fmt.symmetric:
        dense = (grid - fmt.levels // 2) * scale[..., None]
    else:
        dense = grid * scale[..., None] + payload["offset"].float()[..., None]
    return dense.view(d_out, d_in)


def encode(weight: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Nearest codes (d_out, d_in) uint8 of a weight (d_out, d_in) on a fixed grid; scale, offset: (d_out, n_groups) as stored."""
    d_out, d_in = weight.shape
    groups = weight.float().view(d_out, scale.shape[1], d_in // scale.shape[1])
    shift = fmt.levels // 2 if fmt.symmetric else 0
    origin = 0.0 if offset is None else offset.float()[..., None]
    codes = torch.round((groups - origin) / scale.float()[..., None]) + shift
    return codes.clamp_(*fmt.code_range).to(torch.uint8).view(d_out, d_in)


def quantize_activation(x: Tensor, fmt: Format) -> Tensor:
    """Activations (..., d_in) as the format's kernels see them, in fp32.

    8 bits: symmetric, dynamic, `scale = max|x| / 127` per token and `act_group`; codes in [-127, 127]; zero where the group is zero.
    """
    if fmt.act_bits == 16:
        return x
    d_in = x.shape[-1]
    size = d_in if fmt.act_group == -1 else fmt.act_group
    groups = x.float().reshape(*x.shape[:-1], d_in // size, size)
    scale = groups.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.round(groups / scale).clamp_(-127, 127) * scale).reshape(x.shape)


def linear(x: Tensor, weight: Tensor, fmt: Format, bias: Tensor | None = None) -> Tensor:
    """The format's linear layer: x (..., d_in), decoded weight (d_out, d_in) -> (..., d_out), all fp32."""
    return torch.nn.functional.linear(quantize_activation(x.float(), fmt), weight, bias)


def payload_bits(fmt: Format, payload: Mapping[str, Tensor]) -> int:
    """Bits that a payload takes when packed: codes at their width, everything else at its dtype's."""
    return sum(t.numel() * (fmt.bits if name == "codes" else t.element_size() * 8) for name, t in payload.items())
