"""The feedback rounder against the explicit elimination loop of Optimal Brain Surgeon, and its limits."""

import logging

import pytest
import torch

from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode, encode
from methods.quant.feedback import auto_damping, column_rounder, feedback, inverse_factor, stacked_rounder
from methods.quant.grid import Grid, payload
from methods.quant.minmax import minmax

D_OUT, D_IN = 11, 240


def problem(n_tokens: int = 2000, d_in: int = D_IN, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (D_OUT, d_in) and correlated inputs (n_tokens, d_in) of unequal variance, fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(D_OUT, d_in, generator=generator, dtype=torch.float64) * 0.05
    return weight, inputs(n_tokens, d_in, seed + 1)


def inputs(n_tokens: int, d_in: int, seed: int, mixing_seed: int = 7) -> torch.Tensor:
    mixing_generator, generator = torch.Generator().manual_seed(mixing_seed), torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in // 4, d_in, generator=mixing_generator, dtype=torch.float64) / d_in**0.5
    own = torch.rand(d_in, generator=mixing_generator, dtype=torch.float64) * 0.3
    factors = torch.randn(n_tokens, d_in // 4, generator=generator, dtype=torch.float64)
    return factors @ mixing + torch.randn(n_tokens, d_in, generator=generator, dtype=torch.float64) * own


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def elimination(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fmt: Format,
    grid: Grid,
    damping: float,
    order: list[int],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """One column at a time: round it, push its error to the others by the inverse Hessian, eliminate it from that inverse.

    Gives codes, or the values of all elements where some are kept.
    """
    d_in = len(hessian)
    w, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8)
    values = torch.empty_like(weight)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(d_in, dtype=torch.float64))
    scale, size = grid.scale.double(), fmt.group_size(d_in)
    offset = 0 * scale if grid.offset is None else grid.offset.double()
    shift = fmt.levels // 2 if fmt.symmetric else 0
    for j in order:
        s, o = scale[:, j // size], offset[:, j // size]
        code = (torch.round((w[:, j] - o) / s) + shift).clamp(*fmt.code_range)
        value = (code - shift) * s + o
        if kept is not None:
            value = torch.where(kept[:, j], w[:, j].bfloat16().double(), value)
        values[:, j] = value
        error = w[:, j] - value
        w -= torch.outer(error, inverse[j] / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        # An eliminated column has zero rows in the inverse up to rounding; exact zeros keep later updates off it.
        inverse[j], inverse[:, j] = 0, 0
        codes[:, j] = code.to(torch.uint8)
    return codes if kept is None else values


@pytest.mark.parametrize("name", ["w2a16-g48", "w4a16-g48-asym", "w3a16-g16", "w8a16", "w4a16-asym"])
@pytest.mark.parametrize("act_order", [True, False])
def test_equals_explicit_elimination(name: str, act_order: bool) -> None:
    fmt = parse_format(name)
    weight, x = problem()
    hessian, grid = gram(x), minmax(weight, fmt)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(D_IN))
    expected = elimination(weight, hessian, fmt, grid, 0.01, order)
    codes = feedback(weight, hessian, column_rounder(fmt, grid, D_IN, torch.float64), 0.01, act_order=act_order).codes
    assert torch.equal(codes, expected)
    assert not torch.equal(codes, encode(weight, fmt, grid.scale, grid.offset))


@pytest.mark.parametrize("block", [1, 7, 100])
def test_lazy_blocks_change_nothing(block: int) -> None:
    fmt = parse_format("w4a16-g48-asym")
    weight, x = problem()
    rounder = column_rounder(fmt, minmax(weight, fmt), D_IN, torch.float64)
    expected = feedback(weight, gram(x), rounder, 0.01).codes
    assert torch.equal(feedback(weight, gram(x), rounder, 0.01, block=block).codes, expected)


def test_act_order_rounds_the_largest_diagonal_first() -> None:
    fmt = parse_format("w4a16-g48")
    weight, x = problem()
    hessian = gram(x)
    rounder, seen = column_rounder(fmt, minmax(weight, fmt), D_IN, torch.float64), []

    def spy(values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(column)
        return rounder(values, column)

    feedback(weight, hessian, spy, 0.01)
    assert seen == hessian.diagonal().argsort(descending=True).tolist()
    assert seen != list(range(D_IN))


@pytest.mark.parametrize("name", ["w2a16-g48", "w4a16-g48-asym", "w8a16"])
@pytest.mark.parametrize("act_order", [True, False])
def test_uncorrelated_inputs_round_to_nearest(name: str, act_order: bool) -> None:
    fmt = parse_format(name)
    weight = problem()[0].float()
    grid = minmax(weight, fmt)
    diagonal = torch.diag(torch.rand(D_IN, generator=torch.Generator().manual_seed(0)) + 0.1)
    codes = feedback(weight, diagonal, column_rounder(fmt, grid, D_IN), 0.01, act_order=act_order).codes
    assert torch.equal(codes, encode(weight, fmt, grid.scale, grid.offset))


def test_dead_inputs_round_to_nearest_and_disturb_nothing() -> None:
    fmt = parse_format("w3a16-g48")
    weight, x = problem()
    dead = [5, 100, 239]
    x[:, dead] = 0
    grid = minmax(weight, fmt)
    codes = feedback(weight, gram(x), column_rounder(fmt, grid, D_IN, torch.float64), 0.01).codes
    assert torch.equal(codes[:, dead], encode(weight, fmt, grid.scale, grid.offset)[:, dead])


def test_inverse_factor() -> None:
    hessian = gram(problem()[1])
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)
    upper = inverse_factor(hessian, 0.1)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(D_IN, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_singular_hessian_gets_more_damping_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x = problem(n_tokens=30)[1]
    with caplog.at_level(logging.WARNING):
        upper = inverse_factor(gram(x).float(), 0.0)
    assert torch.isfinite(upper).all()
    assert "needed damping" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        inverse_factor(gram(x).float(), 0.01)
    assert not caplog.text


def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(torch.full((3, 3), torch.nan), 0.01)
    assert torch.isfinite(inverse_factor(torch.zeros(3, 3), 0.01)).all()


def output_error(weight: torch.Tensor, fmt: Format, grid: Grid, codes: torch.Tensor, x: torch.Tensor) -> float:
    dense = decode(fmt, payload(codes, grid)).double()
    return float((x @ (dense - weight).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("name", ["w4a16-g48-asym", "w3a16-g48", "w2a16-g16"])
def test_less_output_error_and_more_weight_error_than_nearest(name: str) -> None:
    fmt = parse_format(name)
    weight, x = problem(n_tokens=5 * D_IN)
    held_out = inputs(1000, D_IN, seed=99)
    grid = minmax(weight, fmt)
    plain = encode(weight, fmt, grid.scale, grid.offset)
    codes = feedback(weight, gram(x), column_rounder(fmt, grid, D_IN, torch.float64), auto_damping(len(x), D_IN)).codes
    assert output_error(weight, fmt, grid, codes, held_out) < 0.8 * output_error(weight, fmt, grid, plain, held_out)
    identity = torch.eye(D_IN, dtype=torch.float64)
    assert output_error(weight, fmt, grid, codes, identity) > 1.05 * output_error(weight, fmt, grid, plain, identity)


def test_auto_damping_follows_tokens_per_input() -> None:
    assert auto_damping(0, 576) == auto_damping(100, 576) == 10.0
    assert auto_damping(2048, 1536) == 3.0
    assert auto_damping(8192, 1536) == pytest.approx(0.75)
    assert auto_damping(10**6, 1536) == 0.01


def heavy_tailed(n_tokens: int, d_in: int, seed: int) -> torch.Tensor:
    """Inputs with a few strong directions in noise, and tokens of very unequal size: a Hessian that few tokens estimate badly."""
    mixing = torch.randn(48, d_in, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / 48**0.5
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, 48, generator=generator, dtype=torch.float64) @ mixing
    x += torch.randn(n_tokens, d_in, generator=generator, dtype=torch.float64)
    return x * torch.randn(n_tokens, 1, generator=generator, dtype=torch.float64).exp()


def test_auto_damping_beats_nearest_on_held_out_inputs_where_little_damping_loses() -> None:
    d_in, n_tokens = 480, 520
    fmt = parse_format("w4a16-g48-asym")
    weight = problem(1, d_in)[0]
    x, held_out = heavy_tailed(n_tokens, d_in, 1), heavy_tailed(2000, d_in, 99)
    grid = minmax(weight, fmt)

    def error(damping: float) -> float:
        codes = feedback(weight, gram(x), column_rounder(fmt, grid, d_in, torch.float64), damping).codes
        return output_error(weight, fmt, grid, codes, held_out)

    plain = output_error(weight, fmt, grid, encode(weight, fmt, grid.scale, grid.offset), held_out)
    assert error(0.01) > 1.1 * plain
    assert error(auto_damping(n_tokens, d_in)) < 0.9 * plain


def test_stacked_formats_get_the_codes_they_get_alone() -> None:
    weight, x = problem()
    weight = weight.float()
    formats = [parse_format(name) for name in ("w2a16-g48", "w4a16-g16-asym", "w8a16", "w3a8-token-asym")]
    grids = [minmax(weight, fmt) for fmt in formats]
    rounder = stacked_rounder(list(zip(formats, grids, strict=True)), D_IN)
    together = feedback(weight.repeat(len(formats), 1), gram(x), rounder, 0.01).codes.chunk(len(formats))
    for fmt, grid, codes in zip(formats, grids, together, strict=True):
        alone = feedback(weight, gram(x), column_rounder(fmt, grid, D_IN), 0.01).codes
        assert (codes != alone).float().mean() < 2e-3  # the matrix products of other shapes may sum in another order
        assert not torch.equal(codes, encode(weight, fmt, grid.scale, grid.offset))


def scattered(part: float = 0.05) -> torch.Tensor:
    return torch.rand(D_OUT, D_IN, generator=torch.Generator().manual_seed(3)) < part


@pytest.mark.parametrize("act_order", [True, False])
def test_kept_elements_take_up_errors_and_keep_what_they_are_at_their_turn(act_order: bool) -> None:
    fmt = parse_format("w3a16-g48-asym")
    weight, x = problem()
    hessian, grid, kept = gram(x), minmax(weight, fmt), scattered()
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(D_IN))
    expected = elimination(weight, hessian, fmt, grid, 0.01, order, kept)
    rounder = column_rounder(fmt, grid, D_IN, torch.float64)
    found = feedback(weight, hessian, rounder, 0.01, act_order=act_order, kept=kept)
    assert found.values is not None
    assert torch.equal(found.values[kept], expected[kept].float())
    assert torch.equal(found.values, torch.where(kept, found.values, decode(fmt, payload(found.codes, grid))))
    assert torch.equal(found.values[~kept], expected[~kept].float())
    assert (found.values[kept] != weight[kept].float()).float().mean() > 0.9


def test_columns_kept_whole_come_last() -> None:
    fmt = parse_format("w3a16-g48")
    weight, x = problem()
    kept = scattered()
    kept[:, [3, 100, 101]] = True
    rounder, seen = column_rounder(fmt, minmax(weight, fmt), D_IN, torch.float64), []

    def spy(values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(column)
        return rounder(values, column)

    feedback(weight, gram(x), spy, 0.01, kept=kept)
    others = [column for column in gram(x).diagonal().argsort(descending=True).tolist() if column not in (3, 100, 101)]
    assert seen[:-3] == others and set(seen[-3:]) == {3, 100, 101}


def drifted() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and their drift, `(X_dense - X)^T X / n`."""
    x = problem()[1]
    lost = 0.2 * inputs(len(x), D_IN, seed=50, mixing_seed=51) + 0.1 * x
    return x, lost.T @ x / len(x)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [64, 240])
def test_drift_is_made_up_for_as_the_equation_says(act_order: bool, block: int) -> None:
    """Row q of P: dX_q X_F^T (H_FF)^-1 over the columns F after q, each inverse on its own."""
    fmt = parse_format("w4a16-g48-asym")
    weight = problem()[0]
    x, drift = drifted()
    hessian, grid = gram(x), minmax(weight, fmt)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(D_IN)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64))[order][:, order]
    moved, w = drift[order][:, order], weight[:, order].clone()
    rounder, codes = column_rounder(fmt, grid, D_IN, torch.float64), torch.empty(D_OUT, D_IN, dtype=torch.uint8)
    for q, place in enumerate(order.tolist()):
        now = w[:, q].clone()
        code, value = rounder(now, place)
        codes[:, place] = code.to(torch.uint8)
        inverse = torch.linalg.inv(damped[q:, q:])
        w[:, q:] -= torch.outer((now - value) / inverse[0, 0], inverse[0])
        if q + 1 < D_IN:
            w[:, q + 1 :] += torch.outer(now, moved[q, q + 1 :] @ torch.linalg.inv(damped[q + 1 :, q + 1 :]))
    found = feedback(weight, hessian, rounder, 0.01, act_order=act_order, block=block, drift=drift)
    assert torch.equal(found.codes, codes)
    assert not torch.equal(codes, feedback(weight, hessian, rounder, 0.01, act_order=act_order).codes)


def test_no_drift_and_no_kept_element_change_nothing() -> None:
    fmt = parse_format("w3a16-g48-asym")
    weight, x = problem()
    weight = weight.float()
    rounder = column_rounder(fmt, minmax(weight, fmt), D_IN)
    plain = feedback(weight, gram(x), rounder, 0.01)
    none = feedback(
        weight, gram(x), rounder, 0.01, kept=torch.zeros_like(weight, dtype=torch.bool), drift=torch.zeros(D_IN, D_IN)
    )
    assert torch.equal(plain.codes, none.codes) and plain.values is None


def test_drift_made_up_for_keeps_the_dense_output() -> None:
    """Inputs that shrank by a part that the weights can give back: what is left of the output error is less than without."""
    fmt = parse_format("w4a16-g48-asym")
    weight, x = problem()
    dense = 1.2 * x
    drift = (dense - x).T @ x / len(x)
    grid = minmax(weight * 1.5, fmt)
    rounder = column_rounder(fmt, grid, D_IN, torch.float64)

    def error(drift: torch.Tensor | None) -> float:
        codes = feedback(weight, gram(x), rounder, 0.01, drift=drift).codes
        return float((x @ decode(fmt, payload(codes, grid)).double().T - dense @ weight.T).square().mean())

    assert error(drift) < 0.7 * error(None)
