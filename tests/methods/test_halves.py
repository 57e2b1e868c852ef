"""Scales that runtimes keep in fp16: what their files hold is what was judged."""

from __future__ import annotations

import pytest
import torch

from methods.formats.format import parse_format
from methods.formats.gguf_blocks import pack_blocks
from methods.formats.halves import LEAST, in_halves
from methods.formats.numerics import Compressed, decode
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest


def compressed(name: str, factors: list[float]) -> Compressed:
    """A weight (rows, 64) whose rows are as large as the factors say, rounded to a format."""
    weight = torch.randn(len(factors), 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(factors)[:, None]
    fmt = parse_format(name)
    return Compressed.of(fmt, nearest(weight, fmt, minmax(weight, fmt)))


@pytest.mark.parametrize("name", ["w8a8-g32", "w4a8-g32", "w4a8-g32-asym", "w8a16"])
def test_scales_below_fp16_are_rounded_and_the_rest_is_as_it_was(name: str) -> None:
    before = compressed(name, [0.05, 3e-5, 1e-6, 1e-9, 0.0])
    after = in_halves(before)
    for role in ("scale", "offset"):
        if role in after.payload:
            assert torch.equal(after.payload[role].half().float(), after.payload[role].float())
            assert torch.equal(after.payload[role][0], before.payload[role][0])
    assert torch.equal(after.payload["codes"][0], before.payload["codes"][0]) and torch.equal(after.dense[0], before.dense[0])
    assert torch.equal(decode(after.format, after.payload), after.dense)
    # half a step of the scale and half a step of the offset away, and not the old codes at a coarser scale
    assert float((after.dense - before.dense).abs().max()) <= 128 * LEAST
    assert not torch.equal(after.payload["scale"], before.payload["scale"]) and in_halves(after) is after


def test_a_weight_that_ggml_could_not_hold_can_be_written_then() -> None:
    before = compressed("w8a8-g32", [0.05, 3e-5])
    with pytest.raises(ValueError, match="is no fp16 number"):
        pack_blocks(before.format, before.payload)
    after = in_halves(before)
    assert pack_blocks(after.format, after.payload).shape == (2, 2 * 34)


@pytest.mark.parametrize("name", ["w8a8-g32", "q4_k", "bf16"])
def test_what_fp16_holds_is_left_alone(name: str) -> None:
    fmt = parse_format(name)
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    found = Compressed.of(fmt, {"weight": weight.bfloat16()} if fmt.dense else nearest(weight, fmt, minmax(weight, fmt)))
    assert in_halves(found) is found
