"""Rotations around single weights: exact inverses, Hessians that turn along, activations rounded where they are rotated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.apply import Installer
from methods.catalogue import METHODS, apply, plan, refuses
from methods.formats.format import parse_format
from methods.formats.numerics import decode, payload_bits, quantize_activation
from methods.formats.turns import inputs_back, is_turned, turned, turned_back, turned_inputs
from methods.hadamard import hadamard
from methods.method import Edit, SiteView, Stats
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision
from methods.quant.incoherence import Rotation, by_rms, kronecker_turn, rescaling
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.task import Task
from methods.recipes.rotation import factors

D_OUT, D_IN = 30, 96
SITE = Site("down", "down", 0, (LayerSpec("down", "down", 0, D_IN, D_OUT),))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight() -> torch.Tensor:
    """A few inputs and outputs stand out, which is what incoherence takes away."""
    w = random(D_OUT, D_IN, seed=0)
    w[:, 5] *= 8
    w[4] *= 6
    return w


def inputs(n: int = 600, seed: int = 1) -> torch.Tensor:
    x = random(n, 20, seed=seed) @ random(20, D_IN, seed=2) + 0.5 * random(n, D_IN, seed=seed + 10)
    x[:, 17] *= 20
    return x


def statistics(x: torch.Tensor) -> Stats:
    return Stats(
        len(x),
        hessian=x.T @ x / len(x),
        drift=0.1 * x.T @ x / len(x),
        sample=x[:50],
        first=x[::60],
        first_drift=0.1 * x[::60],
        abs_max=x.abs().amax(0),
        fisher=weight() ** 2,
    )


def output_error(dense: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    wanted = x @ w.T
    return float((x @ dense.T - wanted).square().sum() / wanted.square().sum())


TURNS = {
    "kronecker": kronecker_turn(D_OUT, D_IN, 0),
    "rescaled": kronecker_turn(D_OUT, D_IN, 1) | {"turn.ratio": rescaling(weight(), statistics(inputs()).hessian)},  # type: ignore[arg-type]
    "block": {"turn.block": torch.tensor([16], dtype=torch.int32)},
    "ratio": {"turn.ratio": torch.linspace(0.5, 2, D_IN).bfloat16()},
}


@pytest.mark.parametrize("name", TURNS)
def test_a_turn_is_undone_and_keeps_the_layers_outputs(name: str) -> None:
    parts, w, x = TURNS[name], weight(), inputs(40)
    assert is_turned(parts)
    assert (turned_back(turned(w, parts), parts) - w).abs().max() < 1e-5
    assert (inputs_back(turned_inputs(x, parts), parts) - x).abs().max() < 1e-4
    # Outputs turned by U: their length is that of the outputs before.
    outputs = turned_inputs(x, parts) @ turned(w, parts).T
    assert torch.allclose(outputs.norm(dim=1), (x.double() @ w.double().T).norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("name", TURNS)
def test_statistics_turn_with_the_inputs(name: str) -> None:
    x, turn = inputs(), Rotation(TURNS[name])
    moved, y = turn.stats(statistics(x)), turned_inputs(x, TURNS[name]).float()
    hessian = y.T @ y / len(y)
    assert moved.hessian is not None and moved.drift is not None and moved.sample is not None
    assert torch.allclose(moved.hessian, hessian, rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))
    assert torch.allclose(moved.drift, 0.1 * hessian, rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))
    assert torch.allclose(moved.sample, y[:50], rtol=1e-4, atol=1e-4)
    assert moved.first is not None and moved.first_drift is not None
    assert torch.allclose(moved.first, y[::60], rtol=1e-4, atol=1e-4)
    assert torch.allclose(moved.first_drift, 0.1 * y[::60], rtol=1e-4, atol=1e-4)
    assert moved.abs_max is None and moved.fisher is None and moved.n_tokens == len(x)


def test_the_kronecker_turn_is_the_product_with_the_whole_matrices() -> None:
    parts, w = TURNS["kronecker"], weight()
    u = torch.kron(parts["turn.left_a"].double(), parts["turn.left_b"].double())
    v = torch.kron(parts["turn.right_a"].double(), parts["turn.right_b"].double())
    assert (u @ u.T - torch.eye(D_OUT)).abs().max() < 1e-6 and parts["turn.left_b"].shape == (6, 6)
    assert (turned(w, parts) - u @ w.double() @ v.T).abs().max() < 1e-9
    assert (turned_inputs(w, parts) - w.double() @ v.T).abs().max() < 1e-9


def test_the_block_turn_is_the_product_with_hadamard_blocks() -> None:
    v = torch.block_diag(*[hadamard(16)] * 6)
    assert (turned(weight(), TURNS["block"]) - weight().double() @ v.T).abs().max() < 1e-9


@pytest.mark.parametrize(("n", "expected"), [(576, (24, 24)), (1536, (32, 48)), (13, (1, 13)), (11008, (86, 128)), (1, (1, 1))])
def test_factors_are_near_the_square_root(n: int, expected: tuple[int, int]) -> None:
    assert factors(n) == expected


def test_seeds_and_sides_are_rotations_of_their_own() -> None:
    one, other = kronecker_turn(36, 36, 0), kronecker_turn(36, 36, 1)
    assert not torch.equal(one["turn.left_a"], one["turn.right_a"]) and not torch.equal(
        one["turn.left_a"], other["turn.left_a"]
    )
    assert torch.equal(one["turn.right_a"], kronecker_turn(24, 36, 0)["turn.right_a"])


def test_rescaling_follows_its_equation_and_leaves_dead_inputs() -> None:
    w, hessian = weight(), statistics(inputs()).hessian
    assert hessian is not None
    s = rescaling(w, hessian).double()
    wanted = (hessian.diagonal().double() / w.double().square().sum(0)) ** 0.25
    ratio = s / wanted
    assert float(ratio.max() / ratio.min()) < 1.02
    hessian[3] = hessian[:, 3] = 0
    w[:, 8] = 0
    dead = rescaling(w, hessian)
    assert dead[3] == 1 and dead[8] == 1 and torch.isfinite(dead).all()


@pytest.mark.parametrize("fmt", ["w2a16-asym", "w3a16-g48", "w4a16-g32-asym"])
def test_the_rms_grid_is_one_range_for_the_whole_weight(fmt: str) -> None:
    site = SiteView(SITE, {"down": weight()})
    grid = by_rms(Task("down", site, weight(), Stats(0), parse_format(fmt), {}))
    assert grid.scale.shape == (D_OUT, parse_format(fmt).groups(D_IN)) and grid.scale.unique().numel() == 1
    reach = 2.4 * float(weight().square().mean().sqrt())
    levels = parse_format(fmt).levels
    assert abs(float(grid.scale[0, 0])) == pytest.approx(
        2 * reach / (levels - (0 if parse_format(fmt).symmetric else 1)), rel=0.02
    )


def test_quip_beats_ldlq_on_the_same_grid_at_two_bits_where_the_weight_has_outliers() -> None:
    """Both on held-out inputs and with one range for the whole weight; the rotation is all that differs."""
    x, held, w = inputs(), inputs(300, seed=4), weight()
    site, stats = SiteView(SITE, {"down": w}), {"down": statistics(x)}
    errors = {}
    for rotate in (True, False):
        edit = apply(site, stats, Decision.of("quip", format="w2a16-asym", rotate=rotate))
        errors[rotate] = output_error(edit.linears["down"].dense, held, w)
    assert errors[True] < 0.7 * errors[False]


def test_a_hessian_that_is_not_turned_would_be_worse() -> None:
    x, held, w = inputs(), inputs(300, seed=4), weight()
    site, stats = SiteView(SITE, {"down": w}), statistics(x)
    right = apply(site, {"down": stats}, Decision.of("quip", format="w2a16-asym"))
    undone = Rotation({f"turn.right_{f}": TURNS["kronecker"][f"turn.right_{f}"].T for f in "ab"})
    # Turned by V^T first, the transform's V gives back the Hessian of the inputs as they were: the mistake to be seen.
    wrong_stats = replace(stats, hessian=undone.stats(stats).hessian)
    wrong = apply(site, {"down": wrong_stats}, Decision.of("quip", format="w2a16-asym"))
    assert output_error(right.linears["down"].dense, held, w) < 0.5 * output_error(wrong.linears["down"].dense, held, w)


@pytest.mark.parametrize("name", ["quip", "block-hadamard"])
def test_identity_settings_store_no_turn(name: str) -> None:
    knobs = {"rotate": False} if name == "quip" else {"block": 1}
    site, stats = SiteView(SITE, {"down": weight()}), {"down": statistics(inputs())}
    plain = apply(site, stats, Decision.of(name, format="w4a16-g48", **knobs)).linears["down"]
    assert not is_turned(plain.payload)
    assert is_turned(apply(site, stats, Decision.of(name, format="w4a16-g48")).linears["down"].payload)
    assert plan(SITE, Decision.of(name, format="w4a16-g48", **knobs)).cost.bits_per_weight * weight().numel() == payload_bits(
        plain.format, plain.payload
    )


@pytest.mark.parametrize(("name", "knobs"), [("quip", {"rescale": True}), ("quip", {}), ("block-hadamard", {})])
def test_bits_are_those_of_the_payload(name: str, knobs: dict[str, bool]) -> None:
    site, stats = SiteView(SITE, {"down": weight()}), {"down": statistics(inputs())}
    decision = Decision.of(name, format="w4a16-g48", **knobs)
    compressed = apply(site, stats, decision).linears["down"]
    planned = plan(SITE, decision)
    assert planned.cost.bits_per_weight * weight().numel() == pytest.approx(payload_bits(compressed.format, compressed.payload))
    assert planned.simulated and METHODS[name].simulated


def test_inputs_are_rounded_where_they_are_rotated() -> None:
    """The model with the edit computes what the online rotation would: Q(x H^T) W'^T with W' the turned, rounded weight."""
    w, x = weight(), inputs(50)
    edit = apply(SiteView(SITE, {"down": w}), {}, Decision.of("block-hadamard", format="w8a8-token"))
    compressed = edit.linears["down"]
    grid_only = {part: tensor for part, tensor in compressed.payload.items() if "." not in part}
    turned_weight = type(compressed).of(compressed.format, grid_only).dense
    wanted = quantize_activation(turned_inputs(x, compressed.payload).float(), compressed.format) @ turned_weight.T
    model = nn.ModuleDict({"down": nn.Linear(D_IN, D_OUT, bias=False)}).requires_grad_(False)
    model["down"].weight.data = w

    class OneSite:
        def site(self, name: str) -> Site:
            return SITE

    with Installer(model, OneSite()) as installer:  # type: ignore[arg-type]
        installer.install("down", Edit({"down": compressed}))
        found = model["down"](x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    unturned = apply(SiteView(SITE, {"down": w}), {}, Decision.of("rtn", format="w8a8-token")).linears["down"]
    plainly = quantize_activation(x, unturned.format) @ unturned.dense.T
    exact = x @ w.T
    # One input is 20 times the others: it sets the scale of every token until it is spread.
    assert (found - exact).square().sum() < 0.5 * (plainly - exact).square().sum()


@pytest.mark.parametrize("name", ["nvfp4a4", "mxfp4a4"])
def test_block_hadamard_rounds_blocks_of_fp4_where_they_are_rotated(name: str) -> None:
    """Weights and inputs, each group with a scale of its own in the rotated basis, by the products with the matrix written out."""
    w, x, fmt = weight(), inputs(50), parse_format(name)
    decision = Decision.of("block-hadamard", format=name)
    assert refuses(SITE, decision) is None
    compressed = apply(SiteView(SITE, {"down": w}), {}, decision).linears["down"]
    v = torch.block_diag(*[hadamard(32)] * 3)
    turned_weight = (w.double() @ v.T).float()
    grid = nearest(turned_weight, fmt, minmax(turned_weight, fmt))
    # Sums in another order may tip a tie of a weight, or the power of two of a block's scale.
    assert (compressed.payload["codes"] == grid["codes"]).float().mean() > 0.99
    outputs = quantize_activation((x.double() @ v.T).float(), fmt) @ decode(fmt, grid).T
    found = quantize_activation(x, fmt, compressed.payload) @ compressed.dense.T
    assert float((found - outputs).square().sum() / outputs.square().sum()) < 1e-3


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        (Decision.of("block-hadamard", format="w4a16-g48", block=64), "use one up to 32"),
        (Decision.of("block-hadamard", format="w4a16-g48", block=12), "no power of two"),
        (Decision.of("quip", format="w8a16"), "use fitter=minmax or fitter=mse"),
        (Decision.of("block-hadamard", format="bf16"), "block-hadamard"),
    ],
)
def test_refusals(decision: Decision, reason: str) -> None:
    assert reason in str(refuses(SITE, decision))
    assert refuses(SITE, Decision.of("quip", format="w8a16", fitter="mse")) is None
