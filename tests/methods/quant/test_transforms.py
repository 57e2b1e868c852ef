"""The transforms: their equations, their limits, and folds that change nothing."""

import pytest
import torch

from methods.apply import Installer, site_view
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed, decode, quantize_activation
from methods.method import Edit, NormView, Stats
from methods.model.describe import describe
from methods.quant.awq import awq
from methods.quant.fold import fold
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.smooth import smooth
from methods.quant.task import scaled
from tests.tiny import tiny_model, tiny_tokens

D_IN = 144


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_view(dtype: torch.dtype = torch.bfloat16, bias: bool = False, unit_offset: float = 0.0) -> NormView:
    weight = (1 - unit_offset + 0.3 * random(D_IN)).to(dtype)
    return NormView("norm", weight, random(D_IN, seed=1).to(dtype) if bias else None, unit_offset)


def two_weights() -> dict[str, torch.Tensor]:
    return {"q": random(20, D_IN, seed=2) * 0.1, "k": random(9, D_IN, seed=3) * 0.3}


def test_smooth_equation_by_hand() -> None:
    weights = {"q": torch.tensor([[1.0, -4.0], [0.5, 2.0]]), "k": torch.tensor([[-9.0, 1.0]])}
    scale = smooth(weights, torch.tensor([16.0, 4.0]), 0.5)
    assert scale.tolist() == pytest.approx([4 / 3, 1.0])
    scale = smooth(weights, torch.tensor([16.0, 4.0]), 0.25)
    assert scale.tolist() == pytest.approx([2 / 9**0.75, 4**0.25 / 4**0.75])


def test_smooth_of_dead_inputs_and_zero_columns_is_finite() -> None:
    scale = smooth({"q": torch.zeros(3, 2)}, torch.tensor([0.0, 5.0]), 0.5)
    assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("unit_offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fold_is_exact_for_what_is_stored(dtype: torch.dtype, unit_offset: float, bias: bool) -> None:
    norm = norm_view(dtype, bias, unit_offset)
    norm.weight[4] = -unit_offset
    scale = torch.exp(random(D_IN, seed=5))
    folded = fold(norm, scale)
    new = folded.tensors["norm.weight"]
    assert new.dtype == dtype
    torch.testing.assert_close((new.float() + unit_offset) * folded.ratio, norm.weight.float() + unit_offset, rtol=1e-6, atol=0)
    assert folded.ratio[4] == 1 and new[4] == norm.weight[4]
    assert set(folded.tensors) == ({"norm.weight", "norm.bias"} if bias else {"norm.weight"})
    if bias:
        assert norm.bias is not None
        assert torch.equal(folded.tensors["norm.bias"].float() * folded.ratio, norm.bias.float())
    if not bias:
        tolerance = 2**-7 * (1 + unit_offset * 8) if dtype == torch.bfloat16 else 1e-5
        others = torch.arange(D_IN) != 4
        assert ((folded.ratio / scale - 1).abs()[others] < tolerance * scale[others].clamp(min=1) * 20).all()
    elif unit_offset == 0:
        assert (((folded.ratio / scale).log2().abs() <= 0.5 + 1e-5) | (folded.ratio == 1)).all()
        assert (folded.ratio != 1).float().mean() > 0.5


def test_fold_of_ones_changes_nothing() -> None:
    norm = norm_view(bias=True)
    folded = fold(norm, torch.ones(D_IN))
    assert (folded.ratio == 1).all()
    assert norm.bias is not None
    assert torch.equal(folded.tensors["norm.weight"], norm.weight) and torch.equal(folded.tensors["norm.bias"], norm.bias)


def test_scaled_hessian_is_that_of_scaled_inputs() -> None:
    x, ratio = random(50, D_IN).double(), torch.exp(random(D_IN, seed=1).double())
    torch.testing.assert_close(scaled(Stats(3, hessian=x.T @ x), ratio).hessian, (x / ratio).T @ (x / ratio))


@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2", "opt"])
def test_fold_keeps_the_logits_of_a_model(arch: str) -> None:
    model = tiny_model(arch).bfloat16().float()
    structure = describe(model)
    tokens = tiny_tokens()
    with torch.no_grad():
        before = model(tokens).logits
    exact = parse_format("fp32")
    with Installer(model, structure) as installer:
        n_folded = 0
        for index, site in enumerate(structure.sites):
            view = site_view(model, structure, site)
            if view.norm is None:
                continue
            folded = fold(view.norm, torch.exp(random(site.d_in, seed=index)))
            assert (folded.ratio != 1).float().mean() > 0.5
            linears = {name: Compressed.of(exact, {"weight": weight * folded.ratio}) for name, weight in view.weights.items()}
            installer.install(site.name, Edit(linears, folded.tensors))
            assert not torch.equal(model.get_parameter(f"{site.norm}.weight"), view.norm.weight.float())
            n_folded += 1
        assert n_folded == 2 * len(structure.blocks)
        with torch.no_grad():
            after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def awq_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of very unequal size: (calibration, held-out) rows."""
    size = torch.exp(1.5 * random(D_IN, seed=4))
    return random(300, D_IN, seed=5) * size, random(300, D_IN, seed=6) * size


def output_error(weights: dict[str, torch.Tensor], ratio: torch.Tensor, name: str, x: torch.Tensor) -> float:
    fmt, weight = parse_format(name), torch.cat(list(weights.values()))
    rounded = decode(fmt, nearest(weight * ratio, fmt, minmax(weight * ratio, fmt)))
    return float((quantize_activation(x / ratio, fmt) @ rounded.T - x @ weight.T).square().sum())


@pytest.mark.parametrize("name", ["w4a16-g48-asym", "w3a16-g16", "w4a8-g48"])
def test_awq_lowers_the_error_of_held_out_outputs(name: str) -> None:
    x, held_out = awq_problem()
    norm, weights = norm_view(), two_weights()
    ratio = fold(norm, awq(weights, norm, x.abs().mean(0), x, parse_format(name))).ratio
    assert output_error(weights, ratio, name, held_out) < 0.9 * output_error(weights, torch.ones(D_IN), name, held_out)


@pytest.mark.parametrize("name", ["w3a16-g48", "w8a8-token"])
def test_awq_takes_the_best_point_of_its_grid(name: str) -> None:
    x, _ = awq_problem()
    norm, weights = norm_view(), two_weights()
    errors = []
    for point in range(20):
        scale = x.abs().mean(0) ** (point / 20)
        errors.append(output_error(weights, fold(norm, scale / (scale.max() * scale.min()).sqrt()).ratio, name, x))
    best = fold(norm, awq(weights, norm, x.abs().mean(0), x, parse_format(name))).ratio
    assert output_error(weights, best, name, x) == pytest.approx(min(errors), rel=1e-4)
    assert 0 < errors.index(min(errors)) < 19


def test_awq_of_equal_inputs_is_one() -> None:
    x, _ = awq_problem()
    assert (awq(two_weights(), norm_view(), torch.full((D_IN,), 3.0), x, parse_format("w4a16-g48")) == 1).all()


def test_smooth_lowers_the_error_of_eight_bit_inputs() -> None:
    x, held_out = awq_problem()
    norm, weights = norm_view(), two_weights()
    ratio = fold(norm, smooth(weights, x.abs().amax(0), 0.5)).ratio
    name = "w8a8-token"
    assert output_error(weights, ratio, name, held_out) < 0.5 * output_error(weights, torch.ones(D_IN), name, held_out)
