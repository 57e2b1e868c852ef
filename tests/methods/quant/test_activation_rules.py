"""How inputs are rounded: groups of like ranges, scales that are powers of two, the choice between formats."""

import math
from dataclasses import replace

import pytest
import torch

from methods.apply import Installer, site_view
from methods.catalogue import apply, refuses
from methods.formats.format import parse_format
from methods.formats.numerics import decode, quantize_activation
from methods.method import SiteView, Stats
from methods.model.describe import describe
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision, Knob
from methods.quant.clusters import like_ranges, range_of_label, sorted_ranges
from methods.quant.log_equalize import input_rule
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest
from methods.quant.pow2 import pow2_each, pow2_ratio
from methods.quant.split_merge import by_disassembly, copies
from methods.quant.static_range import (
    by_clusters,
    by_groups,
    by_quiet_range,
    by_range,
    by_scale_search,
    by_token_clip,
    static_parts,
)
from methods.quant.task import Task
from tests.tiny import tiny_model, tiny_tokens

D_IN = 144


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def span_of(seed: int = 0) -> torch.Tensor:
    """Ranges of inputs that differ in place and size: (2, d_in)."""
    middle, width = 3 * random(D_IN, seed=seed), torch.exp(1.5 * random(D_IN, seed=seed + 1))
    return torch.stack([middle - width, middle + width])


def test_like_ranges_is_a_fixed_point_of_lloyd() -> None:
    span = span_of()
    labels = like_ranges(span, 5)
    assert labels.shape == (D_IN,) and set(labels.tolist()) == set(range(5))
    centres = torch.stack([span[:, labels == label].double().mean(1) for label in range(5)])
    for column in range(D_IN):
        distances = (centres - span[:, column].double()).square().sum(1)
        assert int(distances.argmin()) == int(labels[column])


def test_like_ranges_finds_clusters_that_are_apart() -> None:
    truth = torch.arange(D_IN) % 3
    span = torch.stack([-torch.tensor([1.0, 20.0, 0.5])[truth], torch.tensor([1.0, 2.0, 90.0])[truth]])
    labels = like_ranges(span + 0.01 * random(2, D_IN), 3)
    assert all(len(labels[truth == label].unique()) == 1 for label in range(3)) and len(labels.unique()) == 3


def test_one_cluster_is_all_inputs_and_as_many_as_inputs_is_each() -> None:
    span = span_of()
    for labels in (like_ranges(span, 1), sorted_ranges(span, 1)):
        joint = range_of_label(span, labels)
        assert (joint[0] == span[0].min()).all() and (joint[1] == span[1].max()).all()
    for labels in (like_ranges(span, D_IN), sorted_ranges(span, D_IN)):
        assert torch.equal(range_of_label(span, labels), span)


@pytest.mark.parametrize("groups", [5, 8, 144])
def test_sorted_ranges_are_equal_groups_in_order(groups: int) -> None:
    span = span_of()
    labels = sorted_ranges(span, groups)
    counts = labels.bincount(minlength=groups)
    assert int(counts.max() - counts.min()) <= 1 and int(counts.min()) >= 1
    width = span[1] - span[0]
    for label in range(groups - 1):
        assert width[labels == label].max() <= width[labels == label + 1].min()


def test_range_of_label_spans_its_inputs() -> None:
    span, labels = span_of(), torch.arange(D_IN) % 7
    joint = range_of_label(span, labels)
    for label in range(7):
        mine = labels == label
        assert (joint[0, mine] == span[0, mine].min()).all() and (joint[1, mine] == span[1, mine].max()).all()


@pytest.mark.parametrize("name", ["w4a16-g48", "w3a16-g16-asym", "w4a8-g48"])
def test_pow2_scales(name: str) -> None:
    fmt = parse_format(name)
    weight = random(13, D_IN) * torch.exp(random(13, 9, seed=1)).repeat_interleave(16, 1)
    free, each, ratio = minmax(weight, fmt), pow2_each(weight, fmt), pow2_ratio(weight, fmt)
    assert torch.equal(torch.frexp(each.scale.float()).mantissa.abs(), torch.full(each.scale.shape, 0.5))
    grown = each.scale.float() / free.scale.float()
    assert (grown >= 1).all() and (grown < 2).all()
    shift = ratio.scale.float().abs().amax(1, keepdim=True) / ratio.scale.float().abs()
    assert torch.equal(shift.log2(), shift.log2().round()) and len(shift.unique()) > 2
    assert torch.equal(ratio.scale.abs().amax(1), free.scale.abs().amax(1))
    moved = (ratio.scale.float() / free.scale.float()).log2()
    assert (moved.abs() <= 0.5 + 1e-6).all() and (moved != 0).any()

    def error(grid: object) -> float:
        return float((decode(fmt, nearest(weight, fmt, grid)) - weight).square().sum())  # type: ignore[arg-type]

    assert error(ratio) < error(each)


def test_pow2_of_powers_of_two_changes_nothing() -> None:
    fmt = parse_format("w4a16-g48")
    weight = torch.ones(5, 3).mul(torch.tensor([8.0, 2.0, 0.25])).repeat_interleave(48, 1) * -1
    assert torch.equal(pow2_each(weight, fmt).scale, minmax(weight, fmt).scale)
    assert torch.equal(pow2_ratio(weight, fmt).scale, minmax(weight, fmt).scale)


def test_input_rule_by_its_bounds() -> None:
    rules = {0.0: "static", 15.0: "static", 15.1: "equalised", 149.9: "equalised", 150.0: "token", math.inf: "token"}
    assert {largest: input_rule(largest) for largest in rules} == rules


def loud_inputs(n: int = 90, seed: int = 0) -> torch.Tensor:
    """Inputs of unequal size and place, and a few tokens that are eight times as large."""
    x = random(n, D_IN, seed=seed) * torch.exp(1.2 * random(D_IN, seed=50)) + 2 * random(D_IN, seed=51)
    return x * torch.where(torch.arange(n) % 30 == 7, 8.0, 1.0)[:, None]


def task(fmt: str, x: torch.Tensor, **knobs: Knob) -> Task:
    stats = Stats(len(x), range=torch.stack(x.aminmax(dim=0)), sample=x)
    layer = LayerSpec("q", "q", 0, D_IN, 11)
    weight = random(11, D_IN, seed=7) * 0.1
    return Task("q", SiteView(Site("q", "q", 0, (layer,)), {"q": weight}), weight, stats, parse_format(fmt), knobs)


def input_error(made: Task, parts: dict[str, torch.Tensor], x: torch.Tensor) -> float:
    """Of the outputs, for the weight as it is."""
    return float(((quantize_activation(x, made.fmt, parts) - x) @ made.weight.T).square().sum())


def test_static_scales_by_hand() -> None:
    span, fmt = torch.tensor([[-3.0, 0.5], [1.0, 3.0]]), parse_format("w8a8-tensor")
    parts = static_parts(span, fmt, offset=False)
    assert parts["act.scale"].tolist() == pytest.approx([3 / 127, 3 / 127]) and "act.offset" not in parts
    parts = static_parts(span, parse_format("w4a4-tensor"), offset=True)
    assert parts["act.scale"].tolist() == pytest.approx([4 / 15, 2.5 / 15])
    assert parts["act.offset"].tolist() == pytest.approx([-11 * 4 / 15, 0.5])
    zero = quantize_activation(torch.zeros(1, 2), parse_format("w4a4-tensor"), parts)
    assert zero[0, 0] == 0.0 and zero[0, 1] == 0.5, "zero stays zero where the range spans it"
    parts = static_parts(torch.tensor([[-3.0], [1.0]]), parse_format("e2m1ae2m1-tensor"), offset=False)
    assert parts["act.scale"].tolist() == [0.5]
    assert static_parts(torch.zeros(2, 1), fmt, offset=False)["act.scale"].tolist() == [1.0]


@pytest.mark.parametrize("offset", [False, True])
def test_static_range_reaches_every_input_of_calibration(offset: bool) -> None:
    x = loud_inputs()
    made = task("w8a8-tensor", x, offset=offset)
    parts = by_range(made, made.weight)
    assert parts["act.scale"].shape == (1,) and ("act.offset" in parts) == offset
    off = (quantize_activation(x, made.fmt, parts) - x).abs().max()
    assert float(off) <= float(parts["act.scale"]) / 2 * 1.001
    # The scale is fixed: it does not grow with other inputs.
    assert (quantize_activation(3 * x, made.fmt, parts)).abs().max() <= 1.001 * x.abs().max()


def test_more_clusters_and_groups_round_inputs_better() -> None:
    x = loud_inputs()
    for rule, knob in ((by_clusters, "clusters"), (by_groups, "groups")):
        errors = []
        for n in (1, 3, 9, 48):
            made = task("w4a4-tensor-g48", x, **{knob: n})
            parts = rule(made, made.weight)
            assert parts["act.scale"].shape == parts["act.offset"].shape == (D_IN,)
            assert len(parts["act.scale"].unique()) <= n
            errors.append(input_error(made, parts, x))
        whole = task("w4a4-tensor-g48", x, **{knob: 1}, offset=True)
        one, same = rule(whole, whole.weight), by_range(whole, whole.weight)
        # One scale for all is ruined where zero lies between two codes: a tenth of that is what clusters have to get below.
        between = input_error(whole, {**same, "act.offset": same["act.offset"] + same["act.scale"] / 2}, x)
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * between and errors[0] < 0.2 * between
        assert torch.equal(quantize_activation(x, whole.fmt, one), quantize_activation(x, whole.fmt, same))


def test_token_clip_takes_the_best_of_its_quantiles() -> None:
    x, points = loud_inputs(), 10
    made = task("w4a6-tensor-g48", x, points=points)
    dense = decode(made.fmt, nearest(made.weight, made.fmt, minmax(made.weight, made.fmt)))
    parts = by_token_clip(made, dense)
    low, high = x.min(1).values, x.max(1).values
    errors = []
    for point in range(points):
        kept = 1 - (point / points) ** 2
        span = torch.stack([low.quantile(1 - kept), high.quantile(kept)])[:, None]
        rounded = quantize_activation(x, made.fmt, static_parts(span, made.fmt, offset=True))
        errors.append(float((rounded @ dense.T - x @ made.weight.T).square().sum()))
    found = float((quantize_activation(x, made.fmt, parts) @ dense.T - x @ made.weight.T).square().sum())
    assert found == pytest.approx(min(errors), rel=1e-4)
    whole = task("w4a6-tensor-g48", x, points=1, offset=True)
    assert torch.equal(by_token_clip(whole, dense)["act.scale"], by_range(whole, dense)["act.scale"])


def test_clipping_pays_where_one_token_is_far_out() -> None:
    x = random(120, D_IN)
    x[5] *= 6
    made = task("w4a4-tensor-g48", x, points=20, offset=True)
    clipped, full = by_token_clip(made, made.weight), by_range(made, made.weight)
    assert float(clipped["act.scale"]) < 0.9 * float(full["act.scale"])
    assert input_error(made, clipped, x) < input_error(made, full, x)


def test_scale_search_is_never_worse_than_the_largest_input() -> None:
    x = loud_inputs(n=60)
    made = task("e2m1ae2m1-tensor-g48", x, steps=40)
    searched, full = by_scale_search(made, made.weight), by_scale_search(replace(made, knobs={"steps": 1}), made.weight)
    assert float(full["act.scale"]) == pytest.approx(float(x.abs().max()) / 6)
    assert float(searched["act.scale"]) < float(full["act.scale"])
    assert input_error(made, searched, x) < input_error(made, full, x)


def test_llm_fp4_shifts_the_inputs_of_a_site_without_a_norm_by_powers_of_two() -> None:
    """Against the rule written out: input j over s_j onto the fixed scale, rounded, and columns times s_j on the weight's own grid."""
    x, weight = loud_inputs(60), random(11, D_IN, seed=7) * 0.1
    site = Site("down", "down", 0, (LayerSpec("down", "down", 0, D_IN, 11),))
    stats = {"down": Stats(len(x), abs_max=x.abs().amax(0), sample=x)}
    decision = Decision.of("llm-fp4", format="e2m1ae2m1-tensor-g48", steps=20)
    assert refuses(site, decision) is None
    edit = apply(SiteView(site, {"down": weight}), stats, decision)
    made = edit.linears["down"]
    largest = x.abs().amax(0)
    shift = 2.0 ** -(largest.max() / largest).log2().round().clamp(0, 3)
    assert torch.equal(made.payload["turn.ratio"].float(), shift) and len(shift.unique()) == 4
    fmt = made.format
    inner = decode(fmt, nearest(weight * shift, fmt, mse(weight * shift, fmt)))
    assert torch.equal(made.dense, inner / shift)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

    def rounded(scale: float) -> torch.Tensor:
        steps = x / shift / scale
        return levels[(steps.abs()[..., None] - levels).abs().argmin(-1)] * steps.sign() * scale

    top = float((x / shift).abs().max()) / 6
    errors = [float((rounded(top * (1 - k / 20)) @ inner.T - x @ weight.T).square().sum()) for k in range(20)]
    assert float(made.payload["act.scale"]) == pytest.approx(top * (1 - errors.index(min(errors)) / 20))
    got = quantize_activation(x, fmt, made.payload) @ made.dense.T
    assert float((got - x @ weight.T).square().sum()) == pytest.approx(min(errors), rel=1e-3)
    still = apply(SiteView(site, {"down": weight}), stats, Decision.of("llm-fp4", format="e2m1ae2m1-tensor-g48", limit=0))
    assert not any(part.startswith("turn.") for part in still.linears["down"].payload)


def test_fptq_fixes_the_scale_only_below_its_bound() -> None:
    x = loud_inputs()
    largest = float(x.abs().max())
    for loud, fixed in ((largest * 1.01, True), (largest * 0.99, False)):
        made = task("w4a8-tensor-g48", x, quiet=1.0, loud=loud)
        assert bool(by_quiet_range(made, made.weight)) == fixed


def test_layers_that_met_no_token_get_no_fixed_scale() -> None:
    made = task("w8a8-tensor", torch.zeros(2, D_IN), offset=True, clusters=3, points=3, steps=3)
    empty = replace(made, stats=replace(made.stats, n_tokens=0, sample=torch.zeros(0, D_IN)))
    for rule in (by_range, by_clusters, by_token_clip, by_scale_search):
        assert rule(empty, empty.weight) == {}


@pytest.mark.parametrize(
    ("name", "fmt", "message"),
    [
        ("rptq", "w8a8-token", "finds a scale for every token; use w8a8-tensor"),
        ("static", "w8a16", "leaves the inputs as they are; use w8a8-tensor"),
        ("peg", "e2m1ae2m1-tensor-g48", "rounds inputs to e2m1, which has no offset"),
        ("llm-fp4", "w8a8-tensor", "rounds inputs to integers; use e2m1ae2m1-tensor"),
        ("zeroquant", "w4a8-g48", "does not round inputs to eight bits a token"),
        ("zeroquant-fp", "w4a8-token-g48", "is not e2m1ae4m3-token"),
    ],
)
def test_recipes_name_the_formats_that_they_take(name: str, fmt: str, message: str) -> None:
    layer = LayerSpec("q", "q", 0, D_IN, 11)
    reason = refuses(Site("q", "q", 0, (layer,), norm="norm"), Decision.of(name, format=fmt))
    assert reason is not None and message in reason


def test_static_scales_reach_the_model_and_leave_with_the_edit() -> None:
    model = tiny_model("llama")
    structure, tokens = describe(model), tiny_tokens()
    site = next(site for site in structure.sites if site.norm)
    x = 3 * random(200, site.d_in)
    stats = Stats(200, range=torch.stack(x.aminmax(dim=0)))
    view = site_view(model, structure, site)
    edits = {
        clusters: apply(view, dict.fromkeys(view.weights, stats), Decision.of("rptq", format="w8a4-tensor", clusters=clusters))
        for clusters in (1, 8)
    }
    with torch.no_grad(), Installer(model, structure) as installer:
        before, logits = model(tokens).logits, {}
        for clusters, edit in edits.items():
            installer.install(site.name, edit)
            logits[clusters] = model(tokens).logits
        assert not torch.equal(logits[1], logits[8])
        installer.install(site.name, None)
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("growth", [0.05, 0.3, 1.0])
def test_disassembly_keeps_to_its_budget_and_uses_it(growth: float) -> None:
    abs_max = loud_inputs().abs().amax(0)
    split, theta = copies(abs_max, growth)
    assert D_IN < int(split.sum()) <= (1 + growth) * D_IN and theta < float(abs_max.max())
    assert torch.equal(split, (abs_max.double() / theta).ceil().long().clamp(min=1))
    assert int((abs_max.double() / (theta * (1 - 1e-9))).ceil().clamp(min=1).sum()) > (1 + growth) * D_IN - 1
    assert (abs_max / split <= theta * (1 + 1e-6)).all()


def test_disassembly_is_what_the_wider_layer_computes() -> None:
    x = loud_inputs()
    made = task("w4a4-tensor-g48", x, growth=0.3)
    made = replace(made, stats=replace(made.stats, abs_max=x.abs().amax(0)))
    split, theta = copies(x.abs().amax(0), 0.3)
    wide_x, wide_w = (x / split).repeat_interleave(split, 1), made.weight.repeat_interleave(split, 1)
    torch.testing.assert_close(wide_x.double() @ wide_w.double().T, x.double() @ made.weight.double().T, rtol=1e-5, atol=1e-5)
    step = {"act.scale": torch.tensor([theta / 7])}
    expected = quantize_activation(wide_x, made.fmt, step).double() @ wide_w.double().T
    parts = by_disassembly(made, made.weight)
    got = quantize_activation(x, made.fmt, parts).double() @ made.weight.double().T
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    whole = by_range(replace(made, knobs={"offset": False}), made.weight)
    none = by_disassembly(replace(made, knobs={"growth": 0.0}), made.weight)
    assert torch.equal(none["act.scale"], whole["act.scale"].expand(D_IN))
    assert input_error(made, parts, x) < 0.5 * input_error(made, whole, x)


def test_nothing_is_split_where_inputs_are_always_zero() -> None:
    split, theta = copies(torch.zeros(D_IN), 0.5)
    assert theta == 0 and (split == 1).all()
