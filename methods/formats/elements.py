"""Elements: which value a code stands for, before its scale. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from statistics import NormalDist

BITS: Mapping[str, tuple[int, ...]] = {
    "int": (2, 3, 4, 5, 6, 7, 8),
    "e2m1": (4,),
    "e2m3": (6,),
    "e3m2": (6,),
    "e4m3": (8,),
    "e5m2": (8,),
    "nf": (3, 4),
    "nl": (4,),
    "tern": (2,),
    "bin": (1,),
    "bcq": (1, 2, 3, 4),
    "lut": (2, 3, 4),
}
"""Every element with the widths of its codes: `int` two's complement shifted or with an offset, `eXmY` minifloats with X exponent and Y
mantissa bits, `nf` NormalFloat, `nl` llama.cpp's uneven integers, `tern` {-1, 0, 1} in two stored bits, `bin` {-1, 1}, `bcq` sums of
signed terms, `lut` learned levels."""

MINIFLOATS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
OWN_LEVELS = ("bcq", "lut")
"""Elements whose levels are parts of the payload, a set a group."""

LOOKED_UP = ("nf", "nl", "e2m1", "tern")
"""Elements with a fixed table of levels, at most 16, which kernels look up."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""As it is published and as kernels have it: `normal_float(4)` but for rounding in the seventh digit."""

NL4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The look-up table of llama.cpp's types IQ4_NL and IQ4_XS: integers, so that products with int8 inputs stay integers. No zero."""

TABLES: Mapping[str, tuple[float, ...]] = {"nl": NL4, "tern": (-1.0, 0.0, 1.0), "bin": (-1.0, 1.0)}
"""The levels, by code, of elements that are a table of one width."""


@cache
def levels(element: str, bits: int) -> tuple[float, ...]:
    """The values of the codes 0, 1, …; NaN for codes that are no number, which nothing is rounded to.

    Empty for integers, which are computed, and for elements whose levels are their payload's.
    """
    if element in MINIFLOATS:
        return _minifloat(int(element[1]), int(element[3]))
    if element == "nf":
        return NF4 if bits == 4 else normal_float(bits)
    return TABLES.get(element, ())


@cache
def largest(element: str, bits: int) -> float:
    """The largest magnitude that both signs have: the range of a group is scaled to it."""
    if element == "int":
        return float(2 ** (bits - 1) - 1)
    return max(value for value in levels(element, bits) if not math.isnan(value))


@cache
def lowest(element: str, bits: int) -> float:
    """The most negative level of an element with levels of its own, or of a symmetric grid of integers."""
    return min(levels(element, bits), default=-float(2 ** (bits - 1)))


def _minifloat(exponent: int, mantissa: int) -> tuple[float, ...]:
    """By bit pattern: sign, exponent, mantissa. `e5m2` keeps its topmost exponent for infinities and NaN, `e4m3` its topmost code.

    OCP 8-bit floating point (2023), OCP microscaling (2023): the 6- and 4-bit ones have finite numbers alone.
    """
    bias = 2 ** (exponent - 1) - 1
    positive = []
    for code in range(2 ** (exponent + mantissa)):
        power, part = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
        number = math.ldexp(part, 1 - bias) if power == 0 else math.ldexp(1 + part, power - bias)
        reserved = code == 127 if (exponent, mantissa) == (4, 3) else (exponent == 5 and power == 31)
        positive.append(math.nan if reserved else number)
    return (*positive, *(-number for number in positive))


def normal_float(bits: int) -> tuple[float, ...]:
    """Quantiles of a normal distribution, zero among them, scaled to [-1, 1]; ascending.

    The outermost leave out the mean of 1/2 by 2**bits - 1 and by 2**bits quantiles. QLoRA (Dettmers 2023), eq. 4.
    """
    half = 2 ** (bits - 1)
    end = 1 - (1 / (4 * half - 2) + 1 / (4 * half)) / 2

    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(end + (0.5 - end) * step / n) for step in range(n)]

    positive, negative = quantiles(half), quantiles(half - 1)
    return tuple(value / positive[0] for value in (*(-q for q in negative), 0.0, *reversed(positive)))
