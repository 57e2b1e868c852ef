"""Weights of linears and norms, whatever class and layout a model stores them in."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.formats.numerics import DTYPES
from methods.method import NormView


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (d_in, d_out): transformers' Conv1D, known by its `nf` outputs and 2-D weight."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that this project handles: `nn.Linear` or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear as (d_out, d_in): a view, never a copy; ValueError where the module is no linear."""
    if not is_linear(module):
        raise ValueError(
            f"{type(module).__name__} is no linear layer; only nn.Linear and transformers' Conv1D hold a weight matrix"
        )
    weight: Tensor = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Replaces a linear's weight by `weight` (d_out, d_in), by reference; the parameter keeps its layout and identity."""
    now = weight_of(module)
    if weight.shape != now.shape:
        raise ValueError(f"set_weight: got {tuple(weight.shape)}, the layer is (d_out, d_in) = {tuple(now.shape)}")
    module.get_parameter("weight").data = weight.T if is_transposed(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias (d_out,) of a linear, or None."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinite values, or None."""
    return next((name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()), None)


def is_norm_like(module: nn.Module) -> bool:
    """Whether the module's own parameters are a 1-D `weight` and at most a `bias`: a cheap test before `norm_view`."""
    own = dict(module.named_parameters(recurse=False))
    childless = next(module.children(), None) is None
    return childless and "weight" in own and set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())


def with_values(module: nn.Module) -> nn.Module:
    """The module; of one without memory (on the device `meta`) a copy on the CPU with values that are made up."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    copied = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        parameter.requires_grad_(False).normal_(generator=generator)
    return copied


@torch.no_grad()
def norm_view(model: nn.Module, name: str) -> NormView:
    """The norm at path `name` as `y = normalise(x) * (weight + unit_offset) + bias`; weight and bias are the live tensors.

    The offset (1 for Gemma, 0 elsewhere) is measured: the norm runs on random rows with gains of zero, one and its own.
    Raises ValueError where the module does not follow that equation.
    """
    module = with_values(model.get_submodule(name))
    if not is_norm_like(module):
        raise ValueError(f"{name}: {type(module).__name__} has no per-channel weight, so it is no norm that a scale folds into")
    weight = module.get_parameter("weight").detach()
    bias = bias_of(module)
    x = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)

    def output(gain: Tensor) -> Tensor:
        try:
            result: Tensor = functional_call(module, {"weight": gain}, (x,)).double()
        except TypeError as error:
            raise ValueError(
                f"{name}: {type(module).__name__} reads more than its input ({error}), so no scale folds into it"
            ) from None
        return result if bias is None else result - bias.double()

    zero = output(torch.zeros_like(weight))
    normalised = output(torch.ones_like(weight)) - zero
    offset = round(float((zero * normalised).sum() / normalised.square().sum()))
    expected = normalised * (weight.double() + offset)
    tolerance = 16 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    residue = max(float((zero - normalised * offset).abs().max()), float((output(weight) - expected).abs().max()))
    if not residue <= tolerance:
        raise ValueError(
            f"{name}: {type(module).__name__} is not normalise(x) * (weight + offset) + bias, so no scale folds into it"
        )
    return NormView(name, weight, bias, float(offset))


def digest_of(model: torch.nn.Module, dtype: str) -> str:
    """16 hex digits of the SHA-256 over the sorted parameters: names and values in the storage dtype."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(name.encode())
        sha.update(parameter.detach().to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
