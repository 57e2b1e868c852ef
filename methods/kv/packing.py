"""Rows of codes as rows of bytes, on any device: what a cache appends to, reorders and cuts, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) uint8 in [0, 2**bits) -> (..., n * bits / 8) uint8, n a multiple of 8, least significant bit first.

    The bytes of `methods.formats.packing.pack`, which packs a whole weight at once and on the CPU.
    """
    if bits == 8:
        return codes.clone()
    if 8 % bits == 0:
        return _shifted(_split(codes, 8 // bits), bits).sum(-1, dtype=torch.uint8)
    words = _shifted(_split(codes, 8).int(), bits).sum(-1, keepdim=True, dtype=torch.int32)
    shift = torch.arange(0, 8 * bits, 8, dtype=torch.int32, device=codes.device)
    return words.bitwise_right_shift(shift).bitwise_and(255).to(torch.uint8).flatten(-2)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_rows`: (..., bytes) uint8 -> (..., 8 * bytes / bits) uint8."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    if 8 % bits == 0:
        shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return packed[..., None].bitwise_right_shift(shift).bitwise_and(mask).flatten(-2)
    words = _shifted(_split(packed, bits).int(), 8).sum(-1, keepdim=True, dtype=torch.int32)
    shift = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=packed.device)
    return words.bitwise_right_shift(shift).bitwise_and(mask).to(torch.uint8).flatten(-2)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Entry i of the last dimension shifted left by i * bits; the words of three-bit codes have 24 bits and fit."""
    shift = torch.arange(0, values.shape[-1] * bits, bits, dtype=values.dtype, device=values.device)
    return values.bitwise_left_shift(shift)


def _split(values: Tensor, size: int) -> Tensor:
    """(..., n) -> (..., n / size, size)."""
    return values.reshape(*values.shape[:-1], -1, size)
