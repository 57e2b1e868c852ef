"""Every kernel against the reference numerics: formats, odd shapes, biases, both compute dtypes, every code path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode, linear, quantize_activation
from profilers.kernels import gate
from profilers.kernels.build import Isa, NoCompiler, library
from profilers.kernels.catalogue import KERNELS, kernel, refusals, supported
from profilers.kernels.csr import Csr
from profilers.kernels.decoded import Decoded
from profilers.kernels.grouped import Grouped, PackedLinear
from profilers.kernels.kernel import LinearKernel
from profilers.kernels.lookup import LookUp
from profilers.kernels.low_rank import LowRankFused
from profilers.kernels.payloads import random_payload
from profilers.target import local_cpu

FORMATS = (
    "fp32", "fp16", "bf16", "w8a8-token", "w8a16", "w4a16-g32", "w4a16-g64", "w4a16-g64-asym", "w3a16-g16-asym", "w2a16-g48",
    "w8a8-g64", "w4a8-g32-asym", "w3a8-g96", "w3a8-g64-asym", "w2a8-g32-asym", "w2a8-token-g16-asym", "w4a8-token-asym",
    "nf4a16-g64", "nf3a16-g48", "nf4a8-g64", "nl4a8-token", "e2m1a8-token-g32", "mxfp4a16", "tern2a16-g64", "bf16-s90", "fp32-s95",
    "fp16-s99", "bf16-s70", "bf16-r64", "fp32-r24",
)  # fmt: skip
SHAPES = ((40, 192), (576, 192), (72, 576))
TARGET = local_cpu(1)


def _dtype_target(dtype: str):
    return replace(TARGET, compute_dtype=dtype)


def _case(fmt: Format, n: int, k: int, m: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k + m)
    payload = random_payload(fmt, n, k, generator)
    return payload, torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, generator=generator)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_every_kernel_agrees_with_the_reference(name: str, dtype: str) -> None:
    fmt, target = parse_format(name), _dtype_target(dtype)
    ran = set()
    for n, k in SHAPES:
        for m in (1, 3, 17) if fmt.divides(k) else ():
            payload, x, bias = _case(fmt, n, k, m, target.dtype)
            expected = linear(x.float(), decode(fmt, payload), fmt, bias)
            for entry in supported(fmt, n, k, m, target):
                prepared = entry.prepare(fmt, payload, target, bias, m=m)
                assert torch.equal(prepared.dequant(), decode(fmt, payload)), entry.name
                got = prepared(x)
                assert got.dtype == x.dtype and got.shape == (m, n)
                assert _error(got, expected) < gate.tolerance(fmt, x.dtype), (entry.name, n, k, m)
                assert torch.equal(prepared.clone()(x), got), entry.name
                assert prepared.size_bytes() > 0
                ran.add(entry.name)
    assert ran


@pytest.mark.parametrize(
    "name",
    (
        *("w8a8-g64", "w4a8-g32-asym", "w3a8-g64-asym", "w2a8-token-g32", "w8a16", "w4a16-g64-asym", "w3a16-g32"),
        *("nf4a16-g64", "nf3a8-g96", "nl4a8-token", "bf16-s90", "fp32-s90", "bf16-r24", "fp32-r24"),
    ),
)
@pytest.mark.parametrize("isa", ("avx2", "portable"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_forced_code_paths_agree_with_the_reference(name: str, isa: Isa, dtype: str) -> None:
    try:
        lowest = library(isa).isolatency_isa()
    except NoCompiler as error:
        pytest.skip(str(error))
    assert lowest == {"avx2": 1, "portable": 0}[isa]
    fmt, target = parse_format(name), _dtype_target(dtype)
    ran = set()
    for m in (1, 3, 17):
        payload, x, bias = _case(fmt, 72, 192, m, target.dtype)
        expected = linear(x.float(), decode(fmt, payload), fmt, bias)
        for entry in (Grouped(isa), LookUp(isa), Decoded(isa), Csr(isa), LowRankFused(isa)):
            if entry.supports(fmt, 72, 192, m, target):
                continue
            ran.add(type(entry))
            prepared = entry.prepare(fmt, payload, target, bias, m=m)
            assert torch.equal(prepared.dequant(), decode(fmt, payload))
            assert _error(prepared(x), expected) < gate.tolerance(fmt, x.dtype), (entry.name, m)
    assert ran


def test_integer_sums_are_exact_in_fp32() -> None:
    """With int8 activations everything but the scales is integer arithmetic, so the output is the reference's to fp32 rounding."""
    fmt, target = parse_format("w4a8-g64-asym"), _dtype_target("fp32")
    payload, x, _ = _case(fmt, 72, 576, 5, torch.float32)
    got = Grouped().prepare(fmt, payload, target)(x)
    expected = quantize_activation(x, fmt).double() @ decode(fmt, payload).double().T
    assert _error(got, expected) < 1e-6


def test_activations_round_half_to_even_and_zero_groups_stay_zero() -> None:
    fmt, target = parse_format("w8a8-g16"), _dtype_target("fp32")
    payload = {"codes": (torch.eye(32) + 128).to(torch.uint8), "scale": torch.ones(32, 2, dtype=torch.bfloat16)}
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, -127.0])
    got = Grouped().prepare(fmt, payload, target)(x)
    assert got[0, :5].tolist() == [127.0, 0.0, 2.0, -2.0, -127.0]
    assert not got[0, 5:].any()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("w4a8-g32", "w8a8-token", "w4a16-g32", "nf4a16-g64", "nl4a8-g32", "bf16-r64"))
def test_values_that_are_not_finite_are_not_hidden(bad: float, name: str) -> None:
    fmt = parse_format(name)
    payload, x, _ = _case(fmt, 48, 192, 2, TARGET.dtype)
    x[1, 100] = bad
    for entry in supported(fmt, 48, 192, 2, TARGET):
        got = entry.prepare(fmt, payload, TARGET)(x)
        assert torch.isfinite(got[0]).all() and not torch.isfinite(got[1]).any(), entry.name


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    fmt = parse_format("w4a8-g32")
    payload, x, _ = _case(fmt, 40, 192, 6, TARGET.dtype)
    prepared = Grouped().prepare(fmt, payload, TARGET)
    expected = prepared(x)
    assert torch.equal(prepared(x.view(2, 3, 192)), expected.view(2, 3, 40))
    assert torch.equal(prepared(x.T.contiguous().T), expected)
    assert torch.equal(prepared(x.double()), expected)


def test_decoded_shares_the_packed_weight() -> None:
    fmt = parse_format("w3a8-g32-asym")
    payload, x, _ = _case(fmt, 40, 192, 20, TARGET.dtype)
    few = Grouped().prepare(fmt, payload, TARGET)
    many = Decoded().prepare(fmt, payload, TARGET, like=few)
    assert isinstance(few, PackedLinear) and many.packed is few
    assert _error(many(x), few(x)) < 1e-2


@pytest.mark.parametrize(
    ("entry", "name", "m"),
    (
        *((Grouped(), "w4a8-g32-asym", 33), (LookUp(), "nf4a16-g64", 33), (Csr(), "bf16-s90", 33), (Csr(), "fp32-s90", 1)),
        (LowRankFused(), "bf16-r40", 11),
    ),
)
def test_two_threads_compute_the_same(entry: LinearKernel, name: str, m: int) -> None:
    fmt = parse_format(name)
    payload, x, bias = _case(fmt, 200, 192, m, TARGET.dtype)
    one, two = (entry.prepare(fmt, payload, replace(TARGET, threads=n), bias)(x) for n in (1, 2))
    assert torch.equal(one, two)


def test_refusals_say_why() -> None:
    fmt = parse_format("w4a16-g64")
    reasons = refusals(fmt, 40, 96, 1, TARGET)
    assert "does not divide k=96" in reasons["grouped"]
    assert "multiple of 16" in reasons["int4pack"]
    assert set(reasons) == {entry.name for entry in KERNELS}
    assert refusals(parse_format("bf16"), 40, 96, 1, TARGET)["grouped"] == "integer grids only"
    assert "not a multiple of 16" in refusals(parse_format("w8a8-token"), 40, 100, 1, TARGET)["grouped"]


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(isa: Isa = "native") -> None:
        raise NoCompiler("no C++ compiler found")

    monkeypatch.setattr("profilers.kernels.native.library", absent)
    assert kernel("grouped").supports(parse_format("w4a8-g32"), 40, 96, 1, TARGET) == "no C++ compiler found"
    assert supported(parse_format("bf16"), 40, 96, 1, TARGET)


class _Scaled:
    """A kernel gone wrong: its output is off by a factor, or its weights are."""

    def __init__(self, right: PackedLinear, output: float = 1.0, weight: float = 1.0, poison: bool = False) -> None:
        self.right, self.output, self.weight, self.poison = right, output, weight, poison

    def __call__(self, x: Tensor) -> Tensor:
        y = self.right(x) * self.output
        if self.poison:
            y[-1, -1] = float("nan")
        return y

    def dequant(self) -> Tensor:
        return self.right.dequant() * self.weight

    def size_bytes(self) -> int:
        return self.right.size_bytes()

    def clone(self) -> _Scaled:
        return self


@pytest.mark.parametrize(
    ("fault", "reason"),
    (({"output": 1.1}, "relative error"), ({"weight": 1.001}, "does not decode"), ({"poison": True}, "NaN"), ({}, None)),
)
def test_the_gate_stops_wrong_kernels(fault: Mapping[str, float], reason: str | None) -> None:
    fmt = parse_format("w4a8-g32")
    payload, x, bias = _case(fmt, 40, 192, 30, TARGET.dtype)
    prepared = _Scaled(Grouped().prepare(fmt, payload, TARGET, bias), **fault)  # type: ignore[arg-type]
    found = gate.check(prepared, fmt, payload, x, bias)
    assert (found is None) if reason is None else (found is not None and reason in found)
