"""Transform `awq`: scales up the columns that large inputs meet, as much as the layers' output likes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.method import NormView
from methods.quant.fold import Fold, Rows, fold
from methods.quant.site_error import site_error

_TINY = 1e-4


def awq(
    weights: Mapping[str, Tensor],
    taker: NormView | Rows,
    abs_mean: Tensor,
    sample: Tensor,
    fmt: Format,
    points: int = 20,
    *,
    duo: bool = False,
) -> Tensor:
    """The scale mean|x|**alpha of the alpha = 0, 1/points, … < 1 with the least output error of the site's layers together.

    weights: (d_out, d_in) of the site's layers; taker: what the scale folds into; abs_mean: (d_in,); sample: (n_sample, d_in) -> (d_in,).
    duo: mean|x|**alpha / mean|w|**(1 - alpha), mean|w| over the rows of all layers, or no scale at all where none of these is better.
    Each candidate is folded as it would be stored and rounded to nearest on min-max grids; the inputs are rounded as the format says.
    AWQ (Lin 2024), section 3.2. Deviation: the output of the site's layers stands in for that of the parent module.
    """
    weight = torch.cat(list(weights.values()))
    wanted = sample @ weight.T
    inputs, columns = abs_mean.clamp(min=_TINY), weight.abs().mean(0).clamp(min=_TINY)
    ones = torch.ones_like(inputs)
    scales = {_key(fold(taker, ones)): ones}
    for alpha in (point / points for point in range(0 if duo else 1, points)):
        scale = inputs**alpha / columns ** (1 - alpha) if duo else inputs**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        scales.setdefault(_key(fold(taker, scale)), scale)
    return min(scales.values(), key=lambda scale: site_error(weight, fold(taker, scale), sample, wanted, fmt))


def _key(folded: Fold) -> bytes:
    """Equal for scales that fold to the same, as many do into powers of two."""
    return folded.ratio.numpy().tobytes()
