"""Dense formats with zeros or of low rank: names, costs, payloads, and that no method makes them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from methods import catalogue
from methods.formats.format import Format, parse_format
from methods.formats.gguf_types import block_type
from methods.formats.numerics import Compressed, decode, payload_bits, shape_of
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision
from methods.policy_rules import decisions_of, spec_of
from profilers.kernels.payloads import random_payload

SITE = Site("a site", "o", 0, (LayerSpec("o", "o", 0, 192, 192),))
NAMES = ("bf16-s90", "fp32-s1", "fp16-s99", "bf16-r64", "fp32-r1", "bf16-2of4", "fp16-1of4", "bf16-4of8")


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name: str) -> None:
    fmt = parse_format(name)
    assert fmt.name == name and fmt.thinned and not fmt.plain and not fmt.looked_up
    assert fmt != parse_format(fmt.dense) and not parse_format(fmt.dense).thinned


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            ("bf16-s0", "is written 'bf16'"),
            ("bf16-s05", "is written 'bf16-s5'"),
            ("bf16-s100", "zeros=100"),
            ("bf16-r0", "is written"),
        ),
        *(
            ("bf16-4of4", "zeros=0 of every=4"),
            ("bf16-1of3", "no whole per cent"),
            ("bf16-5of4", "zeros=-25"),
            ("bf16-0of4", "zeros=100"),
        ),
        *(("w4a16-s90", "unknown format"), ("bf16-s90-r64", "unknown format"), ("bf16-s", r"or <dtype>\[-s<per cent")),
    ],
)
def test_other_names_are_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_format(name)


@pytest.mark.parametrize(
    ("fmt", "fields", "message"),
    [
        ("w4a16-g64", {"zeros": 90}, "only fp32, bf16, fp16 have zeros"),
        ("nf4", {"rank": 8}, "rank=8 with a grid"),
        ("bf16-s90", {"rank": 8}, "use one of them"),
        ("bf16", {"rank": -1}, "a rank above 0"),
        ("bf16", {"every": 4}, "such as 2of4"),
    ],
)
def test_formats_that_mean_nothing_are_errors(fmt: str, fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(parse_format(fmt), **fields)  # type: ignore[arg-type]


def test_bits_by_hand() -> None:
    zeros, rank = parse_format("bf16-s90"), parse_format("fp32-r64")
    assert zeros.kept(40, 192) == 768
    assert zeros.bits_per_weight(192, 40) == pytest.approx((768 * (16 + 16) + 41 * 32) / 7680)
    assert zeros.bits_per_weight(192) == pytest.approx(0.1 * 32 + 32 / 192)
    assert rank.bits_per_weight(192, 40) == pytest.approx(64 * (192 + 40) * 32 / 7680)
    assert rank.bits_per_weight(192) == pytest.approx(64 * 32 / 192)
    assert zeros.by_rows and not rank.by_rows
    pairs = parse_format("bf16-2of4")
    assert pairs.bits_per_weight(192, 40) == pytest.approx((2 * 16 + 2 * 2) / 4) == pairs.bits_per_weight(192)
    assert pairs.divides(192) and not pairs.divides(190) and parse_format("bf16-s50").divides(190)


@pytest.mark.parametrize("name", ("bf16-r64", "fp32-r1"))
def test_factors_cost_what_is_stored(name: str) -> None:
    fmt = parse_format(name)
    payload = random_payload(fmt, 40, 192, torch.Generator().manual_seed(0))
    assert payload_bits(fmt, payload) == pytest.approx(fmt.bits_per_weight(192, 40) * 40 * 192)
    assert shape_of(fmt, payload) == (40, 192) == tuple(decode(fmt, payload).shape)


@pytest.mark.parametrize("name", ("bf16-s90", "fp32-s1", "bf16-2of4", "bf16-1of4"))
def test_random_weights_have_the_zeros(name: str) -> None:
    fmt = parse_format(name)
    kept = random_payload(fmt, 40, 192, torch.Generator().manual_seed(0))["weight"] != 0
    assert int(kept.sum()) == fmt.kept(40, 192)
    if fmt.every:
        assert set(kept.view(-1, fmt.every).sum(1).tolist()) == {fmt.kept(1, fmt.every)} and 0 < kept[:, 0].float().mean() < 1


def test_a_product_does_not_depend_on_where_its_factors_lie() -> None:
    fmt = parse_format("fp32-r37")
    payload = random_payload(fmt, 45, 203, torch.Generator().manual_seed(0))
    moved = {name: torch.cat((torch.zeros(3), part.flatten()))[3:].view_as(part) for name, part in payload.items()}
    turned = {name: part.T.contiguous().T for name, part in payload.items()}
    assert torch.equal(decode(fmt, moved), decode(fmt, payload)) and torch.equal(decode(fmt, turned), decode(fmt, payload))


def test_a_product_is_rounded_once() -> None:
    fmt = parse_format("fp32-r37")
    payload = random_payload(fmt, 12, 25, torch.Generator().manual_seed(0))
    up, down = payload["up"].tolist(), payload["down"].T.tolist()
    exact = [[math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in down] for row in up]
    assert torch.equal(decode(fmt, payload), torch.tensor(exact))


@pytest.mark.parametrize("name", NAMES)
def test_no_method_makes_them_and_policies_name_them(name: str) -> None:
    decision = Decision.of("rtn", format=name)
    assert f"no method makes {name} weights yet" in str(catalogue.refuses(SITE, decision))
    with pytest.raises(ValueError, match="no method makes"):
        catalogue.plan(SITE, decision)
    assert decisions_of(spec_of((decision,))) == (decision,)
    assert block_type(parse_format(name)) is None


def test_a_payload_is_what_it_decodes_to() -> None:
    fmt: Format = parse_format("bf16-r64")
    compressed = Compressed.of(fmt, random_payload(fmt, 40, 192, torch.Generator().manual_seed(0)))
    assert compressed.dense.dtype == torch.float32 and torch.equal(compressed.dense, decode(fmt, compressed.payload))
