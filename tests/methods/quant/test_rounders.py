"""The rounders beside `feedback`, and the fitters that clip: each against a slow version of its definition, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode, encode
from methods.quant.clip import output_clip
from methods.quant.feedback import column_rounder, feedback
from methods.quant.greedy import greedy
from methods.quant.grid import Grid, grouped, payload
from methods.quant.kl import BINS, divergence, kl
from methods.quant.ldlq import ldlq
from methods.quant.minmax import minmax
from methods.quant.obq import LIMIT, obq
from methods.quant.percentile import percentile
from methods.quant.stochastic import stochastic

D_OUT, D_IN = 7, 144


def problem(seed: int = 0, d_in: int = D_IN) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (D_OUT, d_in) and a Hessian (d_in, d_in) of correlated inputs of unequal variance, fp64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in // 4, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
    own = 0.3 * torch.rand(d_in, generator=generator, dtype=torch.float64)
    x = torch.randn(1000, d_in // 4, generator=generator, dtype=torch.float64) @ mixing
    x += own * torch.randn(1000, d_in, generator=generator, dtype=torch.float64)
    weight = 0.05 * torch.randn(D_OUT, d_in, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def damped(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def proxy(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    error = values.double() - weight
    return float(torch.trace(error @ hessian @ error.T))


def plain_codes(weight: torch.Tensor, fmt: Format, grid: Grid) -> torch.Tensor:
    return encode(weight, fmt, grid.scale, grid.offset)


def some_kept() -> torch.Tensor:
    return torch.rand(D_OUT, D_IN, generator=torch.Generator().manual_seed(3)) < 0.2


# LDLQ


@pytest.mark.parametrize("name", ["w2a16-g48", "w4a16-g48-asym", "w8a16"])
@pytest.mark.parametrize("order", ["first", "last", "diagonal"])
def test_ldlq_is_feedback_in_the_same_order(name: str, order: str) -> None:
    fmt = parse_format(name)
    weight, hessian = problem()
    rounder = column_rounder(fmt, minmax(weight, fmt), D_IN, torch.float64)
    turn = {
        "first": torch.arange(D_IN),
        "last": torch.arange(D_IN).flip(0),
        "diagonal": hessian.diagonal().argsort(descending=True, stable=True),
    }[order]
    found = ldlq(weight, hessian, rounder, 0.01, turn, block=50).codes

    def turned(values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rounder(values, int(turn[column]))

    expected = torch.empty_like(found)
    expected[:, turn] = feedback(weight[:, turn], hessian[turn][:, turn], turned, 0.01, act_order=False).codes
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain_codes(weight, fmt, minmax(weight, fmt)))


def test_ldlq_from_the_last_column_is_the_published_recursion() -> None:
    fmt = parse_format("w3a16-g48-asym")
    weight, hessian = problem()
    grid = minmax(weight, fmt)
    lower = torch.linalg.cholesky(damped(hessian))
    strict = (lower / lower.diagonal()).tril(-1)
    rounded, rounder = weight.clone(), column_rounder(fmt, grid, D_IN, torch.float64)
    for k in reversed(range(D_IN)):
        rounded[:, k] = rounder(weight[:, k] + (weight - rounded)[:, k + 1 :] @ strict[k + 1 :, k], k)[1]
    found = ldlq(weight, hessian, rounder, 0.01, torch.arange(D_IN).flip(0)).codes
    assert torch.equal(decode(fmt, payload(found, grid)).double(), rounded)


def test_ldlq_leaves_kept_elements_off_the_grid() -> None:
    fmt, kept = parse_format("w3a16-g48-asym"), some_kept()
    weight, hessian = problem()
    rounder = column_rounder(fmt, minmax(weight, fmt), D_IN, torch.float64)
    found = ldlq(weight, hessian, rounder, 0.01, torch.arange(D_IN), kept=kept)
    same = feedback(weight, hessian, rounder, 0.01, act_order=False, kept=kept)
    assert found.values is not None and same.values is not None
    assert torch.equal(found.codes[~kept], same.codes[~kept]) and torch.equal(found.values[kept], same.values[kept])


# Greedy passes


def test_greedy_passes_never_make_the_error_larger_and_end() -> None:
    fmt = parse_format("w2a16-g48-asym")
    weight, hessian = problem()
    grid = minmax(weight, fmt)
    rounder, start = column_rounder(fmt, grid, D_IN, torch.float64), plain_codes(weight, fmt, grid)
    values = decode(fmt, payload(start, grid))
    assert torch.equal(greedy(weight, start, values, hessian, rounder, 0.01, 0), start)
    errors = [proxy(weight, values, damped(hessian))]
    for passes in range(1, 8):
        codes = greedy(weight, start, values, hessian, rounder, 0.01, passes, block=50)
        errors.append(proxy(weight, decode(fmt, payload(codes, grid)), damped(hessian)))
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[1] < 0.6 * errors[0]
    final = greedy(weight, start, values, hessian, rounder, 0.01, 100)
    again = greedy(weight, final, decode(fmt, payload(final, grid)), hessian, rounder, 0.01, 1)
    assert torch.equal(again, final)


@pytest.mark.parametrize("block", [1, 50, 144])
def test_a_greedy_pass_tries_every_code_of_every_column_in_turn(block: int) -> None:
    fmt, kept = parse_format("w2a16-g48-asym"), some_kept()
    weight, hessian = problem()
    grid, h = minmax(weight, fmt), damped(hessian)
    assert grid.offset is not None
    codes = plain_codes(weight, fmt, grid)
    values = torch.where(kept, weight.float(), decode(fmt, payload(codes, grid)))
    found = greedy(
        weight, codes, values, hessian, column_rounder(fmt, grid, D_IN, torch.float64), 0.01, 1, kept=kept, block=block
    )
    slow, error = codes.clone(), values.double() - weight
    for row in range(D_OUT):
        for j in (~kept[row]).nonzero()[:, 0].tolist():
            trials = []
            for code in range(fmt.levels):
                level = code * grid.scale[row, j // 48].double() + grid.offset[row, j // 48].double()
                trial = error[row].clone()
                trial[j] = level - weight[row, j]
                trials.append((float(trial @ h @ trial), code, trial))
            _, slow[row, j], error[row] = min(trials, key=lambda item: item[0])
    assert torch.equal(found[~kept], slow[~kept]) and torch.equal(found[kept], codes[kept])
    assert (found != codes).any()


# OBQ


def test_obq_leaves_the_rest_at_its_least_squares_solution() -> None:
    """Whatever the order: once F is fixed, w_L = w_L - (H_LL)^-1 H_LF (v_F - w_F)."""
    fmt, kept = parse_format("w3a16-g48-asym"), some_kept()
    weight, hessian = problem()
    grid, h = minmax(weight, fmt), damped(hessian)
    found = obq(weight, hessian, fmt, grid, 0.01, kept=kept)
    assert found.values is not None
    rounded = decode(fmt, payload(found.codes, grid)).double()
    for row in range(D_OUT):
        left, fixed = kept[row], ~kept[row]
        moved = rounded[row, fixed] - weight[row, fixed]
        expected = weight[row, left] - torch.linalg.solve(h[left][:, left], h[left][:, fixed] @ moved)
        torch.testing.assert_close(found.values[row, left].double(), expected, atol=1e-8, rtol=0)
        assert (found.values[row, left].double() - weight[row, left]).abs().max() > 1e-3


def slow_obq(w: torch.Tensor, h: torch.Tensor, fmt: Format, grid: Grid) -> tuple[torch.Tensor, list[int]]:
    """One row (d_in,) by the published loop, its inverse updated as a matrix; also the order."""
    d_in, inverse, left, order = len(w), torch.linalg.inv(h), list(range(len(w))), []
    step = grid.scale[0].double().abs().repeat_interleave(fmt.group_size(d_in))
    w = w.clone()
    for _ in range(d_in):
        q = decode(fmt, payload(plain_codes(w[None], fmt, grid), grid))[0].double()
        outside = [j for j in left if (w[j] - q[j]).abs() > 0.5001 * step[j]]
        j = (
            max(outside, key=lambda j: float((w[j] - q[j]).abs() / step[j]))
            if outside
            else min(left, key=lambda j: float((w[j] - q[j]) ** 2 / inverse[j, j]))
        )
        w[left] -= inverse[left, j] * (w[j] - q[j]) / inverse[j, j]
        w[j] = q[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.remove(j)
        order.append(j)
    return w, order


@pytest.mark.parametrize("name", ["w2a16-g16-asym", "w3a16-g32"])
def test_obq_is_the_published_loop_row_by_row(name: str) -> None:
    fmt = parse_format(name)
    weight, hessian = problem(d_in=64)
    weight = weight[:3]
    grid = percentile(weight, fmt, 90.0)
    found = obq(weight, hessian, fmt, grid, 0.01)
    values, orders = decode(fmt, payload(found.codes, grid)).double(), []
    for row in range(len(weight)):
        own = Grid(grid.scale[row : row + 1], None if grid.offset is None else grid.offset[row : row + 1])
        expected, order = slow_obq(weight[row], damped(hessian), fmt, own)
        assert torch.equal(values[row], expected)
        orders.append(order)
    assert orders[0] != orders[1]


def test_obq_is_better_than_nearest_and_in_the_given_order_it_is_feedback() -> None:
    fmt = parse_format("w3a16-g48-asym")
    weight, hessian = problem()
    grid = minmax(weight, fmt)
    rounder = column_rounder(fmt, grid, D_IN, torch.float64)
    given = obq(weight, hessian, fmt, grid, 0.01, cheapest=False).codes
    assert torch.equal(given, feedback(weight, hessian, rounder, 0.01, act_order=False).codes)
    chosen = obq(weight, hessian, fmt, grid, 0.01).codes
    errors = [proxy(weight, decode(fmt, payload(c, grid)), hessian) for c in (chosen, plain_codes(weight, fmt, grid))]
    assert errors[0] < 0.8 * errors[1]
    assert not torch.equal(chosen, given)


def test_obq_in_chunks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse_format("w3a16-g48-asym")
    weight, hessian = problem()
    whole = obq(weight, hessian, fmt, minmax(weight, fmt), 0.01).codes
    monkeypatch.setattr("methods.quant.obq._CHUNK", 3 * D_IN**2)
    assert torch.equal(obq(weight, hessian, fmt, minmax(weight, fmt), 0.01).codes, whole)


def test_obq_refuses_wide_weights() -> None:
    weight = torch.zeros(1, LIMIT + 16)
    with pytest.raises(ValueError, match="use gptq above 2048"):
        obq(weight, torch.eye(LIMIT + 16), parse_format("w4a16"), minmax(weight, parse_format("w4a16")), 0.01)


# Stochastic rounding


def test_stochastic_rounding_is_the_weight_on_average_within_the_range() -> None:
    fmt = parse_format("w3a16-g48-asym")
    weight = problem()[0].float()
    grid = minmax(2 * weight, fmt)
    drawn = [stochastic(weight, fmt, grid, 1.0, torch.Generator().manual_seed(seed)) for seed in range(400)]
    values = torch.stack([decode(fmt, payload(codes, grid)) for codes in drawn])
    step = grid.scale.float().repeat_interleave(48, 1)
    # A step is 2 standard deviations of a mean over 1 draw at most: here 400.
    assert ((values.mean(0) - weight) / step).abs().max() < 5 * 0.5 / math.sqrt(400)
    assert (values - weight).abs().max() < step.max() * 1.001
    near = decode(fmt, payload(plain_codes(weight, fmt, grid), grid))
    assert ((near - weight) / step).abs().max() > 0.45
    assert not torch.equal(drawn[0], drawn[1])


def test_stochastic_rounding_without_noise_is_nearest() -> None:
    fmt = parse_format("w4a16-g48")
    weight = problem()[0].float()
    grid = minmax(weight, fmt)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(stochastic(weight, fmt, grid, 0.0, generator), plain_codes(weight, fmt, grid))


# Fitters


@pytest.mark.parametrize("name", ["w4a16-g48-asym", "w4a16-g16", "w8a16"])
def test_percentile_clips_at_the_quantiles(name: str) -> None:
    fmt = parse_format(name)
    weight = problem()[0].float()
    groups = grouped(weight, fmt)
    low, high = (torch.quantile(groups, part, dim=-1, keepdim=True) for part in (0.03, 0.97))
    expected = minmax(groups.clamp(low, high).reshape(weight.shape), fmt)
    found = percentile(weight, fmt, 97.0)
    torch.testing.assert_close(found.scale.float(), expected.scale.float(), rtol=5e-3, atol=0)
    assert (found.scale.float().abs() < minmax(weight, fmt).scale.float().abs()).float().mean() > 0.9
    assert torch.equal(percentile(weight, fmt, 100.0).scale, minmax(weight, fmt).scale)


def test_divergence_by_hand() -> None:
    """Two steps of eight bins: the first holds two values in different bins, the second three and one clipped to its end."""
    place = torch.tensor([[0.01, 0.2, 0.6, 0.6, 0.9, 1.3]])
    p = [1 / 6, 1 / 6, 2 / 6, 1 / 6, 1 / 6]
    q = [1 / 5, 1 / 5, 1 / 5, 1 / 5, 1 / 5]
    assert BINS == 8
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(divergence(place, 2)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(torch.tensor([[0.1, 0.2, 1.5]]), 2)) == math.inf
    assert float(divergence(torch.tensor([[0.01, 0.07, 0.6, 0.7]]), 2)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w3a16-g48"])
def test_kl_takes_the_part_of_least_divergence_for_all_groups_of_a_row(name: str) -> None:
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(4)
    weight = 0.05 * torch.randn(5, 480, generator=generator) / (0.3 + torch.rand(5, 480, generator=generator))
    full, found = minmax(weight, fmt).scale.float().abs(), kl(weight, fmt).scale.float().abs()
    part = (found / full).mean(1)
    assert part.min() < 0.97 and part.max() <= 1.001
    if fmt.symmetric:
        assert ((found / full).amax(1) - (found / full).amin(1)).max() < 0.01
        largest = grouped(weight, fmt).abs().amax(-1, keepdim=True)
        place = (grouped(weight, fmt) / largest).flatten(1)
        tried = [1 - step / 25 for step in range(18)]
        values = torch.stack([divergence(place / 2 / p + 0.5, fmt.levels) for p in tried])
        expected = torch.tensor(tried)[values.argmin(0)]
        torch.testing.assert_close(part, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["w3a16-g48-asym", "w4a16-g16", "w3a16"])
def test_output_clip_takes_the_part_of_least_output_error_in_every_group(name: str) -> None:
    fmt = parse_format(name)
    weight = problem()[0].float()
    generator = torch.Generator().manual_seed(8)
    sample = torch.randn(60, D_IN, generator=generator) * torch.rand(D_IN, generator=generator) * 2
    hessian = sample.T @ sample / len(sample)
    found, size = output_clip(weight, hessian, fmt), fmt.group_size(D_IN)
    clipped = 0
    for group in range(D_IN // size):
        x, w = sample[:, group * size : (group + 1) * size], weight[:, group * size : (group + 1) * size]
        whole = Format(fmt.bits, -1, fmt.symmetric)
        errors, grids = [], []
        for step in range(21):
            limit = w.abs().amax(1, keepdim=True) * (1 - 0.5 * step / 20)
            grid = minmax(w.clamp(-limit, limit), whole)
            rounded = decode(whole, payload(plain_codes(w, whole, grid), grid))
            errors.append((x @ (rounded - w).T).square().sum(0))
            grids.append(grid.scale[:, 0])
        best = torch.stack(errors).argmin(0)
        assert torch.equal(found.scale[:, group], torch.stack(grids)[best, torch.arange(D_OUT)])
        clipped += int((best > 0).sum())
    assert clipped > D_OUT * D_IN // size // 4
    assert torch.equal(output_clip(weight, hessian, fmt, steps=0).scale, minmax(weight, fmt).scale)
