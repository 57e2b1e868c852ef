"""Transform `outlier-plus`: centres the inputs and presses those beyond one threshold down to it."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.method import SiteView
from methods.quant.fold import Fold, fold, fold_shifted, into
from methods.quant.shift import centre, takes_shift
from methods.quant.site_error import few, site_error


def threshold_scale(abs_max: Tensor, threshold: float) -> Tensor:
    """s_j = max(1, max|x_j| / t), by which input j is divided and column j multiplied; t = max|x| gives ones.

    abs_max: (d_in,) -> (d_in,). Outlier Suppression+ (Wei 2023).
    """
    return (abs_max / threshold).clamp(min=1) if threshold > 0 else torch.ones_like(abs_max)


def outlier_plus(view: SiteView, span: Tensor, sample: Tensor, fmt: Format, steps: int) -> tuple[Tensor, Tensor | None]:
    """(scale (d_in,), shift (d_in,) or None): the middle of each range, and the threshold of least output error.

    span: (2, d_in), least and largest inputs; sample: (n_sample, d_in), of which a few rows are used. The thresholds tried are
    max (1 - k / steps), k < steps, the first of them no scale at all. No shift where the site does not take one.
    Outlier Suppression+ (Wei 2023). Deviation: the lowest threshold is a part of the maximum, not 1, so that the result does not depend
    on the unit of the inputs.
    """
    weight = torch.cat(list(view.weights.values()))
    shift = centre(span) if takes_shift(view) else None
    size = (span if shift is None else span - shift).abs().amax(0)
    taker, rows = into(view, size), few(sample)
    wanted = rows @ weight.T

    def folded(scale: Tensor) -> Fold:
        return fold(taker, scale) if shift is None else fold_shifted(view.fold_into, scale, shift)

    scales = [threshold_scale(size, float(size.max()) * (1 - step / steps)) for step in range(steps)]
    return min(scales, key=lambda scale: site_error(weight, folded(scale), rows, wanted, fmt)), shift
