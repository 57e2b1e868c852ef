"""Moves a per-channel scale, and an offset, from the inputs of a site into its layers, through the norm before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.method import NormView


@dataclass(frozen=True)
class Fold:
    """ratio: (d_in,), by what the site's inputs are divided and its columns multiplied; tensors: the norm's new parameters.

    shift: (d_in,), what is subtracted from the inputs before; None for nothing. In fp32, or in fp64 where the norm is.
    """

    ratio: Tensor
    tensors: Mapping[str, Tensor]
    shift: Tensor | None = None


def fold(norm: NormView, scale: Tensor) -> Fold:
    """Divides the norm's output by `scale` (d_in,) > 0, as nearly as its stored dtype can.

    The new weight is rounded first and `ratio` is that of what is stored, so that columns times `ratio` undo it exactly. A channel
    stays as it is where that is impossible: its weight is or becomes zero, or its bias does not come back bit for bit. Channels with a
    bias take the nearest power of two, by which weight and bias divide without rounding.
    """
    weight = gain(norm)
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.to(weight.dtype)
    divisor = torch.where(bias == 0, scale.to(weight.dtype), torch.exp2(scale.to(weight.dtype).log2().round()))
    new_weight = (weight / divisor - norm.unit_offset).to(norm.weight.dtype)
    ratio = weight / (new_weight.to(weight.dtype) + norm.unit_offset)
    new_bias = (bias / ratio).to(norm.weight.dtype if norm.bias is None else norm.bias.dtype)
    # False, too, where the ratio is NaN or infinite because the weight was or has become zero.
    exact = new_bias.to(weight.dtype) * ratio == bias
    tensors = {f"{norm.name}.weight": torch.where(exact, new_weight, norm.weight)}
    if norm.bias is not None:
        tensors[f"{norm.name}.bias"] = torch.where(exact, new_bias, norm.bias)
    return Fold(torch.where(exact, ratio, torch.ones_like(ratio)), tensors)


def fold_shifted(norm: NormView, scale: Tensor, shift: Tensor) -> Fold:
    """Makes the output `y` of a norm that has a bias `(y - shift) / scale`, as nearly as its stored dtypes can.

    scale: (d_in,) > 0; shift: (d_in,). What the norm loses to rounding, in its weight and in its bias, is in the `ratio` and the `shift`
    that come back: the layers' columns take the one and their biases the other. No channel needs a power of two; one whose weight is or
    becomes zero keeps its scale. Raises ValueError where the norm has no bias.
    """
    if norm.bias is None:
        raise ValueError(f"{norm.name} has no bias that could take a shift; fold the scale alone")
    weight = gain(norm)
    bias = norm.bias.to(weight.dtype)
    new_weight = (weight / scale.to(weight.dtype) - norm.unit_offset).to(norm.weight.dtype)
    ratio = weight / (new_weight.to(weight.dtype) + norm.unit_offset)
    possible = torch.isfinite(ratio) & (ratio != 0)
    ratio = torch.where(possible, ratio, torch.ones_like(ratio))
    new_bias = ((bias - shift.to(weight.dtype)) / ratio).to(norm.bias.dtype)
    tensors = {f"{norm.name}.weight": torch.where(possible, new_weight, norm.weight), f"{norm.name}.bias": new_bias}
    return Fold(ratio, tensors, bias - new_bias.to(weight.dtype) * ratio)


def gain(norm: NormView) -> Tensor:
    """What the norm multiplies by, (d_in,): its weight with the unit offset, in fp32 or, where it is stored so, in fp64."""
    return norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32)) + norm.unit_offset
