"""Fitters of elements other than integers, and feedback over them, against their equations and what each promises."""

from __future__ import annotations

import itertools

import pytest
import torch

from methods.catalogue import METHODS
from methods.formats.format import Format, parse_format
from methods.formats.numerics import binary_levels, decode, encode
from methods.quant.bcq import bcq, from_integer, greedy
from methods.quant.feedback import Rounded, column_rounder, feedback, stacked_rounder
from methods.quant.four_six import four_six
from methods.quant.grid import Grid, grouped, payload, range_grid, stored
from methods.quant.imatrix import imatrix
from methods.quant.lut import even_levels
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(d_out: int = 13, d_in: int = 192) -> torch.Tensor:
    weight = random(d_out, d_in) * 0.05 + 0.005
    weight[2, :96] = 0.0
    return weight


def errors(weight: torch.Tensor, fmt: Format, grid: Grid) -> torch.Tensor:
    """Squared error of every group."""
    return grouped(decode(fmt, nearest(weight, fmt, grid)) - weight, fmt).double().square().sum(-1)


def test_one_signed_term_is_sign_times_mean() -> None:
    weight = weights()
    mean = grouped(weight, parse_format("bin1a16-g48")).abs().mean(-1, keepdim=True).bfloat16().float()
    mean[mean == 0] = 1.0
    for name in ("bin1a16-g48", "bcq1a16-g48"):
        fmt = parse_format(name)
        dense = decode(fmt, nearest(weight, fmt, minmax(weight, fmt)))
        used = weight != 0
        assert torch.equal(dense[used], (weight.sign() * mean.repeat_interleave(48, 1).flatten(1))[used])
    fmt = parse_format("bcq1a16-g48")
    assert torch.equal(bcq(weight, fmt, 10).parts["alpha"], greedy(weight, fmt).parts["alpha"])


@pytest.mark.parametrize("name", ["bcq2a16-g64", "bcq3a16-g64", "bcq2a16-g64-asym", "bcq4a16"])
def test_alternating_is_in_no_group_worse_than_greedy_nor_with_more_rounds(name: str) -> None:
    fmt, weight = parse_format(name), weights()
    found = [errors(weight, fmt, bcq(weight, fmt, rounds)) for rounds in (0, 1, 5, 15)]
    assert torch.equal(bcq(weight, fmt, 0).parts["alpha"], greedy(weight, fmt).parts["alpha"])
    assert all((more <= less * (1 + 1e-5) + 1e-12).all() for less, more in itertools.pairwise(found))
    assert found[-1].sum() < 0.9 * found[0].sum()


def test_a_round_that_bf16_terms_make_worse_is_not_kept() -> None:
    fmt, weight = parse_format("bcq4a16-g64"), random(200, 192) * 0.05
    found = [errors(weight, fmt, bcq(weight, fmt, rounds)) for rounds in range(8, 16)]
    assert all((more <= less * (1 + 1e-6)).all() for less, more in itertools.pairwise(found))


def test_alternating_is_better_than_integers_of_equal_bits() -> None:
    weight = random(96, 192)
    binary, integer = parse_format("bcq3a16-g64"), parse_format("w3a16-g64")
    assert errors(weight, binary, bcq(weight, binary, 15)).sum() < errors(weight, integer, minmax(weight, integer)).sum()


def test_greedy_terms_by_hand() -> None:
    fmt = parse_format("bcq2a16-g16")
    grid = greedy(torch.tensor([[1.0, -3.0, 2.0, -2.0] * 4]), fmt)
    # mean |w| = 2 leaves -1, -1, 0, 0, of mean magnitude 1/2.
    assert grid.parts["alpha"].tolist() == [[[2.0, 0.5]]]
    assert grid.levels is not None and grid.levels[0, 0].tolist() == [-2.5, 1.5, -1.5, 2.5]
    shifted = greedy(torch.tensor([[1.0, -3.0, 2.0, -2.0] * 4]), parse_format("bcq2a16-g16-asym"))
    assert shifted.parts["offset"].tolist() == [[-0.5]]


def test_uniform_integers_are_binary_codes() -> None:
    """With bf16 terms too, where a power of two costs nothing; the offset alone would round, and is taken exact here."""
    weight, fmt = weights(), parse_format("w3a16-g48-asym")
    grid = minmax(weight, fmt)
    assert grid.offset is not None
    alpha, offset = from_integer(fmt, grid.scale.float(), grid.offset.float())
    dense = decode(fmt, nearest(weight, fmt, grid))
    codes = nearest(weight, fmt, grid)["codes"].view(13, 4, 48).long()
    rebuilt = binary_levels(alpha.bfloat16()).gather(2, codes) + offset[..., None]
    torch.testing.assert_close(rebuilt.view_as(dense), dense, rtol=0, atol=1e-6)


def test_ternary_scale_by_its_equations() -> None:
    fmt, weight = parse_format("tern2a16-g48"), weights()
    grid = minmax(weight, fmt)
    for row in range(13):
        for group in range(4):
            part = weight[row, group * 48 : group * 48 + 48].abs()
            above = part[part > 0.7 * part.mean()]
            expected = above.mean() if len(above) else torch.tensor(1.0)
            assert float(grid.scale[row, group]) == pytest.approx(float(expected), rel=2**-8)
    dense = decode(fmt, nearest(weight, fmt, grid))
    assert all(len(part.unique()) <= 3 for part in dense.view(-1, 48))
    whole = minmax(weight, parse_format("tern2a16-whole"))
    part = weight.abs()
    assert whole.parts["scale"].shape == (1, 1)
    assert float(whole.parts["scale"]) == pytest.approx(float(part[part > 0.7 * part.mean()].mean()), rel=2**-8)


def test_even_levels_are_an_integer_grid_with_an_offset() -> None:
    weight, fmt, integer = weights(), parse_format("lut3a16-g48"), parse_format("w3a16-g48-asym")
    levels, grid = even_levels(weight, fmt).levels, minmax(weight, integer)
    assert levels is not None and grid.offset is not None
    expected = grid.offset.float()[..., None] + grid.scale.float()[..., None] * torch.arange(8)
    used = grouped(weight, fmt).abs().amax(-1) > 0
    torch.testing.assert_close(levels[used], expected[used], rtol=2**-7, atol=1e-3)


def test_two_level_scales_cost_little_and_beat_a_scale_a_channel() -> None:
    weight = random(64, 768)
    found = {
        name: float(errors(weight, parse_format(name), minmax(weight, parse_format(name))).sum())
        for name in ("w4a16", "w4a16-g16-fp32", "w4a16-g16-u4", "w4a16-g16-u6")
    }
    fine = parse_format("w4a16-g16-fp32")
    top = grouped(weight, fine).abs().amax(-1)
    ideal = float(errors(weight, fine, stored(fine, 64, top / 7)).sum())
    assert found["w4a16-g16-u6"] < 1.02 * ideal and found["w4a16-g16-u4"] < 1.1 * ideal
    assert found["w4a16-g16-u4"] < 0.5 * found["w4a16"]


@pytest.mark.parametrize(("name", "gain"), [("nvfp4a16", 0.88), ("e2m1a16-g48", 0.97)])
def test_four_six_takes_the_better_end_of_every_block(name: str, gain: float) -> None:
    fmt, weight = parse_format(name), weights() * 3
    grid, plain = four_six(weight, fmt), minmax(weight, fmt)
    assert torch.equal(four_six(weight, fmt, 6).scale, plain.scale)
    top = grouped(weight, fmt).abs().amax(-1)
    ratio = (top / grid.scale.float())[top > 0]
    near = torch.minimum((ratio - 6).abs(), (ratio - 4).abs())
    assert (near < 0.4).all() and (ratio > 5).any() and (ratio < 5).any()
    assert errors(weight, fmt, grid).sum() < gain * errors(weight, fmt, plain).sum()
    if name == "nvfp4a16":
        torch.testing.assert_close(grid.parts["scale_super"][0, 0], 256 * 6 / weight.abs().max())
        assert int(grid.parts["scale"].max()) <= 126


def test_four_six_picks_four_by_hand() -> None:
    """Block maximum 4 with values 3 and 2: at 6 they fall between levels, at 4 they are levels."""
    fmt = parse_format("e2m1a16-g16")
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0] * 4, [6.0, 4.0, 3.0, 2.0] * 4])
    assert four_six(weight, fmt).scale.tolist() == [[1.0], [1.0]]
    assert float(minmax(weight, fmt).scale[0, 0]) == pytest.approx(2 / 3, rel=2**-8)


@pytest.mark.parametrize("name", ["mxfp4a16", "nf4", "w4a16-g16"])
def test_four_six_refuses_other_grids(name: str) -> None:
    with pytest.raises(ValueError, match=r"e\.g\. nvfp4a16"):
        four_six(weights(), parse_format(name))
    assert "use nvfp4a16" in str(METHODS["four-six"].formats(parse_format(name)))


def test_fitters_refuse_what_they_cannot_fit() -> None:
    with pytest.raises(ValueError, match="it fits integer grids"):
        imatrix(weights(), torch.ones(192), parse_format("nf4"), 3)
    with pytest.raises(ValueError, match="not spread over a range"):
        range_grid(torch.zeros(3, 4), torch.ones(3, 4), parse_format("lut3a16-g48"))


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    weight = weights(11).double()
    x = (random(900, 48, seed=1) @ random(48, 192, seed=2) / 7 + 0.3 * random(900, 192, seed=3)).double()
    return weight, x.T @ x / 900


def eliminated(weight: torch.Tensor, hessian: torch.Tensor, fmt: Format, grid: Grid) -> torch.Tensor:
    """Column by column with the inverse Hessian written out; every column is rounded by `encode` on the whole grid."""
    w, codes = weight.clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(192, dtype=torch.float64))
    for j in range(192):
        codes[:, j] = encode(w, fmt, grid.scale, grid.offset, grid.levels)[:, j]
        value = decode(fmt, {"codes": codes, **grid.parts})[:, j].double()
        w -= torch.outer(w[:, j] - value, inverse[j] / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return codes


LEVELLED = ["e2m1a16-g48", "nvfp4a16", "nf4a16-g48-dq", "tern2a16-whole", "bcq2a16-g48-asym", "lut3a16-g96", "e4m3a16-b4x48"]


@pytest.mark.parametrize("name", LEVELLED)
def test_feedback_over_levels_equals_explicit_elimination(name: str) -> None:
    fmt, (weight, hessian) = parse_format(name), problem()
    grid = minmax(weight, fmt)
    got = feedback(weight, hessian, column_rounder(fmt, grid, 192, torch.float64), 0.01, act_order=False).codes
    # fp32 in `encode` and fp64 in the sweep part at a tie now and then, and everything after it in that row.
    assert (got == eliminated(weight, hessian, fmt, grid)).float().mean() > 0.97
    plain, swept = (decode(fmt, payload(codes, grid)) - weight.float() for codes in (nearest(weight, fmt, grid)["codes"], got))
    assert ((swept @ hessian.float()) * swept).sum() < ((plain @ hessian.float()) * plain).sum()


def test_a_stack_of_several_kinds_rounds_every_part_as_alone() -> None:
    weight, hessian = problem()
    names = ["w4a16-g48-asym", *LEVELLED, "w3a16-g16"]
    stack = [(parse_format(name), minmax(weight, parse_format(name))) for name in names]

    def swept(parts: list[tuple[Format, Grid]]) -> Rounded:
        return feedback(weight.repeat(len(parts), 1), hessian, stacked_rounder(parts, 192, torch.float64), 0.01)

    together = swept(stack).codes.chunk(len(names))
    for part, codes in zip(stack, together, strict=True):
        assert (codes == swept([part]).codes).float().mean() > 0.99
