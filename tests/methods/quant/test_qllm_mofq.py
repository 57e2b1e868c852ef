"""Inputs split and joined within a layer's width, and the choice between integers and minifloats at a site."""

import itertools
from dataclasses import replace

import pytest
import torch

from methods.apply import Installer, site_view
from methods.catalogue import apply, plan, refuses
from methods.formats.format import parse_format
from methods.formats.numerics import decode, linear, quantize_activation
from methods.formats.turns import inputs_back, turned, turned_back, turned_inputs
from methods.formats.twins import float_twin
from methods.method import SiteView, Stats
from methods.model.describe import describe
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile, parse, render
from methods.quant.format_choice import decide_mofq
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.split_merge import copies, distances, reassembled, similar_pairs
from tests.tiny import tiny_model, tiny_tokens

D_IN = 144
SITE = Site("gate+up", "gate", 0, (LayerSpec("gate", "gate", 0, D_IN, 11), LayerSpec("up", "up", 0, D_IN, 7)))
LOUD = torch.tensor([3, 40, 77, 130])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int = 160, seed: int = 5) -> torch.Tensor:
    """Inputs with four outliers, and fifteen pairs of neighbours that are nearly the same."""
    x = random(n, D_IN, seed=seed)
    x[:, 81:111:2] = x[:, 80:110:2] + 0.05 * random(n, 15, seed=seed + 1)
    x[:, LOUD] *= torch.tensor([30.0, 12.0, 20.0, 45.0])
    return x


def view() -> SiteView:
    return SiteView(SITE, {layer.name: random(layer.d_out, D_IN, seed=i) for i, layer in enumerate(SITE.layers)})


def statistics(x: torch.Tensor) -> dict[str, Stats]:
    return dict.fromkeys(view().weights, Stats(len(x), abs_max=x.abs().amax(0), sample=x))


def parts(growth: float = 0.1) -> dict[str, torch.Tensor]:
    x = inputs()
    weight = torch.cat(list(view().weights.values()))
    return {"turn.slots": reassembled(weight, x.abs().amax(0), x, growth)}


def test_splits_are_exact_and_joined_inputs_take_their_mean() -> None:
    """Against the layer written out: inputs divided and repeated, pairs replaced by their mean and the sum of their columns."""
    x, weight, own = inputs().double(), view().weights["gate"].double(), parts()
    freed, into, _ = own["turn.slots"].long()
    split, _ = copies(inputs().abs().amax(0), 0.1)
    wide_x, wide_w = (x / split).repeat_interleave(split, 1), weight.repeat_interleave(split, 1)
    assert wide_x.shape[1] == D_IN + len(freed) and len(freed) > 3
    assert (wide_x @ wide_w.T - x @ weight.T).abs().max() < 1e-11
    whole = [k for k in range(D_IN) if k not in [*freed.tolist(), *into.tolist()]]
    wanted = x[:, whole] @ weight[:, whole].T
    for a, b in zip(freed.tolist(), into.tolist(), strict=True):
        wanted = wanted + torch.outer((x[:, a] + x[:, b]) / 2, weight[:, a] + weight[:, b])
    assert (turned_inputs(x, own) @ turned(weight, own).T - wanted).abs().max() < 1e-11
    assert (x @ turned_back(turned(weight, own), own).T - wanted).abs().max() < 1e-11


def test_the_width_is_kept_and_every_slot_holds_a_part() -> None:
    x, own = inputs(), parts()
    slots = turned_inputs(x, own)
    assert slots.shape == x.shape and turned(view().weights["up"], own).shape == (7, D_IN)
    split, theta = copies(x.abs().amax(0), 0.1)
    freed, into, copied = own["turn.slots"].long()
    assert torch.equal(copied.bincount(minlength=D_IN) + 1, split)
    assert len({*freed.tolist(), *into.tolist()}) == 2 * len(freed) and (split[freed] == 1).all() and (split[into] == 1).all()
    assert float(slots.abs().max()) <= theta * (1 + 1e-6) < float(x.abs().max())


@pytest.mark.parametrize("fmt", ["w4a4-token", "w4a4-tensor", "w3a4-token-g48", "w4a8-token-g16-asym"])
def test_what_the_payload_says_is_what_the_slots_compute(fmt: str) -> None:
    """Also where copies of a column are rounded in different groups: the sum over slots, inputs rounded there, is the layer."""
    x, own, form = inputs(), parts(), parse_format(fmt)
    inner = turned(view().weights["gate"], own)
    grid = nearest(inner, form, minmax(inner, form))
    by_slots = quantize_activation(turned_inputs(x, own).float(), form).double() @ decode(form, grid).double().T
    payload = {**grid, **own}
    got = linear(x, decode(form, payload), form, payload=payload)
    torch.testing.assert_close(got.double(), by_slots, rtol=1e-4, atol=1e-3)
    assert (inputs_back(turned_inputs(x, own), own) - x)[:, LOUD].abs().max() < 1e-5


def test_distance_is_the_error_of_joining() -> None:
    x, weight = inputs(50).double(), random(9, D_IN, seed=3).double()
    first, second = torch.arange(0, D_IN, 2), torch.arange(1, D_IN, 2)
    cost = distances(weight, x, first, second)
    for a, b in ((0, 0), (40, 40), (71, 3)):
        i, j = int(first[a]), int(second[b])
        lost = x[:, [i, j]] @ weight[:, [i, j]].T - torch.outer((x[:, i] + x[:, j]) / 2, weight[:, i] + weight[:, j])
        assert float(cost[a, b]) == pytest.approx(float(lost.square().sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_the_cheapest_of_those_left(seed: int) -> None:
    cost = torch.rand(9, 8, generator=torch.Generator().manual_seed(seed))
    expected: list[tuple[int, int]] = []
    for row, column in sorted(itertools.product(range(9), range(8)), key=lambda pair: float(cost[pair])):
        if all(row != r and column != c for r, c in expected):
            expected.append((row, column))
    before = cost.clone()
    for n in (0, 1, 5, 8):
        assert similar_pairs(cost, n).T.tolist() == [list(pair) for pair in expected[:n]]
    assert torch.equal(cost, before)


def test_like_inputs_are_joined_and_growth_0_joins_none() -> None:
    freed, into, _ = parts(0.08)["turn.slots"].long()
    assert ((freed - into).abs() == 1).float().mean() > 0.9
    assert parts(0.0)["turn.slots"].shape == (3, 0)


def test_there_are_pairs_enough_up_to_the_largest_growth() -> None:
    for d_in in (16, 48, 144):
        for loud in (1, d_in // 5, d_in // 3):
            abs_max = torch.ones(d_in).index_fill(0, torch.arange(loud), 2.0 if loud > 1 else 50.0)
            slots = reassembled(random(5, d_in), abs_max, random(20, d_in), 0.3)
            assert len(set(slots[:2].flatten().tolist())) == 2 * slots.shape[1]


def output_error(method: str, fmt: str, **knobs: float) -> float:
    """The mean squared error of the outputs on tokens that were not sampled."""
    x, site = inputs(200, seed=20), view()
    edit = apply(site, statistics(inputs()), Decision.of(method, format=fmt, **knobs))
    errors = []
    for name, compressed in edit.linears.items():
        got = linear(x, compressed.dense, compressed.format, payload=compressed.payload)
        errors.append((got - x @ site.weights[name].T).square().mean())
    return float(sum(errors))


@pytest.mark.parametrize("fmt", ["w4a4-token", "w8a4-token", "w8a4-tensor", "e2m1ae2m1-token-g48"])
def test_fewer_bits_of_the_inputs_cost_less(fmt: str) -> None:
    assert output_error("qllm", fmt) < 0.8 * output_error("rtn", fmt)


def test_the_threshold_is_searched_and_shared_by_the_layers() -> None:
    site, stats = view(), statistics(inputs())
    edit = apply(site, stats, Decision.of("qllm", format="w8a4-token", growth=0.2))
    slots = [compressed.payload["turn.slots"] for compressed in edit.linears.values()]
    assert torch.equal(slots[0], slots[1]) and 0 < slots[0].shape[1] <= 28
    coarse = (
        apply(site, stats, Decision.of("qllm", format="w8a4-token", growth=0.2, steps=1)).linears["up"].payload["turn.slots"]
    )
    assert slots[0].shape[1] < coarse.shape[1]
    even = torch.full((60, D_IN), 2.0) * random(60, D_IN).sign()
    none = apply(site, statistics(even), Decision.of("qllm", format="w8a4-token"))
    assert not any("turn.slots" in compressed.payload for compressed in none.linears.values())


def test_layers_that_met_no_token_are_rounded_as_they_are() -> None:
    empty = dict.fromkeys(view().weights, Stats(0, abs_max=torch.zeros(D_IN), sample=torch.zeros(0, D_IN)))
    edit = apply(view(), empty, Decision.of("qllm", format="w4a4-token"))
    expected = apply(view(), {}, Decision.of("rtn", format="w4a4-token"))
    assert all(torch.equal(edit.linears[name].dense, made.dense) for name, made in expected.linears.items())


@pytest.mark.parametrize(
    ("fmt", "message"), [("w4a4-g48", "a scale for each group of inputs"), ("w4a16", "leaves the inputs as they are")]
)
def test_qllm_takes_formats_with_one_scale_for_all_inputs(fmt: str, message: str) -> None:
    assert message in str(refuses(SITE, Decision.of("qllm", format=fmt)))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_slots_reach_the_model_and_leave_with_the_edit(arch: str) -> None:
    model = tiny_model(arch)
    structure, tokens = describe(model), tiny_tokens()
    site = next(site for site in structure.sites if site.norm)
    own = site_view(model, structure, site)
    x = random(100, site.d_in) * torch.ones(site.d_in).index_fill(0, torch.tensor([1, 5]), 30.0)
    stats = dict.fromkeys(own.weights, Stats(100, abs_max=x.abs().amax(0), sample=x))
    edit = apply(own, stats, Decision.of("qllm", format="w8a4-token", growth=0.3))
    assert all("turn.slots" in compressed.payload for compressed in edit.linears.values())
    with torch.no_grad(), Installer(model, structure) as installer:
        before = model(tokens).logits
        installer.install(site.name, edit)
        assert not torch.equal(model(tokens).logits, before)
        installer.install(site.name, None)
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("fmt", "twin"),
    [
        ("w4a16-g48", "e2m1a16-g48"),
        ("w8a8-token", "fp8-token"),
        ("w6a6-tensor", "e2m3ae2m3-tensor"),
        ("w4a8-token-g16", "e2m1ae4m3-token-g16"),
        ("w8a16-whole-fp32", "e4m3a16-whole-fp32"),
    ],
)
def test_the_twin_has_equal_bits_and_layout(fmt: str, twin: str) -> None:
    own, other = parse_format(fmt), float_twin(parse_format(fmt))
    assert other.name == twin and (other.bits, other.act_bits, other.group) == (own.bits, own.act_bits, own.group)
    assert other.bits_per_weight(D_IN) == own.bits_per_weight(D_IN)


@pytest.mark.parametrize("fmt", ["w3a16", "w4a16-asym", "nf4", "bf16", "e2m1a16"])
def test_formats_without_a_twin_are_refused(fmt: str) -> None:
    with pytest.raises(ValueError, match="mofq"):
        decide_mofq(view(), fmt)


@pytest.mark.parametrize("metric", ["weight", "output"])
@pytest.mark.parametrize("fmt", ["w4a16-g48", "w4a4-token", "w8a8-token"])
def test_the_decision_has_the_least_error_over_the_site(fmt: str, metric: str) -> None:
    names = [fmt, float_twin(parse_format(fmt)).name]
    formats, stats, chosen = [parse_format(name) for name in names], statistics(inputs(60)), set()
    for power, loud in ((0.3, 1.0), (1.0, 1.0), (3.0, 1.0), (1.0, 1000.0)):
        site, column = view(), torch.ones(D_IN).index_fill(0, torch.tensor([7]), loud)
        weights = {name: weight.sign() * weight.abs() ** power * column for name, weight in site.weights.items()}
        decision = decide_mofq(replace(site, weights=weights), fmt, stats, "output" if metric == "output" else "weight")
        sample = stats["up"].sample if metric == "output" else None
        sums = torch.zeros(2, dtype=torch.float64)
        for weight in weights.values():
            rounded = [decode(own, nearest(weight, own, minmax(weight, own))) for own in formats]
            pairs = zip(formats, rounded, strict=True)
            values = rounded if sample is None else [linear(sample, dense, own) for own, dense in pairs]
            wanted = weight if sample is None else sample @ weight.T
            sums += torch.stack([(value - wanted).double().square().sum() for value in values])
        assert decision == Decision.of("rtn", format=names[int(sums.argmin())])
        assert plan(SITE, decision).cost == plan(SITE, Decision.of("rtn", format=fmt)).cost
        chosen.add(decision)
    assert len(chosen) == 2 or metric == "output"


def test_layers_of_a_site_agree_by_their_summed_error() -> None:
    """A layer for which minifloats are much better outweighs one for which integers are a little better."""
    flat = torch.rand(7, D_IN, generator=torch.Generator().manual_seed(0)) - 0.5
    heavy = random(11, D_IN) ** 3
    for gate, up, wanted in ((heavy, 0.1 * flat, "e2m1a16"), (0.001 * heavy, flat, "w4a16")):
        decision = decide_mofq(replace(view(), weights={"gate": gate, "up": up}), "w4a16")
        assert decision.knob("format") == wanted


def test_outputs_need_a_sample() -> None:
    with pytest.raises(ValueError, match="give stats, or use metric=weight"):
        decide_mofq(view(), "w8a8-token", metric="output")
    one, empty = statistics(inputs(40)), Stats(0, sample=torch.zeros(0, D_IN))
    with pytest.raises(ValueError, match="met a sampled token; use metric=weight"):
        decide_mofq(view(), "w8a8-token", dict.fromkeys(one, empty), "output")
    one["gate"] = empty
    alone = replace(view(), weights={"up": view().weights["up"]})
    assert decide_mofq(view(), "w4a4-token", one, "output") == decide_mofq(alone, "w4a4-token", one, "output")


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_policy_of_mixed_formats_is_written_and_read(arch: str) -> None:
    model = tiny_model(arch)
    structure = describe(model)
    decisions = {site.name: decide_mofq(site_view(model, structure, site), "w4a16-g16") for site in structure.sites}
    policy = Policy.uniform(decisions)
    assert all(refuses(site, decisions[site.name]) is None for site in structure.sites)
    assert parse(render(PolicyFile(policy), structure), structure).policy == policy
