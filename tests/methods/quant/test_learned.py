"""Learned rounding: limits, what is stored against what was trained, bounds, and held-out error; alone and as a block."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from methods import catalogue
from methods.apply import Installer, site_view
from methods.calibrate import sweep
from methods.formats.format import parse_format
from methods.formats.numerics import decode
from methods.learn import Learned
from methods.method import Need, NormView, SiteView, Stats
from methods.model.describe import describe
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision
from methods.quant import learned as machinery
from methods.quant.grid import payload
from methods.quant.learned import LearnedSite, codes, values
from methods.quant.minmax import minmax
from methods.quant.parts import LEARNERS
from methods.quant.task import Task
from methods.recipes.learned import ADAROUND, ADAROUND_BLOCK, FLEXROUND, OMNIQUANT, SIGNROUND, ZEROQUANT_LKD
from tests.methods.quant.fake_block import block_of
from tests.tiny import tiny_model, tiny_tokens

RECIPES = [ADAROUND, ADAROUND_BLOCK, FLEXROUND, SIGNROUND, OMNIQUANT, ZEROQUANT_LKD]
D_IN = 96
LAYERS = (LayerSpec("q", "q", 0, D_IN, 21), LayerSpec("k", "k", 0, D_IN, 10))
SITE = Site("q+k", "q", 0, LAYERS, norm="norm")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(n: int, seed: int) -> torch.Tensor:
    """Correlated rows, a few channels much larger than the rest."""
    size = 0.2 + _random(D_IN, seed=90).square()
    return (_random(n, 30, seed=seed) @ _random(30, D_IN, seed=91) + 0.5 * _random(n, D_IN, seed=seed + 1)) * size


def _heavy(d_out: int, seed: int) -> torch.Tensor:
    """Weights with heavy tails."""
    x = _random(d_out, D_IN, seed=seed)
    return 0.03 * x * x.abs()


WEIGHTS = {"q": _heavy(21, 1), "k": _heavy(10, 2)}
NORM = NormView("norm", (1 + 0.2 * _random(D_IN, seed=3)).bfloat16(), None, 0.0)
VIEW = SiteView(SITE, WEIGHTS, NORM)
X, HELD = _inputs(800, 10), _inputs(400, 20)


def _stats(**replaced: object) -> dict[str, Stats]:
    own = {"hessian": X.T @ X / len(X), "abs_max": X.abs().amax(0), "first": X[::100], "block": block_of(WEIGHTS, X, NORM)}
    shared = Stats(len(X), **{**own, **replaced})
    return {"q": shared, "k": shared}


def _error(edit, x: torch.Tensor = HELD) -> float:
    """Relative squared error of the site's outputs, the fold taken into account."""
    ratio = NORM.weight.float() / edit.tensors.get("norm.weight", NORM.weight).float()
    wanted = torch.cat([x @ w.T for w in WEIGHTS.values()], 1)
    got = torch.cat([(x / ratio) @ edit.linears[name].dense.T for name in WEIGHTS], 1)
    return float((got - wanted).square().sum() / wanted.square().sum())


def _learned_site(recipe, fmt: str) -> LearnedSite:
    learner, stats = LEARNERS[recipe.learner], _stats()
    knobs = recipe.resolve({"format": fmt})
    tasks = {name: Task(name, VIEW, w, stats[name], parse_format(fmt), knobs) for name, w in WEIGHTS.items()}
    trainables = {name: learner.trainable(task, minmax(task.weight, task.fmt)) for name, task in tasks.items()}
    return LearnedSite(VIEW, tasks, trainables, {}, learner.scale and learner.scale(VIEW, stats, knobs))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Learned]:
    """What the training loop returned, call by call."""
    calls: list[Learned] = []
    original = machinery.learn

    def recorded(*args, **options):
        calls.append(original(*args, **options))
        return calls[-1]

    monkeypatch.setattr(machinery, "learn", recorded)
    return calls


@pytest.mark.parametrize("fmt", ["w4a16-g48", "w2a16-g16-asym", "w3a8-g48-asym", "w8a16", "w8a8-token"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_steps_are_rounding_to_nearest(recipe, fmt):
    off = {"transform": False, "clip_init": 100.0} if recipe is OMNIQUANT else {}
    edit = catalogue.apply(VIEW, _stats(), Decision.of(recipe.name, format=fmt, steps=0, **off))
    expected = catalogue.apply(VIEW, {}, Decision.of("rtn", format=fmt))
    for name in WEIGHTS:
        assert torch.equal(edit.linears[name].dense, expected.linears[name].dense)
        assert edit.linears[name].payload.keys() == expected.linears[name].payload.keys()


@pytest.mark.parametrize("fmt", ["w4a16-g48", "w2a16-g16-asym", "w8a16", "w3a8-g48-asym"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_is_stored_is_what_was_trained(recipe, fmt):
    site = _learned_site(recipe, fmt)
    moved = {
        name: value + 0.3 * _random(*value.shape, seed=index) for index, (name, value) in enumerate(site.initial().items())
    }
    edit, trained = site.edit(moved), site.weights(moved, rounded=True)
    for name, compressed in edit.linears.items():
        assert torch.equal(compressed.dense, trained[name])
        assert torch.equal(
            compressed.payload["codes"].unique(), compressed.payload["codes"].unique().clamp(*parse_format(fmt).code_range)
        )
    for name, tensor in site.folded(moved)[1].items():
        assert torch.equal(edit.tensors[name].float(), tensor)
    ratio = site.folded(moved)[0]
    if ratio is not None:
        assert torch.equal(ratio, NORM.weight.float() / edit.tensors["norm.weight"].float())
    start = site.weights(site.initial(), rounded=True)
    assert any(not torch.equal(start[name], trained[name]) for name in WEIGHTS)


@pytest.mark.parametrize("fmt", ["w4a16-g48", "w3a16-g16-asym"])
def test_values_are_those_of_decode_and_gradients_go_straight_through(fmt):
    site = _learned_site(SIGNROUND, fmt)
    place = site.places({**site.initial(), "q/offset": 4.0 * _random(*site.initial()["q/offset"].shape, seed=4)})["q"]
    form = parse_format(fmt)
    decoded = decode(form, payload(codes(place, form), place.grid))
    assert torch.equal(values(place, form, rounded=True), decoded)
    soft = values(place, form, rounded=False)
    step = place.grid.scale.float().abs().repeat_interleave(form.group_size(D_IN), 1)
    assert ((soft - decoded).abs() <= 0.5001 * step).all() and not torch.equal(soft, decoded)
    leaf = place.position.clone().requires_grad_()
    values(replace(place, position=leaf), form, rounded=True).sum().backward()
    shift = form.levels // 2 if form.symmetric else 0
    lowest, highest = (code - shift for code in form.code_range)
    rounded = place.position.round()
    passed = (rounded >= lowest) & (rounded <= highest)
    assert torch.equal(leaf.grad, torch.where(passed, place.grid.scale.float()[..., None].expand_as(leaf), torch.zeros(())))
    assert passed.any() and not passed.all()


@pytest.mark.parametrize(("fmt", "steps"), [("w4a16-g48", 60), ("w2a16-g48-asym", 60), ("w3a8-g48-asym", 60)])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_beats_rounding_to_nearest_on_other_inputs(recipe, fmt, steps, kept):
    decision = Decision.of(recipe.name, format=fmt, steps=steps)
    stats = _stats()
    before = {name: weight.clone() for name, weight in WEIGHTS.items()}
    edit, rtn = catalogue.apply(VIEW, stats, decision), catalogue.apply(VIEW, {}, Decision.of("rtn", format=fmt))
    assert _error(edit) < 0.97 * _error(rtn)
    for call in kept:
        losses = dict(call.evaluations)
        assert losses[call.step] == min(losses.values()) < losses[0] and losses[0] == pytest.approx(1.0)
    assert all(torch.equal(before[name], weight) for name, weight in WEIGHTS.items())


def test_seeds_and_only_seeds_change_the_result():
    edits = [catalogue.apply(VIEW, _stats(), Decision.of("flexround", format="w3a16-g48", steps=20, seed=s)) for s in (1, 1, 2)]
    dense = [edit.linears["q"].dense for edit in edits]
    assert torch.equal(dense[0], dense[1]) and not torch.equal(dense[0], dense[2])


def test_adaround_rounds_down_or_up(kept):
    edit = catalogue.apply(VIEW, _stats(), Decision.of("adaround", format="w3a16-g48-asym", steps=200))
    rtn = catalogue.apply(VIEW, {}, Decision.of("rtn", format="w3a16-g48-asym"))
    for name, weight in WEIGHTS.items():
        scale, offset = (edit.linears[name].payload[part].float().repeat_interleave(48, 1) for part in ("scale", "offset"))
        up = edit.linears[name].payload["codes"].float() - ((weight - offset) / scale).floor()
        assert ((up == 0) | (up == 1) | ((weight - offset) / scale > 7)).all()
        moved = edit.linears[name].payload["codes"] != rtn.linears[name].payload["codes"]
        assert 0.01 < moved.float().mean() < 0.5
    assert len(kept) == 2


def test_adaround_comes_close_to_the_best_rounding():
    """Of all 2^8 choices of down and up in each of 10 rows."""
    d_in = 16
    x = _random(200, 5, seed=5) @ _random(5, d_in, seed=6) + 0.1 * _random(200, d_in, seed=7)
    weight = _random(10, d_in, seed=8)
    weight[:, 8:] = 0.0
    site = Site("o", "o", 0, (LayerSpec("o", "o", 0, d_in, 10),))
    stats = {"o": Stats(10**6, hessian=x.T @ x / 200, first=x[:0])}
    view = SiteView(site, {"o": weight})
    rtn, edit = (
        catalogue.apply(view, stats, Decision.of(name, format="w2a16-asym")).linears["o"] for name in ("rtn", "adaround")
    )
    scale, offset = rtn.payload["scale"].float(), rtn.payload["offset"].float()
    down = ((weight - offset) / scale).floor()
    choices = torch.tensor(list(product([0.0, 1.0], repeat=8)))
    choices = torch.cat([choices, torch.zeros(256, 8)], 1)

    def loss(dense):
        error = dense - weight
        return (error @ stats["o"].hessian * error).sum(-1)

    zeros = ((0 - offset) / scale).round()
    least = torch.full((10,), torch.inf)
    for choice in choices:
        picked = torch.where(torch.arange(d_in) < 8, down + choice, zeros).clamp(0, 3) * scale + offset
        least = torch.minimum(least, loss(picked))
    ours, nearest = loss(edit.dense).sum(), loss(rtn.dense).sum()
    assert ours < 0.5 * nearest and ours < 3 * least.sum()


def test_the_penalty_is_zero_at_codes_alone():
    trainable = _learned_site(ADAROUND, "w4a16-g48").trainables["q"]
    at = trainable.place(trainable.initial(), WEIGHTS["q"]).position
    for end, code in ((-9.0, at.floor()), (9.0, at.floor() + 1)):
        ends = torch.full_like(at, end)
        assert torch.allclose(trainable.place({"logit": ends}, WEIGHTS["q"]).position, code, atol=1e-5)
    logit = trainable.initial()["logit"]
    assert trainable.penalty({"logit": logit}, 0.1) is None
    ends = torch.where(logit > 0, 3.0, -3.0)
    assert trainable.penalty({"logit": ends}, 0.5) == 0
    assert trainable.penalty({"logit": torch.zeros_like(logit)}, 0.5) == 100
    early, late = (trainable.penalty({"logit": logit}, done) for done in (0.3, 0.99))
    assert 0 < late < early < 100


def test_flexround_moves_large_weights_furthest(kept):
    fmt = "w2a16-g48-asym"
    edit = catalogue.apply(VIEW, _stats(), Decision.of("flexround", format=fmt, steps=100, rate=0.03))
    rtn = catalogue.apply(VIEW, {}, Decision.of("rtn", format=fmt))
    moved = (edit.linears["q"].payload["codes"].int() - rtn.linears["q"].payload["codes"].int()).abs()
    assert (moved >= 2).any()
    assert not torch.equal(edit.linears["q"].payload["scale"], rtn.linears["q"].payload["scale"])
    site = _learned_site(FLEXROUND, fmt)
    leaves = {name: value.clone().requires_grad_() for name, value in site.initial().items()}
    site.places(leaves)["q"].position.sum().backward()
    scale = site.places(site.initial())["q"].grid.scale.float()[..., None]
    assert torch.allclose(leaves["q/weight"].grad, -WEIGHTS["q"].view_as(leaves["q/weight"]) / scale, rtol=1e-4)


def test_signround_keeps_its_bounds(kept):
    catalogue.apply(VIEW, _stats(), Decision.of("signround", format="w2a16-g48-asym", steps=40, rate=0.1))
    found = kept[0].parameters
    for name, value in found.items():
        low, high = (-0.5, 0.5) if name.endswith("offset") else (0.0, 1.0)
        assert value.min() >= low and value.max() <= high
    assert found["q/offset"].abs().max() == 0.5 and found["q/low"].min() < 1 and found["q/high"].min() < 1


def test_omniquant_folds_what_it_learned(kept):
    decision = Decision.of("omniquant", format="w4a16-g48", steps=40)
    edit = catalogue.apply(VIEW, _stats(), decision)
    start = LEARNERS["omniquant"].scale(VIEW, _stats(), {"transform": True})
    scale = kept[0].parameters["q+k/scale"].exp()
    assert not torch.allclose(scale, start, rtol=1e-2)
    ratio = NORM.weight.float() / edit.tensors["norm.weight"].float()
    assert edit.tensors["norm.weight"].dtype == torch.bfloat16 and torch.allclose(ratio, scale, rtol=2**-7)
    for name, weight in WEIGHTS.items():
        step = edit.linears[name].payload["scale"].float().abs().repeat_interleave(48, 1)
        assert ((edit.linears[name].dense - weight * ratio).abs() / step).median() < 0.5
    plain = catalogue.apply(VIEW, _stats(), Decision.of("omniquant", format="w4a16-g48", steps=40, transform=False))
    assert not plain.tensors


def test_omniquant_clips_alone_where_there_is_no_norm():
    bare = SiteView(Site("q+k", "q", 0, LAYERS), WEIGHTS)
    block = block_of(WEIGHTS, X)
    stats = {name: Stats(len(X), abs_max=X.abs().amax(0), block=block) for name in WEIGHTS}
    edit = catalogue.apply(bare, stats, Decision.of("omniquant", format="w4a16-g48", steps=0))
    assert not edit.tensors
    widest = WEIGHTS["q"].view(21, 2, 48).abs().amax(-1) / 8
    scale = edit.linears["q"].payload["scale"].float().abs()
    assert torch.allclose(scale, torch.sigmoid(torch.tensor(4.0)) * widest, rtol=2**-7)
    eight = catalogue.apply(bare, stats, Decision.of("omniquant", format="w8a16-g48", steps=0)).linears["q"]
    ends = WEIGHTS["q"].view(21, 2, 48).abs().amax(-1) - eight.dense.view(21, 2, 48).abs().amax(-1)
    assert (ends.abs() <= 0.8 * eight.payload["scale"].float()).all()  # half a step, and what the scale loses in bf16


def test_a_block_is_run_with_the_formats_inputs():
    block, seen = block_of(WEIGHTS, X), []
    spy = replace(
        block, run=lambda h, weights, formats: seen.append((set(weights), dict(formats))) or block.run(h, weights, formats)
    )
    catalogue.apply(VIEW, _stats(block=spy), Decision.of("signround", format="w4a8-g48", steps=1))
    assert seen and all(call == ({"q", "k"}, dict.fromkeys("qk", parse_format("w4a8-g48"))) for call in seen)


def test_statistics_that_lack_are_named():
    with pytest.raises(ValueError, match="statistics of q lack block"):
        catalogue.apply(VIEW, _stats(block=None), Decision.of("signround", format="w4a16-g48"))


def _tiny(arch: str, needs=frozenset(Need) - {Need.DRIFT, Need.FISHER}):
    """A tiny model with the statistics of its second block, and held-out hidden states there."""
    model = tiny_model(arch)
    structure = describe(model)
    found: dict[str, Stats] = {}
    wanted = {site.name: needs for site in structure.in_block(1)}
    for seed in (50, 0):
        batches = [tiny_tokens(8, 24, seed=seed + index) for index in range(4)]
        held = next(iter(found.values())).block if found else None
        sweep(model, structure, batches, wanted, lambda _block, stats: found.update(stats))
    assert held is not None
    return model, structure, found, held


def _block_error(held, edits) -> float:
    weights = {name: c.dense for edit in edits.values() for name, c in edit.linears.items()}
    weights |= {name: tensor.float() for edit in edits.values() for name, tensor in edit.tensors.items()}
    formats = {name: c.format for edit in edits.values() for name, c in edit.linears.items()}
    pairs = zip(held.inputs, held.targets, strict=True)
    return float(torch.stack([(held.run(h, weights, formats) - t).square().mean() for h, t in pairs]).mean())


@pytest.mark.parametrize(("arch", "method"), [("llama", "signround"), ("gpt2", "flexround"), ("llama", "omniquant")])
def test_a_block_is_learned_as_one(arch, method):
    model, structure, stats, held = _tiny(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    views = [site_view(model, structure, site) for site in structure.in_block(1)]
    decisions = {view.site.name: Decision.of(method, format="w3a16-g16", steps=16, batch=1) for view in views}
    together = catalogue.apply_block(views, stats, decisions, {})
    again = catalogue.apply_block(views, stats, decisions, {})
    alone = catalogue.apply(views[0], stats, decisions[views[0].site.name])
    rtn = {view.site.name: catalogue.apply(view, {}, Decision.of("rtn", format="w3a16-g16")) for view in views}
    assert list(together) == [view.site.name for view in views]
    for name, edit in together.items():
        for layer, compressed in edit.linears.items():
            assert torch.equal(compressed.dense, again[name].linears[layer].dense)
            assert torch.equal(decode(compressed.format, compressed.payload), compressed.dense)
    first = together[views[0].site.name]
    assert any(not torch.equal(first.linears[layer].dense, c.dense) for layer, c in alone.linears.items())
    assert _block_error(held, together) < 0.97 * _block_error(held, rtn)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with Installer(model, structure) as installer:
        for name, edit in together.items():
            installer.install(name, edit)


def test_a_site_is_learned_beside_the_others_as_they_were_made():
    model, structure, stats, held = _tiny("llama")
    views = [site_view(model, structure, site) for site in structure.in_block(1)]
    first, second, third, last = (view.site.name for view in views)
    rough, learned = Decision.of("rtn", format="w2a16-g16"), Decision.of("zeroquant-lkd", format="w3a16-g16", steps=20)
    made = {first: catalogue.apply(views[0], {}, rough)}
    decisions = {second: rough, third: learned, last: Decision.of("gptq", format="w3a16-g16")}
    edits = catalogue.apply_block(views[1:], stats, decisions, made)
    assert edits.keys() == {second, third, last}
    for view in (views[1], views[3]):
        own = catalogue.apply(view, stats, decisions[view.site.name])
        assert all(torch.equal(own.linears[name].dense, c.dense) for name, c in edits[view.site.name].linears.items())
    whole = {**made, **edits}
    alone = catalogue.apply(views[2], stats, learned)
    sample = next(iter(stats.values())).block
    assert _block_error(sample, whole) < _block_error(sample, {**whole, third: alone})
    assert _block_error(held, whole) < _block_error(
        held, {**whole, third: catalogue.apply(views[2], {}, Decision.of("rtn", format="w3a16-g16"))}
    )


def test_different_knobs_are_learned_one_after_the_other(kept):
    model, structure, stats, _ = _tiny("llama")
    views = [site_view(model, structure, site) for site in structure.in_block(1)]
    formats = ["w4a16-g16", "w4a16-g16", "w3a16-g16-asym", "w4a8-token-g16"]
    decisions = {
        view.site.name: Decision.of("signround", format=fmt, steps=5 if index < 3 else 6)
        for index, (view, fmt) in enumerate(zip(views, formats, strict=True))
    }
    edits = catalogue.apply_block(views, stats, decisions, {})
    assert [len(call.losses) for call in kept] == [5, 6]
    layers = [{name.split("/")[0] for name in call.parameters} for call in kept]
    assert layers == [{n for v in views[:3] for n in v.weights}, set(views[3].weights)]
    assert [next(iter(edits[v.site.name].linears.values())).format.name for v in views] == formats
