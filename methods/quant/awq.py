"""Transform `awq`: scales up the columns that large inputs meet, as much as the layers' output likes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import decode, quantize_activation
from methods.method import NormView
from methods.quant.fold import fold
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest

_TINY = 1e-4


def awq(
    weights: Mapping[str, Tensor], norm: NormView, abs_mean: Tensor, sample: Tensor, fmt: Format, points: int = 20
) -> Tensor:
    """The scale mean|x|**alpha of the alpha = 0, 1/points, … < 1 with the least output error of the site's layers together.

    weights: (d_out, d_in) of the layers that read the norm; abs_mean: (d_in,); sample: (n_sample, d_in) -> (d_in,).
    Each candidate is folded as it would be stored and rounded to nearest on min-max grids; the inputs are rounded as the format says.
    AWQ (Lin 2024), section 3.2. Deviation: the output of the site's layers stands in for that of the parent module.
    """
    weight = torch.cat(list(weights.values()))
    wanted = sample @ weight.T
    best, least = torch.ones_like(abs_mean), torch.inf
    for point in range(points):
        scale = abs_mean.clamp(min=_TINY) ** (point / points)
        scale = scale / (scale.max() * scale.min()).sqrt()
        ratio = fold(norm, scale).ratio
        scaled = weight * ratio
        rounded = decode(fmt, nearest(scaled, fmt, minmax(scaled, fmt)))
        error = float((quantize_activation(sample / ratio, fmt) @ rounded.T - wanted).square().sum(dtype=torch.float64))
        if error < least:
            best, least = scale, error
    return best
