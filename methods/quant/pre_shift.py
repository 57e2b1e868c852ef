"""Transform `pre-shift`: a power of two for every input, that floating-point inputs otherwise had as an exponent bias of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def pre_shift(abs_max: Tensor, limit: int) -> Tensor:
    """s_j = 2**-min(limit, round(log2(max|x| / max|x_j|))), by which input j is divided and column j multiplied.

    abs_max: (d_in,) -> (d_in,), positive, 1 for the largest input. limit: the largest exponent, 2**E - 1 for E exponent bits; 0 gives
    ones. Inputs that are always zero take the limit. LLM-FP4 (Liu 2023), the pre-shifted exponent bias: what remains of the biases is
    one real number, the scale of all inputs.
    """
    gap = (abs_max.max() / abs_max).nan_to_num(nan=1.0, posinf=torch.finfo(abs_max.dtype).max)
    return torch.exp2(-gap.log2().round().clamp(0, limit))
