"""Hadamard rotations of a head's channels, which spread outliers over them."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x (..., d) -> (..., d) fp32, each block of channels times the orthonormal Hadamard matrix of its size; its own inverse.

    Blocks are as long as the largest power of two that divides d. Fast transform (Fino & Algazi 1976), d log d.
    """
    dim = x.shape[-1]
    size = dim & -dim
    y = x.float().reshape(-1, size)
    span = 1
    while span < size:
        pairs = y.view(-1, size // (2 * span), 2, span)
        upper, lower = pairs.unbind(2)
        y = torch.stack((upper + lower, upper - lower), 2).view(-1, size)
        span *= 2
    return y.mul(size**-0.5).reshape(x.shape)


def signs(dim: int, device: torch.device) -> Tensor:
    """(d,) fixed random signs, the same for a dimension everywhere."""
    generator = torch.Generator().manual_seed(dim)
    return (torch.randint(0, 2, (dim,), generator=generator) * 2 - 1).float().to(device)
