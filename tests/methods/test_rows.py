"""Rows of stored weights times powers of two: exact in every format that keeps its rows apart, refused by name in the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.catalogue import apply
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed, decode
from methods.formats.rows import lifted
from methods.formats.sides import columns, elements, low_rank
from methods.formats.turns import POWER
from methods.method import SiteView, Stats
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision

D_OUT, D_IN = 6, 512
SITE = Site("up", "up", 0, (LayerSpec("up", "up", 0, D_IN, D_OUT),))
POWERS = torch.tensor([0, 3, 1, 0, 7, 2], dtype=torch.int8)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(fmt: str, method: str = "rtn", **knobs: bool | float | str) -> Compressed:
    sample = random(64, D_IN, seed=1)
    sample[:, 5] *= 20
    known = Stats(
        64,
        hessian=sample.T @ sample / 64,
        abs_max=sample.abs().amax(0),
        range=torch.stack(sample.aminmax(dim=0)),
        sample=sample,
        first=sample[:4],
    )
    view = SiteView(SITE, {"up": 0.05 * random(D_OUT, D_IN, seed=0)})
    return apply(view, {"up": known}, Decision.of(method, format=fmt, **knobs)).linears["up"]


def check(before: Compressed) -> None:
    after = lifted(before, POWERS)
    assert torch.equal(after.dense, before.dense * torch.exp2(POWERS.float())[:, None])
    assert torch.equal(decode(after.format, after.payload), after.dense)
    assert {name: (t.dtype, t.shape) for name, t in after.payload.items()} == {
        name: (t.dtype, t.shape) for name, t in before.payload.items()
    }


APART = ["bf16", "fp32", "fp16", "w4a16-g64", "w3a16-g32-asym", "w8a8-token", "fp8-token", "mxfp4a16", "q4_k", "q6_k", "q3_k"]
APART += ["q8_0", "q4_1", "nf4a16-g64", "lut3a16-g64", "bcq2a16-g64-asym", "w4a16-g16-u4", "w4a8-g64-fp16-asym", "tern2a16-g64"]


@pytest.mark.parametrize("fmt", APART)
def test_formats_that_keep_rows_apart(fmt: str) -> None:
    before = made(fmt)
    assert before.format.lifts
    check(before)


@pytest.mark.parametrize(
    "fmt",
    ["fp8-tensor", "e2m3ae4m3-b16x64-fp32", "nvfp4a16", "nf4-dq", "tern2a16-whole", "lut3a16-whole", "w3a16-g16-bi3-asym"],
)
def test_formats_whose_rows_share_scales_are_refused(fmt: str) -> None:
    before = made(fmt)
    assert not before.format.lifts
    with pytest.raises(ValueError, match=f"^{before.format.name} has scales that several rows share$"):
        lifted(before, POWERS)


def test_low_rank_and_zeros() -> None:
    low, sparse = parse_format("bf16-r16"), parse_format("bf16-s50")
    check(Compressed.of(low, {"up": random(D_OUT, 16, seed=2).bfloat16(), "down": random(16, D_IN, seed=3).bfloat16()}))
    check(Compressed.of(sparse, {"weight": random(D_OUT, D_IN, seed=2).relu().bfloat16()}))


def test_what_stands_beside_the_grid() -> None:
    before, weight = made("w4a16-g64"), random(D_OUT, D_IN, seed=4)
    kept = random(D_OUT, D_IN, seed=5) > 1
    beside = {**elements(weight, kept), **low_rank(random(D_OUT, 3, seed=6), random(3, D_IN, seed=7))}
    check(Compressed.of(before.format, {**before.payload, **beside}))
    check(Compressed.of(before.format, {**before.payload, **columns(weight, torch.tensor([3, 500]))}))
    own = torch.arange(D_IN).remainder(3).to(torch.int8)
    check(Compressed.of(before.format, {**before.payload, POWER: own}))


@pytest.mark.parametrize(
    ("method", "fmt"),
    [
        ("rex", "w4a16-g64"),
        ("olive", "w4a16-g64"),
        ("block-hadamard", "mxfp4a4"),
        ("static", "w8a8-tensor"),
        ("llm-int8", "w8a8-token"),
    ],
)
def test_what_methods_leave_beside_the_grid(method: str, fmt: str) -> None:
    before = made(fmt, method)
    assert any("." in part for part in before.payload)
    check(before)


def test_rotations_of_the_outputs_and_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"turn\.left_a mixes rows"):
        lifted(made("w4a16", "quip"), POWERS)
    before = made("w4a16-g64")
    with pytest.raises(ValueError, match=r"other\.part mixes rows"):
        lifted(replace(before, payload={**before.payload, "other.part": torch.ones(1)}), POWERS)


@pytest.mark.parametrize(("fmt", "part", "value"), [("w4a16-g64-fp16", "scale", 1000.0), ("fp16", "weight", 1000.0)])
def test_what_leaves_the_range_is_refused(fmt: str, part: str, value: float) -> None:
    before = made(fmt)
    large = Compressed.of(before.format, {**before.payload, part: torch.full_like(before.payload[part], value)})
    with pytest.raises(ValueError, match=f"{part} times 128 leaves the range of float16"):
        lifted(large, POWERS)


def test_exponents_that_leave_their_range_are_refused() -> None:
    before = made("mxfp4a16")
    with pytest.raises(ValueError, match="scale leaves the range of e8m0"):
        lifted(Compressed.of(before.format, {**before.payload, "scale": torch.full_like(before.payload["scale"], 250)}), POWERS)
