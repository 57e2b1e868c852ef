"""What a cache does to keys or values: pure functions from tensors to stored parts and back.

Shapes: x (batch, heads, tokens, dim). Every part has the batch in dimension 0 and units in dimension 2, a unit being a token or a
group of tokens, so that appending, reordering and cutting need not know what is in it. `start` is the first token's position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from methods.hadamard import block_transform
from methods.kv.packing import pack_rows, unpack_rows
from methods.kv.rotary import Rotary

Parts = Mapping[str, Tensor]

HALF_MAX = 65504.0
FP8_MAX = 448.0


class Codec(Protocol):
    """A way to store tokens. unit: tokens that are stored together."""

    @property
    def unit(self) -> int: ...

    def encode(self, x: Tensor, start: int) -> Parts:
        """x (b, h, t, d), t a multiple of the unit -> parts."""
        ...

    def decode(self, parts: Parts, start: int) -> Tensor:
        """Parts -> (b, h, t, d), fp32 unless stored otherwise."""
        ...


@dataclass(frozen=True)
class Cast:
    """Another dtype."""

    dtype: torch.dtype
    unit: int = 1

    def encode(self, x: Tensor, start: int) -> Parts:
        return {"value": x.to(self.dtype)}

    def decode(self, parts: Parts, start: int) -> Tensor:
        return parts["value"]


@dataclass(frozen=True)
class Float8:
    """E4M3; scale: (h, 1, 1) fp32 fixed beforehand, beyond which values saturate, or None for one a token and head (bf16).

    Micikevicius 2022; largest magnitude 448.
    """

    scale: Tensor | None = None
    unit: int = 1

    def encode(self, x: Tensor, start: int) -> Parts:
        x = x.float()
        if self.scale is not None:
            return {"codes": _to_fp8(x / self.scale.to(x.device))}
        scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).to(torch.bfloat16)
        return {"codes": _to_fp8(x / _nonzero(scale.float())), "scale": scale}

    def decode(self, parts: Parts, start: int) -> Tensor:
        codes = parts["codes"].float()
        return codes * (parts["scale"].float() if self.scale is None else self.scale.to(codes.device))


@dataclass(frozen=True)
class Integer:
    """Per token: codes with a scale and an offset for every `group` channels, -1 for all of a head's."""

    bits: int
    group: int = -1
    unit: int = 1

    def encode(self, x: Tensor, start: int) -> Parts:
        size = x.shape[-1] if self.group == -1 else self.group
        codes, scale, offset = _affine(x.float().reshape(*x.shape[:-1], -1, size), self.bits)
        return {"codes": pack_rows(codes.flatten(-2), self.bits), "scale": scale, "offset": offset}

    def decode(self, parts: Parts, start: int) -> Tensor:
        scale = parts["scale"].float()[..., None]
        codes = unpack_rows(parts["codes"], self.bits)
        grouped = codes.reshape(*scale.shape[:-1], -1) * scale + parts["offset"].float()[..., None]
        return grouped.flatten(-2)


@dataclass(frozen=True)
class IntegerByChannel:
    """Per channel: codes with a scale and an offset for every `unit` tokens. KIVI (Liu 2024), section 3.2, keys."""

    bits: int
    unit: int

    def encode(self, x: Tensor, start: int) -> Parts:
        batch, heads, _, dim = x.shape
        grouped = x.float().reshape(batch, heads, -1, self.unit, dim).transpose(-1, -2)
        codes, scale, offset = _affine(grouped, self.bits)
        return {"codes": pack_rows(codes, self.bits), "scale": scale, "offset": offset}

    def decode(self, parts: Parts, start: int) -> Tensor:
        codes = unpack_rows(parts["codes"], self.bits)
        dense = codes * parts["scale"].float()[..., None] + parts["offset"].float()[..., None]
        return dense.transpose(-1, -2).flatten(2, 3)


def head_hadamard(x: Tensor) -> Tensor:
    """x (..., d) -> (..., d) fp32, its own inverse: blocks as long as the largest power of two that divides d."""
    return block_transform(x.float(), x.shape[-1] & -x.shape[-1])


@dataclass(frozen=True)
class Rotated:
    """Another codec on rotated heads; a query would meet the same rotation, so it is undone on reading instead."""

    inner: Codec

    @property
    def unit(self) -> int:
        return self.inner.unit

    def encode(self, x: Tensor, start: int) -> Parts:
        return self.inner.encode(head_hadamard(x), start)

    def decode(self, parts: Parts, start: int) -> Tensor:
        return head_hadamard(self.inner.decode(parts, start))


@dataclass(frozen=True)
class Smoothed:
    """Another codec on `(x - shift) / scale`, both (h, 1, d) fp32 and fixed beforehand."""

    inner: Codec
    shift: Tensor
    scale: Tensor

    @property
    def unit(self) -> int:
        return self.inner.unit

    def encode(self, x: Tensor, start: int) -> Parts:
        return self.inner.encode((x.float() - self.shift.to(x.device)) / self.scale.to(x.device), start)

    def decode(self, parts: Parts, start: int) -> Tensor:
        y = self.inner.decode(parts, start)
        return y * self.scale.to(y.device) + self.shift.to(y.device)


@dataclass(frozen=True)
class BeforeRotary:
    """Another codec on keys whose rotary embedding is undone; it is applied again on reading."""

    inner: Codec
    rotary: Rotary

    @property
    def unit(self) -> int:
        return self.inner.unit

    def encode(self, x: Tensor, start: int) -> Parts:
        return self.inner.encode(self.rotary.undo(x, start), start)

    def decode(self, parts: Parts, start: int) -> Tensor:
        return self.rotary.apply(self.inner.decode(parts, start), start)


def _affine(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(..., g) fp32 -> codes (..., g) uint8, scale and offset (...,) fp16, from each group's range.

    fp16 and not bf16: a channel's offset is often many times its range. Codes are fitted to scale and offset as stored; beyond fp16's
    range values saturate.
    """
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    offset = low.clamp(-HALF_MAX, HALF_MAX).half()
    scale = ((high - offset.float()) / (2**bits - 1)).clamp(0, HALF_MAX).half()
    codes = torch.round((grouped - offset.float()) / _nonzero(scale.float())).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale.squeeze(-1), offset.squeeze(-1)


def _to_fp8(x: Tensor) -> Tensor:
    # The cast makes NaN of what is too large.
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
