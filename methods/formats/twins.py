"""Formats that differ in the kind of number alone: minifloats in place of integers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from methods.formats.format import Format

FLOATS: Mapping[int, str] = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
"""The minifloat that stands against integers of as many bits."""


def has_twin(fmt: Format) -> bool:
    """Whether a format of integers has a `float_twin`."""
    bits = {fmt.bits} if fmt.act_bits == 16 else {fmt.bits, fmt.act_bits}
    return not fmt.dense and (fmt.element, fmt.act_element) == ("int", "int") and fmt.symmetric and bits <= FLOATS.keys()


def float_twin(fmt: Format) -> Format:
    """The format of equal bits and layout with minifloats for integers, in weights and, where they are rounded, in inputs.

    Both sides change, since products are of integers or of minifloats. Raises ValueError for formats that have no such twin.
    """
    if fmt.dense or (fmt.element, fmt.act_element) != ("int", "int"):
        raise ValueError(f"mofq: {fmt.name} is not made of integers; give the integer format, such as w4a16-g64 or w8a8-token")
    if not has_twin(fmt):
        raise ValueError(f"mofq: {fmt.name} has no minifloats beside it; use 4, 6 or 8 bits and no offset")
    act = "int" if fmt.act_bits == 16 else FLOATS[fmt.act_bits]
    return replace(fmt, element=FLOATS[fmt.bits], act_element=act)
