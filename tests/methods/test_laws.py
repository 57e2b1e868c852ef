"""What every method of the catalogue promises, checked for all of them over many formats."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.bank import Bank
from methods.catalogue import METHODS, apply, method, needs, plan, refuses
from methods.formats.format import parse_format
from methods.formats.numerics import decode, payload_bits
from methods.formats.packing import pack, packed_bytes
from methods.method import Need, NormView, SiteView, Stage, Stats
from methods.model.structure import LayerSpec, Site
from methods.policy import DENSE, Decision
from methods.recipes.recipe import Limit, fold_site, norm_site
from tests.methods.quant.fake_block import block_of

D_IN = 144
LAYERS = (LayerSpec("q", "q", 0, D_IN, 13), LayerSpec("k", "k", 0, D_IN, 5), LayerSpec("v", "v", 0, D_IN, 6))
SITE = Site("q+k+v", "q", 0, LAYERS, norm="norm")
FORMATS = [
    "fp32",
    "bf16",
    "fp16",
    "w2a16-g16-asym",
    "w3a16-g48",
    "w4a16-g48-asym",
    "w4a8-token-g16",
    "w4a8-g48",
    "w4a8-g48-asym",
    "w8a16",
    "w8a8-token",
    "w8a16-g16-asym",
    "w5a4-token",
    "w6a8-tensor",
    "e2m3ae4m3-b16x48-fp32",
    "e2m1a16-g48-e8m0",
    "nvfp4a4",
    "nf4a16-g48",
    "nf4a16-g48-dq",
    "tern2a16-whole",
    "bin1a16",
    "bcq2a16-g48",
    "bcq2a16-g48-asym",
    "lut3a16-g48",
    "lut3a16-whole",
    "w4a16-g16-u4",
    "w3a16-g16-bi3-asym",
    "w4a8-g48-fp16-asym",
    "e2m1ae4m3-token-g48",
    "e2m1ae2m1-tensor-g48",
]
CASES = [
    (name, fmt)
    for name, recipe in METHODS.items()
    if recipe.stage is Stage.QUANTIZE
    for fmt in FORMATS
    if recipe.refuses(SITE, {"format": fmt}) is None
]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What learns takes few steps: laws hold after any number."""
    for recipe in METHODS.values():
        if recipe.learner:
            monkeypatch.setitem(recipe.knobs, "steps", replace(recipe.knobs["steps"], default=6))  # type: ignore[arg-type]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(dtype: torch.dtype = torch.float32) -> SiteView:
    weights = {layer.name: (random(layer.d_out, D_IN, seed=i) * 0.05).to(dtype).float() for i, layer in enumerate(LAYERS)}
    return SiteView(SITE, weights, NormView("norm", (1 + 0.2 * random(D_IN, seed=8)).bfloat16(), None, 0.0))


def statistics(**replaced: torch.Tensor) -> dict[str, Stats]:
    x = random(800, 40, seed=9) @ random(40, D_IN, seed=10) * random(D_IN, seed=11) + 0.3 * random(800, D_IN, seed=12)
    values = {
        "hessian": x.T @ x / len(x),
        "abs_max": x.abs().amax(0),
        "abs_mean": x.abs().mean(0),
        "range": torch.stack(x.aminmax(dim=0)),
        "sample": x[:200],
        "drift": (0.1 * random(800, D_IN, seed=13)).T @ x / len(x),
        "first": x[::80],
        "first_drift": 0.1 * random(10, D_IN, seed=15),
        "block": block_of(view().weights, x, view().norm),
    }
    shared = Stats(len(x), **{**values, **replaced})
    return {layer.name: replace(shared, fisher=random(layer.d_out, D_IN, seed=14).square()) for layer in LAYERS}


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_edit_keeps_shapes_is_finite_and_decodes_bit_for_bit(name: str, fmt: str) -> None:
    edit = apply(view(), statistics(), Decision.of(name, format=fmt))
    assert list(edit.linears) == [layer.name for layer in LAYERS]
    for layer in LAYERS:
        compressed = edit.linears[layer.name]
        assert compressed.dense.shape == (layer.d_out, layer.d_in) and compressed.dense.dtype == torch.float32
        assert compressed.format == parse_format(fmt)
        assert torch.isfinite(compressed.dense).all()
        assert torch.equal(decode(compressed.format, compressed.payload), compressed.dense)
    assert not edit.tensors or METHODS[name].transform or METHODS[name].family == "transform"
    for tensor in edit.tensors.values():
        assert tensor.shape == (D_IN,) and tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all()


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_approximates_the_layer(name: str, fmt: str) -> None:
    """The outputs, with the fold taken into account, are off by at most what the bits explain: a wrong slice or axis is far off."""
    before, stats = view(), statistics()
    edit = apply(before, stats, Decision.of(name, format=fmt))
    assert before.norm is not None
    ratio = before.norm.weight.float() / edit.tensors.get("norm.weight", before.norm.weight).float()
    x = stats["q"].sample
    for layer in LAYERS:
        wanted = x @ before.weights[layer.name].T
        error = (x / ratio) @ edit.linears[layer.name].dense.T - wanted
        assert error.square().sum() / wanted.square().sum() < 8 * 4.0 ** -min(parse_format(fmt).bits, 8)


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_is_deterministic_and_leaves_its_inputs_alone(name: str, fmt: str) -> None:
    site, stats = view(), statistics()
    assert site.norm is not None
    inputs = {
        **site.weights,
        "norm": site.norm.weight,
        **{k: v for k, v in vars(stats["q"]).items() if isinstance(v, torch.Tensor)},
    }
    before = copies(inputs)
    first, second = (apply(site, stats, Decision.of(name, format=fmt)) for _ in range(2))
    assert all(torch.equal(before[key], tensor) for key, tensor in inputs.items())
    for layer in first.linears:
        assert torch.equal(first.linears[layer].dense, second.linears[layer].dense)
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


@pytest.mark.parametrize("name", [name for name, recipe in METHODS.items() if recipe.stage is Stage.QUANTIZE])
def test_the_bank_gives_back_what_it_was_given(name: str, tmp_path: Path) -> None:
    decision, bank = Decision.of(name, format=legal_format(name)), Bank(tmp_path)
    edit = apply(view(), statistics(), decision)
    bank.put(SITE.name, decision, edit)
    again = bank.get(SITE.name, decision)
    assert edit.linears.keys() == again.linears.keys() and edit.tensors.keys() == again.tensors.keys()
    for layer, compressed in edit.linears.items():
        own = again.linears[layer]
        assert own.payload.keys() == compressed.payload.keys() and torch.equal(own.dense, compressed.dense)
        assert all(torch.equal(own.payload[part], tensor) for part, tensor in compressed.payload.items())
    assert all(torch.equal(again.tensors[tensor], edit.tensors[tensor]) for tensor in edit.tensors)


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_plan_costs_what_the_payload_weighs(name: str, fmt: str) -> None:
    decision = Decision.of(name, format=fmt)
    planned, edit = plan(SITE, decision), apply(view(), statistics(), decision)
    assert planned.format == parse_format(fmt)
    bits = sum(payload_bits(c.format, c.payload) for c in edit.linears.values())
    if METHODS[name].side_bits is None:
        assert planned.cost.bits_per_weight * SITE.n_weights == pytest.approx(bits, rel=1e-12)
    else:
        # What is kept beside the grid may depend on the weights: the plan is what it takes at most.
        grid = planned.format.bits_per_weight(D_IN) * SITE.n_weights
        assert grid * (1 - 1e-12) <= bits <= planned.cost.bits_per_weight * SITE.n_weights * (1 + 1e-12)
    for compressed in edit.linears.values():
        if "codes" in compressed.payload:
            codes = compressed.payload["codes"]
            assert pack(codes, compressed.format.bits).numel() == packed_bytes(codes.numel(), compressed.format.bits)


QUANTIZERS = [name for name, recipe in METHODS.items() if recipe.stage is Stage.QUANTIZE]


def legal_format(name: str) -> str:
    """A format, with groups where the method takes them, that the method allows."""
    return next(fmt for method, fmt in CASES if method == name and not parse_format(fmt).dense)


def only(stats: Stats, needs: frozenset[Need]) -> Stats:
    return Stats(stats.n_tokens, **{need.value: getattr(stats, need.value) for need in needs})


@pytest.mark.parametrize("name", QUANTIZERS)
def test_reads_exactly_the_statistics_it_declares(name: str) -> None:
    recipe = METHODS[name]
    decision = Decision.of(name, format=legal_format(name))
    everything = apply(view(), statistics(), decision)
    declared = {name: only(own, recipe.needs) for name, own in statistics().items()}
    enough = apply(view(), declared, decision)
    for layer, compressed in enough.linears.items():
        assert torch.equal(compressed.dense, everything.linears[layer].dense)
    for need in recipe.needs:
        lacking = {name: only(own, recipe.needs - {need}) for name, own in statistics().items()}
        with pytest.raises(ValueError, match=f"lack {need.value}"):
            apply(view(), lacking, decision)


@pytest.mark.parametrize("name", [name for name, recipe in METHODS.items() if recipe.needs])
def test_says_that_there_are_no_statistics(name: str) -> None:
    with pytest.raises(ValueError, match="no calibration statistics for q"):
        apply(view(), {}, Decision.of(name, format=legal_format(name)))


def test_every_method_has_a_name_a_summary_and_a_source() -> None:
    for name, recipe in METHODS.items():
        assert recipe.name == name == name.lower()
        assert recipe.summary and recipe.source.title and recipe.source.ref
        assert recipe.stage is Stage.NONE or 2000 < recipe.source.year < 2100
        assert all(spec.allows(spec.default) for spec in recipe.knobs.values())


def ones_scale() -> dict[str, Stats]:
    """Inputs for which every transform finds the scale 1."""
    largest = torch.cat(list(view().weights.values())).abs().amax(0)
    return statistics(abs_max=largest, abs_mean=torch.full((D_IN,), 2.0))


SPECIAL: dict[str, tuple[dict[str, Any], dict[str, Stats], str]] = {
    "gptq": (
        {"first": 1},
        statistics(hessian=torch.diag(torch.rand(D_IN, generator=torch.Generator().manual_seed(0)) + 0.1)),
        "rtn",
    ),
    "awq": ({}, ones_scale(), "rtn"),
    "hqq": ({"iterations": 0}, {}, "rtn"),
    "smoothquant": ({"alpha": 0.5}, ones_scale(), "rtn"),
    "awq-gptq": ({}, ones_scale(), "gptq"),
    "smooth-gptq": ({"alpha": 0.5}, ones_scale(), "gptq"),
}
"""Knobs and statistics at which a method is bit for bit a simpler one."""


@pytest.mark.parametrize("fmt", ["w2a16-g16-asym", "w4a16-g48-asym", "w3a8-g48-asym"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_statistics_make_it_the_simpler_method(name: str, fmt: str) -> None:
    knobs, stats, simpler = SPECIAL[name]
    edit = apply(view(), stats, Decision.of(name, format=fmt, **knobs))
    expected = apply(view(), stats, Decision.of(simpler, format=fmt))
    for layer in expected.linears:
        assert torch.equal(edit.linears[layer].dense, expected.linears[layer].dense)
    other = apply(view(), statistics(), Decision.of(name, format=fmt))
    assert any(not torch.equal(other.linears[layer].dense, expected.linears[layer].dense) for layer in expected.linears)


def test_rtn_to_a_dtype_that_holds_the_weights_is_exact() -> None:
    for dtype, fmt in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        edit = apply(view(dtype), {}, Decision.of("rtn", format=fmt))
        assert all(torch.equal(edit.linears[name].dense, weight) for name, weight in view(dtype).weights.items())


@pytest.mark.parametrize("name", ["gptq", "awq-gptq"])
def test_layers_that_share_statistics_round_as_if_alone(name: str) -> None:
    decision = Decision.of(name, format="w4a16-g48-asym")
    together = apply(view(), statistics(), decision)
    alone = apply(view(), {layer.name: statistics()["q"] for layer in LAYERS}, decision)
    for layer in together.linears:
        same = together.linears[layer].payload["codes"] == alone.linears[layer].payload["codes"]
        # A wider product may sum in another order, which can tip a tie; anything else changes most codes.
        assert same.float().mean() > 0.99


@pytest.mark.parametrize(("name", "transform"), [("awq-gptq", "awq"), ("smooth-gptq", "smoothquant")])
def test_a_combination_is_gptq_of_the_transformed_site(name: str, transform: str) -> None:
    fmt, before, stats = "w4a16-g48-asym", view(), statistics()
    assert before.norm is not None
    folded = apply(before, stats, Decision.of(transform, format=fmt)).tensors["norm.weight"]
    ratio = before.norm.weight.float() / folded.float()
    weights = {layer: weight * ratio for layer, weight in before.weights.items()}
    hessian = stats["q"].hessian
    assert hessian is not None and (ratio != 1).float().mean() > 0.9
    first = stats["q"].first
    assert first is not None
    moved = statistics(hessian=hessian / ratio[:, None] / ratio, first=first / ratio)
    expected = apply(SiteView(SITE, weights, before.norm), moved, Decision.of("gptq", format=fmt))
    edit = apply(before, stats, Decision.of(name, format=fmt))
    assert torch.equal(edit.tensors["norm.weight"], folded)
    for layer in edit.linears:
        same = edit.linears[layer].payload["codes"] == expected.linears[layer].payload["codes"]
        assert same.float().mean() > 0.99


def test_none_leaves_the_site_as_it_is() -> None:
    edit = apply(view(), {}, DENSE)
    assert not edit.linears and not edit.tensors
    assert plan(SITE, DENSE).format.name == "bf16" and plan(SITE, DENSE, "fp32").cost.bits_per_weight == 32


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Decision.of("gtpq", format="w4a16"), r"no method 'gtpq'; did you mean gptq or .*`search methods` lists all"),
        (Decision.of("rtn"), "knob format is missing"),
        (Decision.of("rtn", format="w9a16"), "integer grids have"),
        (Decision.of("rtn", format="int4"), "unknown format"),
        (Decision.of("rtn", format="w4a16", alpha=0.5), "unknown knob 'alpha'; allowed are format, fitter"),
        (Decision.of("rtn", format="w4a16", fitter="best"), "fitter='best' is not allowed; use minmax or mse"),
        (Decision.of("gptq", format="w4a16", damping=-1.0), "use auto or a number from 0 to 100"),
        (Decision.of("gptq", format="w4a16", damping=True), "damping=True is not allowed"),
        (Decision.of("gptq", format="w4a16", act_order=1), "act_order=1 is not allowed; use true or false"),
        (Decision.of("hqq", format="w4a16-asym", iterations=2.5), "use a whole number from 0 to 100"),
        (Decision.of("smoothquant", format="w8a8-token", alpha=1.5), "use a number from 0 to 1"),
        (Decision.of("none", format="bf16"), "unknown knob 'format'; allowed are none at all"),
    ],
)
def test_wrong_decisions_are_errors_that_name_what_is_allowed(decision: Decision, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuses(SITE, decision)
    with pytest.raises(ValueError, match=message):
        plan(SITE, decision)
    with pytest.raises(ValueError, match=message):
        apply(view(), statistics(), decision)


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Decision.of("gptq", format="bf16"), "no grid to fit; use rtn"),
        (Decision.of("hqq", format="w4a16-g48"), "no offset to solve for; use w4a16-g48-asym"),
        (Decision.of("rtn", format="bf16", fitter="mse"), "a cast, on which fitter has no effect"),
        (Decision.of("rtn", format="w4a16-g64"), "does not divide d_in=144"),
    ],
)
def test_refusals_give_a_reason(decision: Decision, message: str) -> None:
    reason = refuses(SITE, decision)
    assert reason is not None and message in reason
    with pytest.raises(ValueError, match=message):
        plan(SITE, decision)
    with pytest.raises(ValueError, match=message):
        apply(view(), statistics(), decision)


LIMITS = [(name, limit) for name, recipe in METHODS.items() for limit in recipe.limits]


@pytest.mark.parametrize(("name", "limit"), LIMITS, ids=[f"{name}-{limit.method}" for name, limit in LIMITS])
def test_limit_settings_are_the_simpler_method(name: str, limit: Limit) -> None:
    site, stats = view(), statistics()
    special = apply(site, stats, Decision.of(name, format=limit.format, **limit.knobs))
    simpler = apply(site, stats, Decision.of(limit.method, format=limit.format, **limit.with_knobs))
    for layer, compressed in special.linears.items():
        assert torch.equal(compressed.dense, simpler.linears[layer].dense)


@pytest.mark.parametrize("name", [name for name, recipe in METHODS.items() if recipe.sites in (norm_site, fold_site)])
def test_folding_transforms_refuse_sites_without_a_norm(name: str) -> None:
    site = Site("q+k+v", "q", 0, LAYERS)
    assert "follows no norm" in str(refuses(site, Decision.of(name, format=legal_format(name))))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    site = view()
    site.weights["k"][2, 3] = value
    with pytest.raises(ValueError, match="k has infinite or NaN weights"):
        apply(site, statistics(), Decision.of(name, format=legal_format(name)))


def test_gamma_migration_out_of_a_unit_norm_is_plain_rounding() -> None:
    site, fmt = view(), "w6a8-tensor"
    assert site.norm is not None
    unit = replace(site, norm=replace(site.norm, weight=torch.ones(D_IN, dtype=torch.bfloat16)))
    moved, plain = (apply(unit, statistics(), Decision.of(name, format=fmt)) for name in ("outlier-suppression", "rtn"))
    assert all(torch.equal(moved.linears[name].dense, plain.linears[name].dense) for name in moved.linears)
    changed = apply(site, statistics(), Decision.of("outlier-suppression", format=fmt))
    assert any(not torch.equal(changed.linears[name].dense, plain.linears[name].dense) for name in plain.linears)


def test_every_method_has_a_limit() -> None:
    assert {name for name, _ in LIMITS} | set(SPECIAL) | {"rtn", "outlier-suppression"} == set(QUANTIZERS)


def test_needs_are_the_union() -> None:
    decisions = [DENSE, Decision.of("gptq", format="w4a16"), Decision.of("smoothquant", format="w8a8-token")]
    assert needs(decisions) == {Need.HESSIAN, Need.FIRST, Need.ABS_MAX}
    assert method("awq-gptq").needs == {Need.HESSIAN, Need.FIRST, Need.ABS_MEAN, Need.SAMPLE}


def test_the_catalogue_imports_no_torch() -> None:
    code = "import sys, methods.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
