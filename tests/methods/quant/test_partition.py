"""What leaves the grid: chosen as the slow definition says, left out of every fit, and better than chance."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from methods.catalogue import apply, plan
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed, decode, linear, payload_bits, quantize_activation
from methods.formats.sides import pairs
from methods.kmeans import kmeans, lloyd
from methods.method import SiteView, Stats
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision
from methods.quant.columns import loud_columns
from methods.quant.feedback import column_rounder, feedback
from methods.quant.gobo import gobo, unlikely
from methods.quant.grid import Grid, grouped, range_grid, safe_scale
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest
from methods.quant.olive import SEARCH, olive, pair_codes
from methods.quant.outliers import at_most, cast, filled, largest
from methods.quant.owq import sensitive_columns
from methods.quant.parts import FITTERS
from methods.quant.spqr import by_leave_one_out, by_outliers, gains
from methods.quant.squeezellm import fisher_grid, sensitive_or_large
from methods.quant.task import Task

D_OUT, D_IN = 20, 96
SITE = Site("down", "down", 0, (LayerSpec("down", "down", 0, D_IN, D_OUT),))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int = 700, seed: int = 3) -> torch.Tensor:
    """Correlated inputs, a few of them loud."""
    x = random(n, 30, seed=seed) @ random(30, D_IN, seed=1) * 0.2 + 0.3 * random(n, D_IN, seed=seed + 100)
    x[:, 7] *= 30
    x[:, 50] *= 12
    return x


WEIGHT = random(D_OUT, D_IN, seed=0) * 0.05
FISHER = random(D_OUT, D_IN, seed=10).pow(4)


def compressed(method: str, fmt: str, weight: torch.Tensor = WEIGHT, **knobs: bool | int | float | str) -> Compressed:
    x = inputs()
    stats = Stats(len(x), hessian=x.T @ x / len(x), abs_max=x.abs().amax(0), fisher=FISHER, first=x[:0])
    return apply(SiteView(SITE, {"down": weight}), {"down": stats}, Decision.of(method, format=fmt, **knobs)).linears["down"]


def output_error(dense: torch.Tensor, seed: int = 3, weight: torch.Tensor = WEIGHT) -> float:
    x = inputs(seed=seed).double()
    return float((x @ (dense - weight).double().T).square().sum() / (x @ weight.double().T).square().sum())


def test_how_many_a_share_is() -> None:
    assert [at_most(share, 100) for share in (0.0, 0.009, 0.29, 1.0)] == [0, 0, 29, 100]
    score = random(4, 9, seed=5)
    for n in (0, 1, 7, 36):
        mask = largest(score, n)
        assert int(mask.sum()) == n and (n in (0, 36) or score[mask].min() > score[~mask].max())


@pytest.mark.parametrize("fmt", ["w4a16-g16", "w3a16-g48-asym", "w4a16-asym"])
def test_fitters_see_the_range_of_what_is_not_kept(fmt: str) -> None:
    weight, kept = WEIGHT + 0.2 * (random(D_OUT, 1, seed=6) > 0), random(D_OUT, D_IN, seed=7) > 0.8
    kept[3] = True
    form = parse_format(fmt)
    seen = grouped(filled(weight, kept, form), form)
    groups, mask = grouped(weight, form), grouped(kept, form).bool()
    for row in range(D_OUT):
        for group in range(groups.shape[1]):
            others = groups[row, group][~mask[row, group]]
            low, high = (others.min(), others.max()) if len(others) else (0.0, 0.0)
            assert seen[row, group].min() == low and seen[row, group].max() == high
            assert torch.equal(seen[row, group][~mask[row, group]], others)


@pytest.mark.parametrize(("fitter", "fmt"), [("minmax", "w3a16-g48"), ("mse", "w3a16-g48"), ("mse", "w2a16-g16-asym")])
def test_what_is_kept_has_no_say_in_the_grid(fitter: str, fmt: str) -> None:
    kept = random(D_OUT, D_IN, seed=7) > 1.0
    site = SiteView(SITE, {"down": WEIGHT})
    task = Task("down", site, WEIGHT, Stats(0), parse_format(fmt), {}, kept)
    grid, further = FITTERS[fitter](task), FITTERS[fitter](replace(task, weight=WEIGHT + 5.0 * kept))
    assert torch.equal(grid.scale, further.scale)
    careless = FITTERS[fitter](replace(task, weight=WEIGHT + 5.0 * kept, kept=None))
    assert grid.scale.abs().max() < 0.15 < 0.5 < careless.scale.abs().max()


def test_loud_columns_reach_the_threshold() -> None:
    largest_inputs = torch.tensor([1.0, 6.0, 5.9, 80.0, 0.0, 7.0])
    assert loud_columns(largest_inputs, 6.0, 1.0).tolist() == [False, True, False, True, False, True]
    assert loud_columns(largest_inputs, 6.0, 0.34).tolist() == [False, False, False, True, False, True]
    assert loud_columns(largest_inputs, 0.0, 1.0).all() and not loud_columns(largest_inputs, 81.0, 1.0).any()


def test_llm_int8_between_nothing_and_everything() -> None:
    x, fmt = inputs(), parse_format("w8a8-token")
    wanted = x @ WEIGHT.T
    errors = []
    for threshold in (1e9, 20.0, 6.0, 0.0):
        result = compressed("llm-int8", "w8a8-token", threshold=threshold, columns=1.0)
        rounded = quantize_activation(x, fmt, result.payload)
        errors.append(float((rounded @ result.dense.T - wanted).square().sum()))
    assert all(after < before for before, after in pairwise(errors))
    # Nothing is rounded at threshold 0, but for the storage of the weights in bf16.
    assert torch.equal(result.dense, WEIGHT.bfloat16().float()) and torch.equal(rounded, x)


def test_llm_int8_leaves_loud_inputs_and_their_columns_alone() -> None:
    x, fmt = inputs(), parse_format("w8a8-token")
    result = compressed("llm-int8", "w8a8-token", threshold=10.0)
    assert result.payload["columns.index"].tolist() == [7, 50]
    quiet = [column for column in range(D_IN) if column not in (7, 50)]
    plain = apply(
        SiteView(Site("down", "down", 0, (LayerSpec("down", "down", 0, 94, D_OUT),)), {"down": WEIGHT[:, quiet]}),
        {},
        Decision.of("rtn", format="w8a8-token"),
    ).linears["down"]
    expected = linear(x[:, quiet], plain.dense, fmt) + x[:, [7, 50]] @ WEIGHT[:, [7, 50]].bfloat16().float().T
    computed = quantize_activation(x, fmt, result.payload) @ result.dense.T
    assert torch.allclose(computed, expected, rtol=1e-4, atol=1e-4)


def test_sensitive_columns_by_loop() -> None:
    x, fmt = inputs(), parse_format("w3a16-g48")
    hessian, rounded = x.T @ x / len(x), cast(WEIGHT, fmt)
    cost = [float(hessian[j, j]) * sum(float(WEIGHT[i, j] - rounded[i, j]) ** 2 for i in range(D_OUT)) for j in range(D_IN)]
    chosen = sensitive_columns(WEIGHT, rounded, hessian, 0.05).nonzero()[:, 0].tolist()
    assert chosen == sorted(sorted(range(D_IN), key=lambda j: -cost[j])[:4]) and 7 in chosen


def test_owq_beats_random_columns_and_gptq() -> None:
    fmt, x = parse_format("w3a16-g48"), inputs()
    hessian = x.T @ x / len(x)
    owq = output_error(compressed("owq", fmt.name, columns=0.05).dense, seed=40)
    assert owq < 0.7 * output_error(compressed("gptq", fmt.name).dense, seed=40)
    for seed in range(3):
        chosen = torch.randperm(D_IN, generator=torch.Generator().manual_seed(seed))[:4]
        kept = torch.zeros(D_OUT, D_IN, dtype=torch.bool)
        kept[:, chosen] = True
        grid = minmax(filled(WEIGHT, kept, fmt), fmt)
        result = feedback(WEIGHT, hessian, column_rounder(fmt, grid, D_IN), 0.55, kept=kept)
        assert result.values is not None
        dense = torch.where(kept, result.values, decode(fmt, {"codes": result.codes, "scale": grid.scale}))
        assert owq < 0.8 * output_error(dense, seed=40)


def test_columns_that_are_kept_make_up_for_the_others() -> None:
    result = compressed("owq", "w3a16-g48", columns=0.05)
    index = result.payload["columns.index"].long()
    assert len(index) == 4 and not torch.equal(result.dense[:, index], WEIGHT[:, index].bfloat16().float())
    without = result.dense.clone()
    without[:, index] = WEIGHT[:, index]
    assert output_error(result.dense) < output_error(without)


@pytest.mark.parametrize("fmt", ["w3a16-g16", "w3a16-g48-asym", "w4a16"])
def test_gains_by_leaving_every_element_out(fmt: str) -> None:
    form = parse_format(fmt)
    weight, loss = WEIGHT[:5].clone(), random(D_IN, seed=8).square() + 0.1
    weight[1, 20] = -0.6
    groups, costs = grouped(weight, form), grouped(loss[None], form)[0]

    def group_loss(values: torch.Tensor, cost: torch.Tensor) -> float:
        grid = range_grid(values.min().view(1, 1), values.max().view(1, 1), form)
        whole = parse_format(f"w{form.bits}a16{'' if form.symmetric else '-asym'}")
        return float(((decode(whole, nearest(values[None], whole, grid)) - values).square() * cost).sum())

    found = grouped(gains(weight, loss, form), form)
    for row in range(5):
        for group in range(groups.shape[1]):
            values, cost = groups[row, group], costs[group]
            whole = group_loss(values, cost)
            for element in range(0, len(values), 7):
                others = torch.arange(len(values)) != element
                gain = whole - group_loss(values[others], cost[others])
                assert float(found[row, group, element]) == pytest.approx(gain, abs=1e-6)
    assert found.flatten().argmax() == 96 + 20


def test_spqr_keeps_what_was_planted_and_beats_gptq_at_more_bits() -> None:
    weight, planted = WEIGHT.clone(), [(2, 11), (5, 60), (19, 95)]
    for sign, (row, column) in zip((1, -1, 1), planted, strict=True):
        weight[row, column] = sign * 0.8
    result = compressed("spqr", "w3a16-g16-asym", weight, outliers=0.002)
    kept = (result.payload["elements.count"] > 0).nonzero()[:, 0].tolist()
    assert kept == [2, 5, 19] and result.payload["elements.column"].tolist() == [11, 60, 95]
    plain = compressed("gptq", "w3a16-g16-asym", weight)
    assert output_error(result.dense, 40, weight) < 0.8 * output_error(plain.dense, 40, weight)


def test_spqr_has_three_bit_scales_and_zero_points_by_default() -> None:
    """Bits as the paper counts them: b + (b_scale + b_zero) / 16, 64 for each 16 by 16 weights, and 32 an outlier; old formats stay."""
    x, large = inputs(), random(64, D_IN, seed=0) * 0.05
    site = Site("down", "down", 0, (LayerSpec("down", "down", 0, D_IN, 64),))
    stats = Stats(len(x), hessian=x.T @ x / len(x), first=x[:0])
    found = apply(SiteView(site, {"down": large}), {"down": stats}, Decision("spqr")).linears["down"]
    named = Decision.of("spqr", format="w3a16-g16-bi3-asym")
    assert found.format.name == "w3a16-g16-bi3-asym" == plan(site, Decision("spqr")).format.name
    assert torch.equal(found.dense, apply(SiteView(site, {"down": large}), {"down": stats}, named).linears["down"].dense)
    assert plan(site, Decision("spqr")).simulated
    outliers = int(found.payload["elements.count"].sum())
    bits = 3 + 6 / 16 + 64 / 256 + 32 * outliers / large.numel() + 16 / D_IN
    assert payload_bits(found.format, found.payload) == pytest.approx(bits * large.numel())
    assert outliers <= 0.01 * large.numel() and bits <= plan(site, Decision("spqr")).cost.bits_per_weight + 1e-9
    assert compressed("spqr", "w3a16-g16-asym").format.name == "w3a16-g16-asym"


def test_spqr_looks_for_outliers_before_scales_are_rounded() -> None:
    """Rows that share a second level do not decide on each other's outliers: the same ones as with scales of their own."""
    weight = WEIGHT.clone()
    weight[2, 11], weight[5, 60], weight[19, 95] = 0.8, -0.8, 0.8
    shared, own = (compressed("spqr", f"w3a16-g16{codec}-asym", weight, outliers=0.002) for codec in ("-bi3", ""))
    for result in (shared, own):
        assert (result.payload["elements.count"] > 0).nonzero()[:, 0].tolist() == [2, 5, 19]
        assert result.payload["elements.column"].tolist() == [11, 60, 95]
    assert output_error(shared.dense, 40, weight) < 0.8 * output_error(
        compressed("gptq", "w3a16-g16-bi3-asym", weight).dense, 40, weight
    )
    chosen = [
        by_leave_one_out(
            Task(
                "down",
                SiteView(SITE, {"down": WEIGHT}),
                WEIGHT,
                Stats(700, hessian=inputs().T @ inputs() / 700, first=inputs()[:0]),
                parse_format(name),
                {"threshold": 0.05, "outliers": 0.1, "damping": "auto"},
            )
        )
        for name in ("w3a16-g16-bi3-asym", "w3a16-g16-asym")
    ]
    assert torch.equal(*chosen) and 0 < int(chosen[0].sum()) < 0.1 * WEIGHT.numel()


@pytest.mark.parametrize(("method", "fmt"), [("owq", "w3a16-g48"), ("spqr", "w3a16-g16"), ("squeezellm", "lut3a16")])
def test_a_layer_that_no_token_reached_rounds_as_well_as_it_can(method: str, fmt: str) -> None:
    unseen = Stats(
        0,
        hessian=torch.zeros(D_IN, D_IN),
        abs_max=torch.zeros(D_IN),
        fisher=torch.zeros(D_OUT, D_IN),
        first=torch.zeros(0, D_IN),
    )
    dense = apply(SiteView(SITE, {"down": WEIGHT}), {"down": unseen}, Decision.of(method, format=fmt)).linears["down"].dense
    assert (dense - WEIGHT).square().sum() < 0.06 * WEIGHT.square().sum()


@pytest.mark.parametrize(("outliers", "spent"), [(0.1, False), (0.01, True)])
def test_spqr_takes_off_in_the_sweep_what_rounds_badly_there(outliers: float, spent: bool) -> None:
    """Against the sweep written out: every column by the inverse Hessian of those still to come, one inverse a column."""
    fmt, x, damping = parse_format("w4a16-g48"), inputs(), 0.1
    hessian = (x.T @ x / len(x)).double()
    before = torch.zeros(D_OUT, D_IN, dtype=torch.bool)
    before[3, 20] = before[11, 70] = True
    grid = minmax(filled(WEIGHT, before, fmt), fmt)
    knobs = {"threshold": 0.1, "outliers": outliers, "damping": damping, "act_order": True}
    view = SiteView(SITE, {"down": WEIGHT})
    task = Task("down", view, WEIGHT, Stats(len(x), hessian=hessian.float(), first=x[:0]), fmt, knobs, before)
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(D_IN)
    inverses = [damped[order[i:]][:, order[i:]].inverse() for i in range(D_IN)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    limit = 0.1 * float((WEIGHT.double().var(0, correction=0)[order] / pivots).mean())
    weight, kept, dense = WEIGHT.double().clone(), before.clone(), torch.zeros(D_OUT, D_IN).double()
    places = at_most(outliers, D_OUT * D_IN) - 2
    for i, column in enumerate(order.tolist()):
        rounded = decode(fmt, nearest(weight.float(), fmt, grid)).double()[:, column]
        lost = (weight[:, column] - rounded).square() / pivots[i]
        for row in lost.argsort(descending=True).tolist():
            if lost[row] > limit and not kept[row, column] and places:
                kept[row, column], places = True, places - 1
        dense[:, column] = torch.where(kept[:, column], weight[:, column].bfloat16().double(), rounded)
        error = (weight[:, column] - dense[:, column]) / pivots[i]
        weight[:, order[i:]] -= error[:, None] * inverses[i][0]
    result = by_outliers(task, grid)
    assert result.kept is not None and result.values is not None
    assert torch.equal(result.kept, kept) and int(kept.sum()) > 12 and (places == 0) == spent
    found = torch.where(kept, result.values, decode(fmt, {"codes": result.codes, "scale": grid.scale}))
    torch.testing.assert_close(found.double(), dense, rtol=1e-2, atol=1e-6)


def test_fewer_elements_exceed_a_higher_threshold() -> None:
    counts = [
        int(compressed("spqr", "w3a16-g16", threshold=threshold, outliers=0.1).payload["elements.count"].sum())
        for threshold in (0.02, 0.1, 0.2)
    ]
    assert counts[0] == at_most(0.1, WEIGHT.numel()) and counts[0] > counts[1] > counts[2] > 0


def test_kmeans_is_a_fixed_point_of_means_of_the_nearest() -> None:
    values, weights = random(4, 41, seed=20), random(4, 41, seed=21).square()
    weights[2, 5:] = 0
    weights[3] = 0
    levels = kmeans(values, weights, 5, 200)
    for row in range(4):
        own = weights[row] if row != 3 else torch.ones(41)
        nearest_level = (values[row][:, None] - levels[row]).abs().argmin(1)
        for level in range(5):
            inside = nearest_level == level
            if own[inside].sum() > 0:
                mean = (own * values[row].double())[inside].sum() / own[inside].sum().double()
                assert float(levels[row, level]) == pytest.approx(float(mean), rel=1e-6)
        assert levels[row].diff().min() >= 0
    assert float(((values[2, :5, None] - levels[2]).abs().min(1).values).max()) < 1e-6


def test_kmeans_is_close_to_the_optimum() -> None:
    """Of all contiguous partitions, which the best is one of, by dynamic programming."""
    values = random(6, 40, seed=22).sort(1).values.double()
    weights = random(6, 40, seed=23).pow(4).double()

    def cost(row: int, start: int, stop: int) -> float:
        v, w = values[row, start:stop], weights[row, start:stop]
        return float((w * (v - (w * v).sum() / w.sum()) ** 2).sum())

    best, found = 0.0, 0.0
    for row in range(6):
        least = [cost(row, 0, stop) if stop else 0.0 for stop in range(41)]
        table = [[cost(row, start, stop) if start < stop else 0.0 for stop in range(41)] for start in range(41)]
        for _ in range(3):
            least = [0.0, *(min(least[start] + table[start][stop] for start in range(stop)) for stop in range(1, 41))]
        best += least[40]
        levels = kmeans(values[row : row + 1], weights[row : row + 1], 4, 100)
        found += float((weights[row] * (values[row, :, None] - levels[0]).square().min(1).values).sum())
    assert best * (1 - 1e-9) <= found < 1.25 * best


def test_lloyd_never_raises_the_error() -> None:
    values, weights = random(1, 300, seed=24).sort(1).values.double(), torch.ones(1, 300).double()
    steps = lloyd(values, weights, torch.linspace(-0.2, 0.3, 7).double()[None])
    errors = [float((values[0, :, None] - next(steps)[0]).square().min(1).values.sum()) for _ in range(12)]
    assert all(after <= before for before, after in pairwise(errors)) and errors[-1] < 0.5 * errors[0]


def test_squeezellm_serves_what_is_sensitive() -> None:
    """Held-out sensitivities: of the same elements, measured with other noise."""
    fmt, truth = parse_format("lut3a16"), random(D_OUT, 288, seed=25).pow(4)
    weight = random(D_OUT, 288, seed=26) * 0.05
    measured, held_out = (truth * (1 + 0.5 * random(D_OUT, 288, seed=seed)).square() for seed in (27, 28))

    def error(grid: Grid) -> float:
        dense = decode(fmt, nearest(weight, fmt, grid))
        return float((held_out * (dense - weight).square()).sum())

    weighted, plain, even = (
        error(fisher_grid(weight, fisher, fmt, iterations))
        for fisher, iterations in ((measured, 50), (torch.ones_like(measured), 50), (measured, 0))
    )
    assert weighted < 0.8 * plain and weighted < 0.8 * even


def test_squeezellm_keeps_the_sensitive_and_the_large() -> None:
    mask = sensitive_or_large(WEIGHT, FISHER, 0.01, 0.02)
    sensitive, large = FISHER.flatten().argsort(descending=True)[:19], WEIGHT.abs().flatten().argsort(descending=True)[:38]
    assert sorted(set(sensitive.tolist()) | set(large.tolist())) == mask.flatten().nonzero()[:, 0].tolist()
    result = compressed("squeezellm", "lut3a16", sensitive=0.01, large=0.02)
    assert torch.equal(result.dense[mask], WEIGHT[mask].bfloat16().float())
    planned = plan(SITE, Decision.of("squeezellm", format="lut3a16", sensitive=0.01, large=0.02))
    weighs = payload_bits(result.format, result.payload)
    assert weighs <= planned.cost.bits_per_weight * WEIGHT.numel() <= weighs + 32 * 20
    seen, fmt = filled(WEIGHT, mask, parse_format("lut3a16")), parse_format("lut3a16")
    alone = fisher_grid(seen, FISHER.masked_fill(mask, 0.0), fmt, 50)
    assert torch.equal(result.payload["levels"], alone.parts["levels"])


def test_gobo_keeps_what_a_gaussian_would_not_have() -> None:
    weight = random(160, D_IN, seed=30) * 0.05
    weight[4, 5], weight[9, 90] = 0.4, -0.3
    gaussian = torch.distributions.Normal(weight.double().mean(), weight.double().std(correction=0))
    expected = gaussian.log_prob(weight.double()) < -4
    assert torch.equal(unlikely(weight, 1.0), expected) and 2 < int(expected.sum()) < 40
    assert unlikely(weight, 2 / weight.numel()).nonzero().tolist() == [[4, 5], [9, 90]]


def test_gobo_stops_when_the_absolute_error_does() -> None:
    values = random(2000, seed=31).double()

    def error(levels: torch.Tensor) -> float:
        return float((values[:, None] - levels).abs().min(1).values.sum())

    errors = [error(gobo(values, 8, iterations)) for iterations in range(25)]
    assert all(after <= before for before, after in pairwise(errors))
    last = errors.index(errors[-1])
    assert 2 < last < 24 and all(after < before for before, after in pairwise(errors[: last + 1]))
    bins = values.sort().values.view(8, 250).mean(1)
    assert torch.allclose(gobo(values, 8, 0), bins)


def test_gobo_beats_a_grid_of_the_whole_weight() -> None:
    weight = random(D_OUT, D_IN, seed=32) * 0.05
    weight[4, 5] = 0.4
    result = compressed("gobo", "lut3a16-whole", weight)
    even = compressed("rtn", "lut3a16-whole", weight)
    assert (result.dense - weight).square().sum() < 0.5 * (even.dense - weight).square().sum()
    assert result.payload["levels"].shape == (1, 1, 8)


def test_one_of_every_pair_with_an_outlier_is_zero() -> None:
    fmt = parse_format("w4a16-g48")
    weight = random(D_OUT, D_IN, seed=33).pow(3) * 0.02
    grid = olive(weight, fmt)
    codes = pair_codes(weight, fmt, grid)
    dense = decode(fmt, {"codes": codes, "scale": grid.scale, **pairs()})
    steps = (grouped(weight, fmt) / grid.scale.float()[..., None]).view(D_OUT, -1, 2)
    rounded = (grouped(dense, fmt) / grid.scale.float()[..., None]).view(D_OUT, -1, 2)
    magnitudes = torch.tensor([12.0, 16, 24, 32, 48, 64, 96])
    beyond = (steps.round().abs() > 7).any(-1)
    assert 10 < int(beyond.sum()) < 300
    for pair, wanted in zip(rounded[beyond], steps[beyond], strict=True):
        larger = int(wanted.abs().argmax())
        assert pair[1 - larger] == 0
        nearest_one = magnitudes[(magnitudes - wanted[larger].abs()).abs().argmin()]
        assert math.isclose(float(pair[larger]), float(nearest_one * wanted[larger].sign()), rel_tol=1e-5)
    assert torch.allclose(rounded[~beyond], steps[~beyond].round().clamp(-7, 7), atol=1e-4)


def test_olive_takes_the_scale_of_least_error_of_its_search() -> None:
    fmt = parse_format("w4a16-g48")
    weight = random(7, D_IN, seed=36).pow(3) * 0.02
    grid = olive(weight, fmt)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        parts = {"codes": pair_codes(weight, fmt, Grid(scale)), "scale": scale, **pairs()}
        return grouped(decode(fmt, parts) - weight, fmt).double().square().sum(-1)

    deviation = grouped(weight, fmt).square().mean(-1).sqrt()
    tried = torch.stack([errors(safe_scale(deviation * (end / 7))) for end in SEARCH])
    assert torch.allclose(errors(grid.scale), tried.amin(0), rtol=1e-5) and tried.argmin(0).unique().numel() > 3


def test_pairs_serve_heavy_tails() -> None:
    """Not those of a real weight: OliVe gains on activations, and on weights like these."""
    tails = random(64, 96, seed=34) * torch.where(random(64, 96, seed=35) > 2.4, 12.0, 1.0)
    fmt = parse_format("w4a16")
    paired = decode(fmt, {"codes": pair_codes(tails, fmt, olive(tails, fmt)), "scale": olive(tails, fmt).scale, **pairs()})
    clipped = decode(fmt, nearest(tails, fmt, mse(tails, fmt)))
    assert (paired - tails).square().sum() < 0.5 * (clipped - tails).square().sum()
