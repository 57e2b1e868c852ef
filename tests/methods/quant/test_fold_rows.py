"""Scales as powers of two that the rows before a site take."""

from __future__ import annotations

import pytest
import torch

from methods.catalogue import apply
from methods.formats.format import parse_format
from methods.formats.numerics import quantize_activation
from methods.formats.turns import POWER
from methods.method import NormView, SiteView, Stats
from methods.model.structure import Feed, LayerSpec, Site
from methods.policy import Decision
from methods.quant.fold import Powers, Rows, change, fold, into
from methods.quant.task import scaled
from methods.statistics import edit_error

D_OUT, D_IN = 5, 96
SITE = Site("o", "o", 0, (LayerSpec("o", "o", 0, D_IN, D_OUT),), feed=Feed("v", 0, 16, 16, 2))
"""Six heads of 16 that read three heads of values."""


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_powers_by_hand() -> None:
    rows = Rows(torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([100.0, 30.0, 1.0, 90.0, 2.0, 0.5]))
    # geometric means 8, 1.4 and 0.1: powers 0, round(2.51) and round(6.32), of which an input of 30 has room for 1
    folded = fold(rows, torch.tensor([16.0, 1.4, 0.2, 4.0, 1.4, 0.05]))
    assert folded.power is not None and folded.power.tolist() == [0, 1, 6, 0, 1, 6]
    assert folded.ratio.tolist() == [1, 0.5, 2**-6, 1, 0.5, 2**-6] and not folded.tensors


def test_no_input_outgrows_the_largest_and_silent_ones_are_bounded() -> None:
    largest = torch.tensor([4.0, 0.0, 3.9, 1e-12, 1.0])
    folded = fold(Rows(torch.arange(5), largest), torch.tensor([1.0, 1e-9, 1e-9, 1e-9, 1e-9]))
    assert folded.power is not None and folded.power.tolist() == [0, 15, 0, 15, 2]
    none = fold(Rows(torch.arange(5), torch.zeros(5)), torch.ones(5))
    assert not none.power.any() and not change(SiteView(SITE, {}), none).turns


def test_a_norm_is_taken_before_rows_and_neither_is_refused() -> None:
    norm = NormView("norm", torch.ones(D_IN), None, 0.0)
    assert into(SiteView(SITE, {}, norm), torch.ones(D_IN)) is norm
    found = into(SiteView(SITE, {}), torch.ones(D_IN))
    assert isinstance(found, Rows) and found.row[:17].tolist() == [*range(16), 0] and int(found.row.max()) == 47
    bare = Site("o", "o", 0, SITE.layers)
    with pytest.raises(ValueError, match="no norm that a scale could fold into"):
        into(SiteView(bare, {}), torch.ones(D_IN))


def test_statistics_are_those_of_the_multiplied_inputs() -> None:
    x, power = random(40, D_IN, seed=1), torch.arange(D_IN).remainder(5).to(torch.int8)
    multiplied = x * torch.exp2(power.float())
    own = Powers(power).stats(Stats(40, hessian=x.T @ x / 40, abs_max=x.abs().amax(0), sample=x))
    assert torch.equal(own.sample, multiplied) and torch.equal(own.abs_max, multiplied.abs().amax(0))
    torch.testing.assert_close(own.hessian, multiplied.T @ multiplied / 40)
    assert torch.equal(scaled(Stats(40, sample=x), torch.exp2(-power.float())).sample, multiplied)


@pytest.mark.parametrize("fmt", ["w4a16-g48", "w4a8-g48", "w8a8-token"])
def test_what_is_scored_is_what_the_multiplied_inputs_give(fmt: str) -> None:
    """Decoded for the inputs as they are, and rounded where they are multiplied."""
    x = random(200, D_IN, seed=2) * torch.exp2(random(D_IN, seed=3) * 2)
    view = SiteView(SITE, {"o": random(D_OUT, D_IN, seed=4)})
    stats = {"o": Stats(200, abs_max=x.abs().amax(0), sample=x)}
    edit = apply(view, stats, Decision.of("smoothquant", format=fmt, fold="rows"))
    compressed = edit.linears["o"]
    factor = torch.exp2(compressed.payload[POWER].float())
    assert factor.max() > 2 and torch.equal(factor[:16], factor[16:32])
    plain = {part: tensor for part, tensor in compressed.payload.items() if part != POWER}
    outputs = quantize_activation(x * factor, parse_format(fmt), plain) @ (compressed.dense / factor).T
    wanted = x @ view.weights["o"].T
    expected = float((outputs - wanted).double().square().sum() / wanted.double().square().sum())
    assert edit_error(view, stats, edit).rounded == pytest.approx(expected, rel=1e-4)
