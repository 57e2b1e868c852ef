"""Transform `smooth`: shares the range between inputs and weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_TINY = 1e-5


def smooth(weights: Mapping[str, Tensor], abs_max: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|**alpha / max|w_j|**(1 - alpha), by which input j is divided and column j multiplied.

    weights: (d_out, d_in) of all layers that read the input; abs_max: (d_in,) -> (d_in,), positive.
    SmoothQuant (Xiao 2023), eq. 4.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
    return abs_max.clamp(min=_TINY) ** alpha / largest.clamp(min=_TINY) ** (1 - alpha)
