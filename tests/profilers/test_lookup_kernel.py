"""What the look-up kernel computes with: every level, exactly where integers allow it, and scales down to the least power of two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.formats.elements import levels
from methods.formats.format import parse_format
from methods.formats.numerics import decode, quantize_activation
from profilers.kernels.decoded import Decoded
from profilers.kernels.grouped import PackedLinear
from profilers.kernels.lookup import LookUp
from profilers.kernels.payloads import random_payload
from profilers.target import local_cpu

TARGET = local_cpu(1)
FP32 = replace(TARGET, compute_dtype="fp32")


@pytest.mark.parametrize("name", ("nf4a16", "nf3a8-token", "nl4a8-token", "nl4a16", "e2m1a16", "tern2a8-token"))
def test_a_unit_row_reads_each_level_of_every_code(name: str) -> None:
    fmt = parse_format(name)
    n_levels = len(levels(fmt.element, fmt.bits))
    codes = (torch.arange(16 * 48).view(16, 48) % n_levels).to(torch.uint8)
    payload = {"codes": codes, "scale": torch.full((16, 1), 0.5, dtype=torch.bfloat16)}
    got = LookUp().prepare(fmt, payload, FP32)(torch.eye(48))
    expected = torch.tensor(levels(fmt.element, fmt.bits))[codes.long()].T * 0.5
    # Rounded inputs meet nf levels as 16-bit fractions of the largest; everything else is exact.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if name == "nf3a8-token" else 0)


@pytest.mark.parametrize(
    ("name", "limit"), (("nl4a8-g32", 1e-6), ("e2m1a8-token", 1e-6), ("tern2a8-g48", 1e-6), ("nf4a8-g64", 5e-5))
)
def test_integer_sums_are_exact_where_levels_are_integers(name: str, limit: float) -> None:
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(0)
    payload, x = random_payload(fmt, 72, 576, generator), torch.randn(5, 576, generator=generator)
    got = LookUp().prepare(fmt, payload, FP32)(x).double()
    expected = quantize_activation(x, fmt).double() @ decode(fmt, payload).double().T
    assert float((got - expected).norm() / expected.norm()) < limit


def test_bf16_inputs_meet_levels_of_sixteen_bits() -> None:
    """A level less its own bf16 part is what rounded levels would have lost; code 15 is 1, code 7 is 0."""
    fmt, bf16 = parse_format("nf4a16"), replace(TARGET, compute_dtype="bf16")
    codes = torch.full((16, 32), 7, dtype=torch.uint8)
    codes[:, 0], codes[:, 5] = torch.arange(16), 15
    exact = torch.tensor(levels("nf", 4))
    x = torch.zeros(16, 32, dtype=torch.bfloat16)
    x[:, 0], x[:, 5] = 1, -exact.bfloat16()
    payload = {"codes": codes, "scale": torch.ones(16, 1, dtype=torch.bfloat16)}
    got = LookUp().prepare(fmt, payload, bf16)(x).diagonal().float()
    lost = exact - exact.bfloat16().float()
    assert lost.abs().amax() > 1e-3
    torch.testing.assert_close(got, lost, rtol=2**-8, atol=2**-16)


def test_scales_are_the_least_and_the_largest_power_of_two() -> None:
    fmt = parse_format("mxfp4a16")
    codes = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    payload = {"codes": codes, "scale": torch.tensor([[0, 250]] * 16, dtype=torch.uint8)}
    prepared = LookUp().prepare(fmt, payload, FP32)
    assert torch.equal(prepared.dequant(), decode(fmt, payload)) and prepared.dequant()[:, :32].any()


def test_decoded_shares_the_packed_weight_and_size_is_the_formats() -> None:
    fmt = parse_format("nf4a8-g64")
    payload = random_payload(fmt, 64, 192, torch.Generator().manual_seed(0))
    few = LookUp().prepare(fmt, payload, TARGET)
    many = Decoded().prepare(fmt, payload, TARGET, m=64, like=few)
    assert isinstance(few, PackedLinear) and many.packed is few
    assert few.size_bytes() * 8 == fmt.bits_per_weight(192, 64) * 64 * 192


@pytest.mark.parametrize(
    "name",
    (
        "nf4",
        "nf4-dq",
        "nvfp4a16",
        "mxfp4a8",
        "e2m1a8-g32-e8m0",
        "lut4a16",
        "nf4a16-whole",
        "nf4a6-token",
        "bin1a16",
        "w4a16-g64",
    ),
)
def test_other_tables_are_refused(name: str) -> None:
    assert LookUp().supports(parse_format(name), 64, 192, 1, TARGET) is not None
