"""Rounder `stochastic`: rounds up or down by chance, so that the rounded weight is the weight on average."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import encode
from methods.quant.grid import Grid


def stochastic(weight: Tensor, fmt: Format, grid: Grid, noise: float, generator: torch.Generator) -> Tensor:
    """Codes (d_out, d_in) uint8 of the weight plus a uniform number from half a step below zero to half a step above, times `noise`.

    weight: (d_out, d_in). noise: 1 rounds up with the probability of the distance to the value below, so that the mean over seeds
    is the weight, but where it lies outside the grid's range; 0 rounds to nearest. Every step of the grid must be of one width.
    Gupta (2015), equation 1.
    """
    dither = torch.rand(weight.shape, generator=generator, dtype=weight.dtype).sub_(0.5).mul_(noise)
    step = grid.scale.to(weight.dtype).repeat_interleave(weight.shape[1] // grid.scale.shape[1], 1)
    return encode(weight + dither * step, fmt, grid.scale, grid.offset)
