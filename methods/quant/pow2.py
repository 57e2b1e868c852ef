"""Fitters `pow2-m1`, `pow2-m2`: min-max scales that differ by powers of two, so that codes move between grids by shifting bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid
from methods.quant.minmax import minmax


def pow2_each(weight: Tensor, fmt: Format) -> Grid:
    """Every scale of `minmax` becomes the next power of two that is no smaller, 2**ceil(log2 S); weight: (d_out, d_in).

    Nothing is clipped that `minmax` did not clip. ZeroQuant-FP (Wu 2023), M1.
    """
    grid = minmax(weight, fmt)
    mantissa, exponent = torch.frexp(grid.scale.float())
    # A power of two has the mantissa 1/2 and stays what it is.
    power = torch.exp2((exponent - (mantissa.abs() == 0.5).int()).float())
    return replace(grid, scale=(mantissa.sign() * power).to(grid.scale.dtype))


def pow2_ratio(weight: Tensor, fmt: Format) -> Grid:
    """The scales of a row become S_max / 2**round(log2(S_max / S_i)), S_max the row's largest; weight: (d_out, d_in).

    The power that is nearest in the logarithm: a group whose scale goes down is clipped. ZeroQuant-FP (Wu 2023), M2.
    """
    grid = minmax(weight, fmt)
    scale = grid.scale.float()
    largest = scale.abs().amax(1, keepdim=True)
    snapped = largest / torch.exp2((largest / scale.abs()).log2().round())
    return replace(grid, scale=(scale.sign() * snapped).to(grid.scale.dtype))
