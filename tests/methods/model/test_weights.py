"""Weights by (d_out, d_in) whatever the layout; norms by their measured equation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from methods.model.weights import bias_of, norm_view, not_finite, set_weight, weight_of
from tests.tiny import tiny_model


def test_a_linear_is_seen_not_copied():
    linear = nn.Linear(6, 4)
    assert weight_of(linear).data_ptr() == linear.weight.data_ptr()
    new = torch.randn(4, 6)
    parameter = linear.weight
    set_weight(linear, new)
    assert linear.weight is parameter
    assert linear.weight.data_ptr() == new.data_ptr()


def test_conv1d_computes_with_the_weight_that_is_set():
    conv = Conv1D(4, 6)
    x, new = torch.randn(3, 6), torch.randn(4, 6)
    assert weight_of(conv).shape == (4, 6)
    assert weight_of(conv).data_ptr() == conv.weight.data_ptr()
    set_weight(conv, new)
    assert conv.weight.shape == (6, 4)
    assert torch.allclose(conv(x), x @ new.T + conv.bias, atol=1e-6)
    assert torch.equal(weight_of(conv), new)


def test_bias():
    assert bias_of(nn.Linear(3, 2, bias=False)) is None
    linear = nn.Linear(3, 2)
    assert torch.equal(bias_of(linear), linear.bias.detach())


def test_wrong_shapes_and_modules_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        set_weight(nn.Linear(6, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="Embedding"):
        weight_of(nn.Embedding(3, 4))


@pytest.mark.parametrize(
    ("arch", "offset", "bias"), [("llama", 0, False), ("gemma", 1, False), ("gemma3", 1, False), ("gpt2", 0, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_equation(arch, offset, bias, dtype):
    model = tiny_model(arch).to(dtype)
    name = "transformer.h.1.ln_1" if arch == "gpt2" else "model.layers.1.input_layernorm"
    norm = model.get_submodule(name)
    view = norm_view(model, name)
    assert (view.name, view.unit_offset, view.bias is not None) == (name, offset, bias)
    assert view.weight.data_ptr() == norm.weight.data_ptr()
    assert view.weight.dtype == dtype


def test_a_module_that_is_no_norm_is_refused():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x):
            return x * self.weight**2

    model = nn.ModuleDict({"squared": Squared(), "linear": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"squared: Squared is not normalise"):
        norm_view(model, "squared")
    with pytest.raises(ValueError, match="no per-channel weight"):
        norm_view(model, "linear")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_the_parameter(value):
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    assert not_finite(model) is None
    model["b"].weight.data[1, 2] = value
    assert not_finite(model) == "b.weight"
