"""Moves a per-channel scale from the inputs of a site into its weights, through the norm before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.method import NormView


@dataclass(frozen=True)
class Fold:
    """ratio: (d_in,) fp32, by what the site's inputs are divided and its columns multiplied; tensors: the norm's new parameters."""

    ratio: Tensor
    tensors: Mapping[str, Tensor]


def fold(norm: NormView, scale: Tensor) -> Fold:
    """Divides the norm's output by `scale` (d_in,) > 0, as nearly as its stored dtype can.

    The new weight is rounded first and `ratio` is that of what is stored, so that columns times `ratio` undo it exactly. A channel
    stays as it is where that is impossible: its weight is or becomes zero, or its bias does not come back bit for bit. Channels with a
    bias take the nearest power of two, by which weight and bias divide without rounding.
    """
    weight = norm.weight.float() + norm.unit_offset
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.float()
    divisor = torch.where(bias == 0, scale.float(), torch.exp2(scale.float().log2().round()))
    new_weight = (weight / divisor - norm.unit_offset).to(norm.weight.dtype)
    ratio = weight / (new_weight.float() + norm.unit_offset)
    new_bias = (bias / ratio).to(norm.weight.dtype if norm.bias is None else norm.bias.dtype)
    # False, too, where the ratio is NaN or infinite because the weight was or has become zero.
    exact = new_bias.float() * ratio == bias
    tensors = {f"{norm.name}.weight": torch.where(exact, new_weight, norm.weight)}
    if norm.bias is not None:
        tensors[f"{norm.name}.bias"] = torch.where(exact, new_bias, norm.bias)
    return Fold(torch.where(exact, ratio, torch.ones_like(ratio)), tensors)
