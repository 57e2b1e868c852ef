"""How the Triton kernels keep a weight: codes in 32-bit words along the inputs, in planes of a power of two bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.elements import LOOKED_UP
from methods.formats.format import Format
from methods.formats.levels import table
from methods.formats.numerics import decode_grid
from profilers.kernels.kernel import Payload

UNIT = 32
"""Inputs that are packed together: a word for every bit of their codes. Groups are multiples of it, so a word has one scale."""

PLANES: Mapping[int, tuple[int, int]] = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
"""Bits of a code in the plane of the low and in that of the high bits: words of three bits would leave gaps."""

TABLES = (*LOOKED_UP, "lut")
"""Elements whose levels are looked up: sixteen at most."""


def refuses(fmt: Format, k: int) -> str | None:
    """Why a format or a number of inputs does not fit into words, or None."""
    whole = fmt.integer and fmt.bits in PLANES
    looked_up = fmt.element in TABLES and fmt.rows == 1
    if fmt.dense or not (whole or looked_up):
        return f"integers of {', '.join(map(str, PLANES))} bits with bf16 scales, or tables of at most 16 levels, by row"
    rounded = whole and (fmt.act_bits, fmt.act_element, fmt.act_rows) == (8, "int", 1) and fmt.act_group in (-1, fmt.group)
    if fmt.act_bits != 16 and not rounded:
        return "inputs left alone or, with integer weights, rounded to int8 by token or group"
    if k % UNIT or not fmt.divides(k) or fmt.group_size(k) % UNIT:
        return f"k={k} and the group {fmt.group} must be multiples of {UNIT}, and the group divide k"
    return None


@dataclass(frozen=True)
class Words:
    """A weight (n, k) in the memory of a device.

    format: the payload's, with the scales as they are here. low, high: (n, k * bits / 32) int32 of each plane, `high` empty where there
    is none; input 32 u + i b + j of a plane of b bits is in word b u + j, shifted by b i: neighbouring threads read neighbouring words
    and inputs. scale: (n, groups) bf16 or fp32, and offset of the same shape, or empty; levels: (n, groups, levels) bf16 that a weight
    brings along, (levels,) fp32 of a fixed table, or empty.
    """

    format: Format
    shape: tuple[int, int]
    low: Tensor
    high: Tensor
    scale: Tensor
    offset: Tensor
    levels: Tensor

    @classmethod
    def of(cls, fmt: Format, payload: Payload, device: str) -> Self:
        """Packs a payload of a format that `refuses` takes."""
        codes = payload["codes"]
        n, k = codes.shape
        low, high = PLANES[fmt.bits]
        parts = {"low": pack(codes & (2**low - 1), low), "high": pack(codes >> low, high)}
        parts |= {role: _empty(torch.bfloat16) for role in ("scale", "offset", "levels")}
        stored = fmt
        if "levels" in payload:
            parts["levels"] = payload["levels"]
        else:
            # Scales of several parts are multiplied out: a kernel reads one number a group.
            stored = fmt if fmt.codec == "bf16" else replace(fmt, codec="fp32")
            dtype = scales.FLOATS[stored.codec]
            roles: tuple[scales.Role, ...] = ("scale",) if fmt.symmetric else ("scale", "offset")
            parts |= {role: scales.spread(fmt, scales.read(fmt, role, payload), n).to(dtype) for role in roles}
            parts["levels"] = table(fmt.element, fmt.bits) if fmt.element != "int" else parts["levels"]
        return cls(stored, (n, k), **{part: tensor.contiguous().to(device) for part, tensor in parts.items()})

    def decode(self) -> Tensor:
        """(n, k) fp32 on the CPU, read back from the words."""
        k = self.shape[1]
        low, high = PLANES[self.format.bits]
        codes = unpack(self.low.cpu(), low, k) | (unpack(self.high.cpu(), high, k) << low)
        parts = {"codes": codes, "scale": self.scale, "offset": self.offset, "levels": self.levels}
        kept = {name: tensor.cpu() for name, tensor in parts.items() if tensor.numel()}
        return decode_grid(self.format, kept)

    def size_bytes(self) -> int:
        """Bytes of every part."""
        parts = (self.low, self.high, self.scale, self.offset, self.levels)
        return sum(part.numel() * part.element_size() for part in parts)

    def clone(self) -> Self:
        """The same weight in other memory."""
        names = ("low", "high", "scale", "offset", "levels")
        return replace(self, **{name: getattr(self, name).clone() for name in names})


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, k) uint8 below 2**bits -> a plane (n, k * bits / 32) int32; bits divides 32, and 0 makes an empty plane."""
    n, k = codes.shape
    if bits == 0:
        return _empty(torch.int32)
    slots = codes.view(n, k // UNIT, UNIT // bits, bits)
    words = torch.zeros(n, k // UNIT, bits, dtype=torch.int32)
    for slot in range(UNIT // bits):
        words |= slots[:, :, slot].to(torch.int32) << (slot * bits)
    return words.view(n, -1)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack`: codes (n, k) uint8; an empty plane gives zeros of one row."""
    if bits == 0:
        return torch.zeros(1, k, dtype=torch.uint8)
    units = words.view(len(words), k // UNIT, 1, bits)
    shifts = (torch.arange(UNIT // bits, dtype=torch.int32) * bits).view(-1, 1)
    codes: Tensor = (units >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(len(words), k)


def _empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)
