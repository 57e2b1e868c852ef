"""Dense packing of codes: `bits` bits a code, least significant bit first, no gaps between rows or groups.

Eight codes are one 64-bit word with a code in each byte; three shift-and-mask steps close the gaps between neighbours, pairs of
neighbours and pairs of pairs, so that every width takes the same few passes. Assumes a little-endian machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

WIDTHS = range(1, 9)
_WORDS = 2**16
"""Words handled at once: half a megabyte stays in the cache between the passes."""


def packed_bytes(n_codes: int, bits: int) -> int:
    """Bytes that `pack` makes of `n_codes` codes: at most 7 bits are padding."""
    return (n_codes * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape) uint8 in [0, 2**bits) -> (packed_bytes,) uint8; raises ValueError where a code does not fit."""
    _check(codes, bits)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise ValueError(f"pack: code {int(flat.max())} does not fit into {bits} bits; codes are in [0, {2**bits})")
    if bits == 8:
        return flat.clone()
    n_words = (flat.numel() + 7) // 8
    packed = torch.empty(n_words, bits, dtype=torch.uint8)
    for start in range(0, n_words, _WORDS):
        part = flat[start * 8 : (start + _WORDS) * 8]
        words = torch.zeros((part.numel() + 7) // 8, dtype=torch.int64)
        words.view(torch.uint8)[: part.numel()] = part
        for width, span in _steps(bits):
            low = _mask(width, span)
            words = (words & low) | ((words >> (span - width)) & (low << width))
        packed[start : start + len(words)] = words.view(torch.uint8).view(-1, 8)[:, :bits]
    return packed.view(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack`: codes of `shape`, uint8; raises ValueError where the number of bytes does not belong to the shape."""
    _check(packed, bits)
    n_codes = prod(shape)
    if packed.numel() != packed_bytes(n_codes, bits):
        raise ValueError(
            f"unpack: {packed.numel()} bytes are not {tuple(shape)} codes of {bits} bits, which take {packed_bytes(n_codes, bits)}"
        )
    if bits == 8:
        return packed.clone().view(tuple(shape))
    n_words = (n_codes + 7) // 8
    codes = torch.empty(n_words * 8, dtype=torch.uint8)
    for start in range(0, n_words, _WORDS):
        part = packed[start * bits : (start + _WORDS) * bits]
        n_part = min(_WORDS, n_words - start)
        filled = torch.zeros(n_part * bits, dtype=torch.uint8)
        filled[: part.numel()] = part
        words = torch.zeros(n_part, dtype=torch.int64)
        words.view(torch.uint8).view(-1, 8)[:, :bits] = filled.view(-1, bits)
        for width, span in reversed(_steps(bits)):
            low = _mask(width, span)
            words = (words & low) | ((words & (low << width)) << (span - width))
        codes[start * 8 : (start + n_part) * 8] = words.view(torch.uint8)
    return codes[:n_codes].view(tuple(shape))


def _steps(bits: int) -> tuple[tuple[int, int], ...]:
    return (bits, 8), (2 * bits, 16), (4 * bits, 32)


def _mask(width: int, span: int) -> int:
    """`width` ones at the start of every 2 * span bits of a word."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, 2 * span))


def _check(tensor: Tensor, bits: int) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"packing: tensor of {tensor.dtype}; codes and packed bytes are uint8")
    if bits not in WIDTHS:
        raise ValueError(f"packing: bits={bits}; a code has 1 to 8")
