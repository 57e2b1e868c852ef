"""What a fold costs: the error of a site's outputs when weights and inputs are rounded behind it."""

from __future__ import annotations

from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import decode, quantize_activation
from methods.quant.fold import Fold
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest

_ROWS = 128


def few(sample: Tensor) -> Tensor:
    """At most 128 rows of a sample (n, d_in), spread evenly over it: for searches that try many candidates."""
    return sample[:: max(1, -(-len(sample) // _ROWS))]


def site_error(weight: Tensor, folded: Fold, sample: Tensor, wanted: Tensor, fmt: Format) -> float:
    """The squared error of the outputs, summed: weights to nearest on min-max grids, inputs as the format says.

    weight: (d_out, d_in) of all layers that read the norm, one below the other; sample: (n, d_in) inputs before the fold;
    wanted: (n, d_out), the outputs `sample @ weight.T`.
    """
    scaled = weight * folded.ratio
    rounded = decode(fmt, nearest(scaled, fmt, minmax(scaled, fmt)))
    inputs = sample if folded.shift is None else sample - folded.shift
    outputs = quantize_activation(inputs / folded.ratio, fmt) @ rounded.T
    if folded.shift is not None:
        outputs = outputs + weight @ folded.shift
    return float((outputs - wanted).square().sum(dtype=outputs.double().dtype))
