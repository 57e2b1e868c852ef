"""The transforms: their equations, their limits, and folds that change nothing."""

from collections.abc import Callable

import pytest
import torch

from methods.apply import Installer, site_view
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed, decode, quantize_activation
from methods.method import Edit, NormView, SiteView, Stats
from methods.model.describe import describe
from methods.model.structure import LayerSpec, Site
from methods.model.weights import bias_of, set_weight, weight_of
from methods.model.weights import norm_view as norm_of
from methods.quant.awq import awq
from methods.quant.fold import fold, fold_shifted
from methods.quant.log_equalize import log_equalize
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.outlier_plus import outlier_plus, threshold_scale
from methods.quant.pre_shift import pre_shift
from methods.quant.scaling import by_gamma, by_log_equalize, by_outlier_plus, by_pre_shift, by_smooth
from methods.quant.shift import move
from methods.quant.smooth import smooth
from methods.quant.task import Change, Knobs, scaled
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


def test_awq_of_both_sides_is_never_worse_than_no_scale_and_uses_the_weights() -> None:
    x, _ = awq_problem()
    norm, weights, fmt = norm_view(), two_weights(), "w3a16-g48"
    weights = {name: weight * torch.exp(random(D_IN, seed=8)) for name, weight in weights.items()}
    scale = awq(weights, norm, x.abs().mean(0), x, parse_format(fmt), duo=True)
    assert output_error(weights, fold(norm, scale).ratio, fmt, x) <= output_error(weights, torch.ones(D_IN), fmt, x)
    columns = torch.cat(list(weights.values())).abs().mean(0)
    exact = [x.abs().mean(0) ** a / columns ** (1 - a) for a in torch.arange(20) / 20]
    assert min((scale / (s / (s.max() * s.min()).sqrt())).log().abs().max() for s in exact) < 1e-4
    assert not torch.equal(scale, awq(weights, norm, x.abs().mean(0), x, parse_format(fmt)))


def test_log_equalize_by_hand() -> None:
    assert log_equalize(torch.tensor([6.0, 14.0, 0.0])).tolist() == pytest.approx([2.0, 3.5, 1.0])


def test_log_equalize_leaves_sites_alone_whose_range_is_out_of_bounds() -> None:
    view = site(norm_view())
    for largest, applies in ((15.0, False), (15.1, True), (149.0, True), (150.0, False)):
        stats = {name: Stats(9, abs_max=torch.linspace(0.1, largest, D_IN)) for name in view.weights}
        change = by_log_equalize(view, stats, parse_format("w4a8-g48"), {"quiet": 15.0, "loud": 150.0})
        assert (change.ratio is not None) == applies


def test_pre_shift_is_powers_of_two_that_bring_inputs_to_within_a_root_of_two() -> None:
    abs_max = torch.exp(2 * random(D_IN, seed=3))
    scale = pre_shift(abs_max, 20)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((D_IN,), 0.5))
    assert ((abs_max / scale / abs_max.max()).log2().abs() <= 0.5 + 1e-5).all() and len(scale.unique()) > 5
    assert (pre_shift(abs_max, 0) == 1).all() and float(pre_shift(abs_max, 3).min()) == 0.125
    assert pre_shift(torch.tensor([0.0, 4.0, 1.0]), 3).tolist() == [0.125, 1.0, 0.25]
    assert (pre_shift(torch.zeros(3), 3) == 1).all()


def site(norm: NormView, biased: bool = False) -> SiteView:
    weights = two_weights()
    layers = tuple(LayerSpec(name, name, 0, D_IN, len(weight), bias=biased) for name, weight in weights.items())
    biases = {name: random(len(weight), seed=9) for name, weight in weights.items()} if biased else {}
    return SiteView(Site("q+k", "q", 0, layers, norm=norm.name), weights, norm, biases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unit_offset", [0.0, 1.0])
def test_fold_shifted_is_exact_for_what_is_stored(dtype: torch.dtype, unit_offset: float) -> None:
    norm = norm_view(dtype, True, unit_offset)
    assert norm.bias is not None
    norm.weight[4] = -unit_offset
    scale, shift = torch.exp(random(D_IN, seed=5)), random(D_IN, seed=6)
    folded = fold_shifted(norm, scale, shift)
    weight, bias = folded.tensors["norm.weight"], folded.tensors["norm.bias"]
    assert weight.dtype == bias.dtype == dtype and folded.shift is not None
    normalised = random(7, D_IN, seed=7)
    before = normalised * (norm.weight.float() + unit_offset) + norm.bias.float()
    after = normalised * (weight.float() + unit_offset) + bias.float()
    torch.testing.assert_close(after * folded.ratio + folded.shift, before, rtol=1e-5, atol=1e-5)
    assert folded.ratio[4] == 1 and weight[4] == norm.weight[4]
    assert ((folded.shift - shift).abs() <= 2**-7 * (norm.bias.float() - shift).abs() + 1e-5).all()
    if unit_offset:
        return
    none = fold_shifted(norm, torch.ones(D_IN), torch.zeros(D_IN))
    assert (none.ratio == 1).all() and none.shift is not None and not none.shift.any()
    assert torch.equal(none.tensors["norm.weight"], norm.weight) and torch.equal(none.tensors["norm.bias"], norm.bias)


def test_fold_shifted_needs_a_bias() -> None:
    with pytest.raises(ValueError, match="norm has no bias that could take a shift"):
        fold_shifted(norm_view(), torch.ones(D_IN), torch.zeros(D_IN))


@pytest.mark.parametrize(("norm_bias", "biased"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_shift_is_left_out_unless_norm_and_layers_have_biases(norm_bias: bool, biased: bool) -> None:
    view = site(norm_view(bias=norm_bias), biased)
    change = move(view, torch.ones(D_IN), torch.full((D_IN,), 0.5))
    moved = norm_bias and biased
    assert bool(change.turns) == moved == ("q.bias" in change.tensors)
    assert change.ratio is not None and (change.ratio == 1).all()


def test_moved_inputs_have_the_statistics_of_moved_inputs() -> None:
    view, x = site(norm_view(bias=True), True), 3 + random(50, D_IN)
    stats = Stats(
        50, abs_max=x.abs().amax(0), range=torch.stack(x.aminmax(dim=0)), sample=x, hessian=x.T @ x, abs_mean=x.abs().mean(0)
    )
    change = move(view, torch.exp(random(D_IN, seed=1)), torch.full((D_IN,), 3.0))
    moved = change.stats("q", stats)
    assert moved.sample is not None and moved.range is not None and change.ratio is not None
    assert moved.sample.mean().abs() < 0.2 < (x / change.ratio).mean().abs()
    torch.testing.assert_close(moved.range, torch.stack(moved.sample.aminmax(dim=0)))
    torch.testing.assert_close(moved.abs_max, moved.sample.abs().amax(0))
    assert moved.hessian is None and moved.abs_mean is None
    assert torch.equal(change.weight("q", view.weights["q"]), view.weights["q"] * change.ratio)


def test_threshold_scale_by_hand() -> None:
    abs_max = torch.tensor([8.0, 2.0, 5.0])
    assert threshold_scale(abs_max, 4.0).tolist() == [2.0, 1.0, 1.25]
    assert (threshold_scale(abs_max, 8.0) == 1).all() and (threshold_scale(torch.zeros(3), 0.0) == 1).all()


@pytest.mark.parametrize("biased", [False, True])
def test_outlier_plus_takes_the_best_of_its_thresholds(biased: bool) -> None:
    x, _ = awq_problem()
    x = (x + 4 * random(D_IN, seed=7))[:90]
    view, fmt, steps = site(norm_view(torch.float32, bias=biased), biased), parse_format("w4a8-token-g48"), 20
    span = torch.stack(x.aminmax(dim=0))
    scale, shift = outlier_plus(view, span, x, fmt, steps)
    assert (shift is not None) == biased
    moved = x - shift if shift is not None else x
    size = moved.abs().amax(0)
    weight, errors = torch.cat(list(view.weights.values())), []
    for step in range(steps):
        tried = threshold_scale(moved.abs().amax(0), float(size.max()) * (1 - step / steps))
        rounded = decode(fmt, nearest(weight * tried, fmt, minmax(weight * tried, fmt)))
        errors.append(float((quantize_activation(moved / tried, fmt) @ rounded.T - moved @ weight.T).square().sum()))
    best = errors.index(min(errors))
    assert best > 0 and min(errors) < 0.9 * errors[0]
    torch.testing.assert_close(scale, threshold_scale(size, float(size.max()) * (1 - best / steps)), rtol=1e-4, atol=1e-4)
    assert (outlier_plus(view, span, x, fmt, 1)[0] == 1).all()


def test_gamma_migration_leaves_a_norm_that_does_not_scale() -> None:
    for norm, biased in ((norm_view(), False), (norm_view(unit_offset=1.0), False), (norm_view(bias=True), True)):
        change = by_gamma(site(norm, biased), {}, parse_format("w4a8-g48"), {})
        assert ((change.tensors["norm.weight"].float() + norm.unit_offset).abs() == 1).all()


WHOLE: dict[str, Knobs] = {"alpha": 0.5, "quiet": 0.0, "loud": 1e9, "steps": 12, "limit": 3}


@pytest.mark.parametrize("transform", [by_smooth, by_log_equalize, by_outlier_plus, by_gamma, by_pre_shift])
@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2", "opt", "neox"])
def test_transforms_are_exact_in_double_precision(
    arch: str, transform: Callable[..., Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(arch)
    structure, tokens = describe(model), tiny_tokens()
    offsets = {spec.norm: norm_of(model, spec.norm).unit_offset for spec in structure.sites if spec.norm}
    model.double()
    if arch == "gemma":
        # Gemma's norm multiplies in fp32, whatever its weight is stored in.
        norms = type(model.get_submodule(next(iter(offsets))))
        monkeypatch.setattr(norms, "forward", lambda self, x: self._norm(x) * (1 + self.weight))
    with torch.no_grad():
        before = model(tokens).logits
    n_moved = 0
    for index, spec in enumerate(structure.sites):
        if spec.norm is None:
            continue
        layers = {layer.name: model.get_submodule(layer.name) for layer in spec.layers}
        weights = {name: weight_of(module).clone() for name, module in layers.items()}
        biases = {name: bias.clone() for name, module in layers.items() if (bias := bias_of(module)) is not None}
        x = (1 + random(40, spec.d_in, seed=index).double()) * torch.exp(random(spec.d_in, seed=index + 99).double())
        stats = Stats(40, abs_max=x.abs().amax(0), range=torch.stack(x.aminmax(dim=0)), sample=x)
        module = model.get_submodule(spec.norm)
        norm = NormView(spec.norm, module.weight.detach(), bias_of(module), offsets[spec.norm])
        view = SiteView(spec, weights, norm, biases)
        change = transform(view, dict.fromkeys(weights, stats), parse_format("w8a8-token"), WHOLE)
        assert change.ratio is not None
        for name, module in layers.items():
            set_weight(module, change.weight(name, weights[name]))
        for name, tensor in change.tensors.items():
            assert tensor.dtype == torch.float64
            model.get_parameter(name).data = tensor
        n_moved += int((change.ratio != 1).sum())
    assert n_moved > 20
    with torch.no_grad():
        after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)
