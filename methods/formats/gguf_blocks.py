"""The bytes of GGML's tensor types, written from a payload: what `gguf` and llama.cpp read from them is the decoded weight, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods.formats.format import Format
from methods.formats.gguf_types import TYPES, block_size, block_type, refuses
from methods.formats.sides import plain

Bytes = NDArray[np.uint8]
Parts = Mapping[str, NDArray[Any]]
"""A payload's parts by block, (n_blocks, n): a type's bytes are computed for all blocks at once."""


def pack_blocks(fmt: Format, payload: Mapping[str, Tensor]) -> Bytes:
    """The rows (d_out, bytes) of a weight in its type, `block_type(fmt)`, block after block.

    Raises ValueError for a format that no type stores, a payload with parts beside the grid, a row that blocks do not fill, and scales
    that fp16 cannot hold: nothing is rounded.
    """
    if fmt.dense:
        raise ValueError(f"{fmt.name} is dense; its weights are stored as they are")
    d_out, d_in = payload["codes"].shape
    name, reason = block_type(fmt), refuses(fmt, d_in)
    if name is None or reason:
        raise ValueError(reason)
    if not plain(payload):
        beside = ", ".join(sorted(part for part in payload if "." in part))
        raise ValueError(f"the weight has parts beside its grid ({beside}), for which GGML's types have no place")
    size = block_size(name)
    n_blocks = d_out * d_in // size
    parts = _by_block(fmt, payload, d_in // size) if TYPES[name].codec == "fp16" else payload
    blocks = np.concatenate(_WRITERS[name]({part: t.numpy().reshape(n_blocks, -1) for part, t in parts.items()}), 1)
    return blocks.reshape(d_out, -1)


def _by_block(fmt: Format, payload: Mapping[str, Tensor], n_blocks: int) -> dict[str, Tensor]:
    """Scales and offsets (d_out, n_groups) as fp16 for every block of a row; groups are whole blocks."""
    parts = {"codes": payload["codes"]}
    for role in ("scale",) if fmt.symmetric else ("scale", "offset"):
        values = payload[role]
        halves = values.to(torch.float16)
        if not torch.equal(halves.float(), values.float()):
            worst = float(values[halves.float() != values.float()][0])
            raise ValueError(
                f"{role} {worst:.6g} of {fmt.name} is no fp16 number, so that no GGML type holds the weight exactly"
            )
        parts[role] = halves.repeat_interleave(n_blocks // values.shape[1], 1)
    return parts


def _halves(codes: NDArray[Any], size: int) -> Bytes:
    """Nibbles: in every 2 * size codes, those of the second half above those of the first."""
    return _fields(codes, 4, size)


def _fields(codes: NDArray[Any], bits: int, size: int) -> Bytes:
    """8 / bits codes a byte: byte j of every `size` holds the codes j, j + size, …"""
    parts = codes.reshape(len(codes), -1, 8 // bits, size)
    packed: Bytes = parts[:, :, 0].copy()
    for i in range(1, 8 // bits):
        packed |= parts[:, :, i] << (bits * i)
    return packed.reshape(len(codes), -1)


def _floats(values: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8)


def _fifth_bits(codes: NDArray[Any]) -> list[Bytes]:
    """The fifth bits of 32 codes as one little-endian word, and their nibbles."""
    return [np.packbits(codes >> 4, 1, "little"), _halves(codes & 15, 16)]


def _sub_scales(scale: Bytes, low: Bytes) -> Bytes:
    """The 12 bytes in which Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit minima."""
    first = np.concatenate([scale[:, :4] | (scale[:, 4:] >> 4) << 6, low[:, :4] | (low[:, 4:] >> 4) << 6], 1)
    return np.concatenate([first, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4], 1)


def _q3_scales(scale: Bytes) -> Bytes:
    """The 12 bytes of sixteen 6-bit scales: nibbles, then the upper two bits."""
    return np.concatenate([scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4, _fields(scale >> 4, 2, 4)], 1)


def _iq4_scales(scale: Bytes) -> Bytes:
    """The 6 bytes of eight 6-bit scales: the upper two bits of all, then the nibbles, two neighbours a byte."""
    return np.concatenate([_fields(scale >> 4, 2, 1), scale[:, ::2] & 15 | (scale[:, 1::2] & 15) << 4], 1)


def _super(p: Parts) -> list[Bytes]:
    """The fp16 scale and minimum of a super-block."""
    return [_floats(p["scale_super"]), _floats(p["offset_super"])]


_WRITERS: Mapping[str, Callable[[Parts], list[NDArray[Any]]]] = {
    "Q4_0": lambda p: [_floats(p["scale"]), _halves(p["codes"], 16)],
    "Q4_1": lambda p: [_floats(p["scale"]), _floats(p["offset"]), _halves(p["codes"], 16)],
    "Q5_0": lambda p: [_floats(p["scale"]), *_fifth_bits(p["codes"])],
    "Q5_1": lambda p: [_floats(p["scale"]), _floats(p["offset"]), *_fifth_bits(p["codes"])],
    "Q8_0": lambda p: [_floats(p["scale"]), p["codes"] ^ 128],
    "Q2_K": lambda p: [p["scale"] | p["offset"] << 4, _fields(p["codes"], 2, 32), *_super(p)],
    "Q3_K": lambda p: [
        *(_fields(p["codes"] >> 2, 1, 32), _fields(p["codes"] & 3, 2, 32)),
        *(_q3_scales(p["scale"]), _floats(p["scale_super"])),
    ],
    "Q4_K": lambda p: [*_super(p), _sub_scales(p["scale"], p["offset"]), _halves(p["codes"], 32)],
    "Q5_K": lambda p: [
        *(*_super(p), _sub_scales(p["scale"], p["offset"])),
        *(_fields(p["codes"] >> 4, 1, 32), _halves(p["codes"] & 15, 32)),
    ],
    "Q6_K": lambda p: [
        *(_halves(p["codes"] & 15, 64), _fields(p["codes"] >> 4, 2, 32)),
        *(p["scale"] ^ 128, _floats(p["scale_super"])),
    ],
    "IQ4_NL": lambda p: [_floats(p["scale"]), _halves(p["codes"], 16)],
    "IQ4_XS": lambda p: [_floats(p["scale_super"]), _iq4_scales(p["scale"]), _halves(p["codes"], 16)],
    "MXFP4": lambda p: [p["scale"], _halves(p["codes"], 16)],
}
"""The byte runs of a block, in the order in which GGML's block structures have them."""
