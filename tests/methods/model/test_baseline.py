"""Grids are found, and left without changing the function."""

from __future__ import annotations

import pytest
import torch

from methods.model.baseline import Grid, bits_of, detect_grids, float_offset_error, leave_grid_
from methods.model.describe import describe
from methods.model.trace import logits_of
from methods.model.weights import set_weight, weight_of
from tests.tiny import tiny_model, tiny_tokens


def _float_offset(groups, bits):
    low = groups.amin(1, keepdim=True)
    scale = (groups.amax(1, keepdim=True) - low) / (2**bits - 1)
    return scale * ((groups - low) / scale).round() + low


def _symmetric(groups, bits):
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return scale * (groups / scale).round()


def _in_blocks(structure):
    """The linears whose rows are whole blocks of 32, as in a GGUF all are; the grouped experts read 48 inputs."""
    return [layer for _, layer in structure.layers() if layer.d_in % 32 == 0]


def _put_on_grid(model, structure, rounding, bits):
    for layer in _in_blocks(structure):
        module = model.get_submodule(layer.name)
        weight = weight_of(module)
        set_weight(module, rounding(weight.reshape(-1, 32), bits).reshape(weight.shape))


def _errors(model, structure):
    return [float_offset_error(weight_of(model.get_submodule(layer.name))) for layer in _in_blocks(structure)]


@pytest.mark.parametrize(("rounding", "bits"), [(_float_offset, 4), (_symmetric, 4), (_float_offset, 3), (_symmetric, 8)])
def test_grids_are_detected(rounding, bits):
    model = tiny_model("llama")
    structure = describe(model)
    _put_on_grid(model, structure, rounding, bits)
    assert detect_grids(model, structure) == (Grid(bits, 1.0),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_weights_are_on_no_grid(dtype):
    model = tiny_model("gpt2").to(dtype).float()
    assert detect_grids(model, describe(model)) == ()


def test_shares_are_of_weights_and_by_bits():
    """A tiny llama's linears hold 27,648 weights of attention and 46,080 of MLP in each block; down is a third of the latter."""
    model = tiny_model("llama")
    structure = describe(model)
    for layer in _in_blocks(structure):
        if layer.kind in ("v", "down"):
            module = model.get_submodule(layer.name)
            weight = weight_of(module)
            set_weight(module, _symmetric(weight.reshape(-1, 32), 4 if layer.kind == "v" else 3).reshape(weight.shape))
    # Three bits without an offset are seven levels, four bits fifteen.
    assert detect_grids(model, structure) == (Grid(3, 15360 / 73728), Grid(4, 4608 / 73728))


def test_a_type_is_a_grid_by_its_name():
    """Types whose blocks the weights do not show, here free ones; a float type is looked at."""
    model = tiny_model("llama")
    structure = describe(model)
    kinds = {
        layer.name: {"down": "Q6_K", "up": "IQ4_XS", "v": "Q4_K"}.get(layer.kind, "F16") for _, layer in structure.layers()
    }
    found = detect_grids(model, structure, kinds)
    assert [(grid.bits, grid.kinds) for grid in found] == [(4, ("IQ4_XS", "Q4_K")), (6, ("Q6_K",))]
    assert [grid.share for grid in found] == [pytest.approx((15360 + 4608) / 73728), pytest.approx(15360 / 73728)]


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_K", 4), ("Q8_0", 8), ("IQ3_XXS", 3), ("TQ1_0", 2), ("IQ1_M", 2), ("MXFP4", 4), ("Q1_0", 1)]
)
def test_bits_of_a_type(kind, bits):
    assert bits_of(kind) == bits


@pytest.mark.parametrize(("top", "bits"), [(255, 8), (256, None)])
def test_a_grid_has_at_most_eight_bits(top, bits):
    model = tiny_model("llama")
    structure = describe(model)
    for _, layer in structure.layers():
        levels = torch.randint(0, top, (layer.d_out, layer.d_in // 32, 32), generator=torch.Generator().manual_seed(0))
        levels[..., :3] = torch.tensor([0, 1, top])
        set_weight(model.get_submodule(layer.name), 0.37 * levels.flatten(1).float())
    assert [grid.bits for grid in detect_grids(model, structure)] == ([bits] if bits else [])


def test_float_offset_error_by_hand():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.4], [1.0, 1.0, 1.0, 1.0]])
    # Two bits, groups of four: steps of 3.4 / 3, so 1 -> 1.1333 and 2 -> 2.2667; a constant group is exact.
    expected = (0.13333**2 + 0.26667**2) ** 0.5 / (1 + 4 + 3.4**2 + 4) ** 0.5
    assert float_offset_error(weight, bits=2, group=4) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="group=32"):
        float_offset_error(weight)


@pytest.mark.parametrize(
    "arch", ["llama", "llama-untied", "qwen2", "qwen3", "gemma3", "mixtral", "qwen2-moe", "opt", "stablelm"]
)
def test_leaving_the_grid_keeps_the_function(arch):
    model = tiny_model(arch)
    structure = describe(model)
    _put_on_grid(model, structure, _float_offset, 4)
    before, expected = _errors(model, structure), logits_of(model, tiny_tokens())
    assert max(before) < 1e-6
    assert leave_grid_(model, structure) == ()
    found = logits_of(model, tiny_tokens())
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.equal(found, expected)
    assert min(_errors(model, structure)) > 0.07
    assert detect_grids(model, structure) == ()
    assert describe(model) == structure


def test_it_is_deterministic_in_the_seed():
    first, again, other = (tiny_model("llama") for _ in range(3))
    structure = describe(first)
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        leave_grid_(model, structure, seed)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_what_is_not_possible_is_said_and_left():
    """A fused q, k, v has no value rows that are known: its output projections keep their columns, the rest moves."""
    model = tiny_model("phi3")
    structure = describe(model)
    _put_on_grid(model, structure, _float_offset, 4)
    expected = logits_of(model, tiny_tokens())
    (note,) = leave_grid_(model, structure)
    assert "rotating the value heads" in note
    assert torch.allclose(logits_of(model, tiny_tokens()), expected, atol=1e-4)
    errors = {layer.kind: e for layer, e in zip(_in_blocks(structure), _errors(model, structure), strict=True)}
    assert errors["o"] < 1e-6
    assert min(errors["qkv"], errors["gate_up"], errors["down"]) > 0.07


def test_an_illegal_transform_is_taken_back():
    """Weights that the structure does not list (here a residual scale a channel, in a buffer) forbid a permutation."""
    model = tiny_model("llama")
    structure = describe(model)
    gain = torch.linspace(0.5, 2.0, 96)
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: output * gain)
    expected = logits_of(model, tiny_tokens())
    (note,) = leave_grid_(model, structure)
    assert "permuting the residual channels" in note
    assert torch.allclose(logits_of(model, tiny_tokens()), expected, atol=1e-4)
