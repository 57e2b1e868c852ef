"""Rounding to the nearest of a set of levels: fixed ones of an element, or a set of its own for every group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from methods.formats.elements import MINIFLOATS, levels


@dataclass(frozen=True)
class Ladder:
    """Levels in ascending order, for rounding to the nearest.

    values, codes: (…, n), with the code of each; bounds: (…, n - 1), a value above bounds[i] rounds above values[i].
    Leading dimensions are those of several ladders, absent where all values share one.
    """

    values: Tensor
    codes: Tensor
    bounds: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """Places in the ladder, int64 of the shape of x; x: any shape, or (…, m) for ladders (…, n)."""
        if self.bounds.dim() == 1:
            return torch.bucketize(x, self.bounds.to(x.dtype))
        place = torch.zeros(x.shape, dtype=torch.int64)
        for bound in self.bounds.to(x.dtype).unbind(-1):
            place += x > bound[..., None]
        return place

    def take(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and the values of places that `nearest` gave, of their shape."""
        if self.values.dim() == 1:
            return self.codes[place], self.values[place]
        return self.codes.gather(-1, place), self.values.gather(-1, place)


@cache
def fixed(element: str, bits: int) -> Ladder:
    """The ladder of an element with levels of its own; a tie between minifloats goes to the even mantissa, as IEEE 754 has it.

    Codes that are no number, and the negative zero, are left out.
    """
    pairs = [(value, code) for code, value in enumerate(levels(element, bits)) if not math.isnan(value)]
    pairs = sorted((value, code) for value, code in pairs if value or math.copysign(1, value) > 0)
    values, codes = torch.tensor([value for value, _ in pairs]), torch.tensor([code for _, code in pairs])
    bounds = (values[1:] + values[:-1]) / 2
    if element in MINIFLOATS:
        below = torch.nextafter(bounds, torch.full_like(bounds, -torch.inf))
        bounds = torch.where(codes[:-1] % 2 == 1, below, bounds)
    return Ladder(values, codes, bounds)


@cache
def table(element: str, bits: int) -> Tensor:
    """The values (n,) fp32 of an element's codes."""
    return torch.tensor(levels(element, bits))


def ladder(own: Tensor) -> Ladder:
    """The ladders of levels (…, n) by code, which need not be in order; values half way between two take the lower."""
    values, codes = own.float().sort(-1)
    return Ladder(values, codes, (values[..., 1:] + values[..., :-1]) / 2)
