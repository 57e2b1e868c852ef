"""Closed-form scales of weights that keep their signs alone, with or without zeros."""

from __future__ import annotations

from torch import Tensor

from methods.formats.format import Format
from methods.quant.grid import Grid, grouped, pooled, stored

THRESHOLD = 0.7


def mean_magnitude(weight: Tensor, fmt: Format) -> Grid:
    """The scale mean|w| of a group, the least squares one of its signs; weight: (d_out, d_in). XNOR-Net (Rastegari 2016), eq. 6."""
    return stored(fmt, len(weight), pooled(grouped(weight, fmt).abs().mean(-1), fmt, lambda v: v.mean(0)))


def ternary_weights(weight: Tensor, fmt: Format) -> Grid:
    """The scale mean(|w| : |w| > D) with the threshold D = 0.7 mean|w| of a group; weight: (d_out, d_in).

    Ternary Weight Networks (Li 2016), eqs. 5-6. Deviation: D serves to find the scale; a weight then takes the nearest of the three
    levels, from half the scale on, which is never further from it.
    """
    groups = grouped(weight, fmt).abs()
    mean = pooled(groups.mean(-1), fmt, lambda v: v.mean(0))
    bound = mean if fmt.rows == 1 else mean.expand(len(weight), -1) if fmt.rows == -1 else mean.repeat_interleave(fmt.rows, 0)
    kept = groups > THRESHOLD * bound[: len(weight), :, None]
    total, count = (pooled(v.sum(-1), fmt, lambda v: v.sum(0)) for v in (groups * kept, kept.float()))
    return stored(fmt, len(weight), total / count.clamp(min=1))
