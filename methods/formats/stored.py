"""The parts of a payload as files hold them: codes of fewer than eight bits packed, everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from methods.formats.format import Format
from methods.formats.packing import pack, unpack


def packed(fmt: Format, part: str, tensor: Tensor) -> Tensor:
    """The tensor of a payload's part to be stored: its codes packed (`Format.widths`), or a contiguous tensor of its own dtype."""
    return pack(tensor, fmt.widths[part]) if part in fmt.widths else tensor.contiguous()


def unpacked(fmt: Format, part: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `packed`; shape: (d_out, d_in) of the weight. Raises ValueError where the bytes are not those of such a weight."""
    if part not in fmt.widths:
        return tensor
    d_out, d_in = shape
    return unpack(tensor, fmt.widths[part], (d_out, d_in) if part == "codes" else (d_out, fmt.groups(d_in)))
