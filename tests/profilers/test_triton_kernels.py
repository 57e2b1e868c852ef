"""The Triton kernels through Triton's interpreter, in a process of its own, and compiled for devices that are not here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.profilers import interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

WEIGHT_ONLY = (
    "w2a16-g32", "w2a16-g64-asym", "w3a16-g96", "w3a16-g64-asym", "w4a16-g32-asym", "w4a16-g64", "w5a16-asym", "w6a16-g192-asym",
    "w8a16", "w8a16-g32-asym", "nf4", "nl4a16-g32", "mxfp4a16", "tern2a16-g64", "lut4a16", "lut3a16-g64",
)  # fmt: skip
ROUNDED = ("w2a8-g32-asym", "w4a8-g64", "w4a8-token-g32-asym", "w8a8-g96", "w8a8-token-asym")


@pytest.fixture(scope="module")
def triton() -> Iterator[ProcessPoolExecutor]:
    with interpreted.pool(True) as pool:
        yield pool


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize(("kernel", "m", "parts"), (("few", 3, 1), ("few", 1, 2), ("many", 16, 3), ("many", 33, 1)))
def test_weights_alone(triton: ProcessPoolExecutor, name: str, kernel: interpreted.Name, m: int, parts: int) -> None:
    assert triton.submit(interpreted.gated, kernel, name, "fp32", 20, 192, m, parts).result() is None


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize(("kernel", "m", "parts"), (("few", 3, 2), ("many", 3, 1), ("many", 33, 2)))
def test_with_rounded_inputs(triton: ProcessPoolExecutor, name: str, kernel: interpreted.Name, m: int, parts: int) -> None:
    assert triton.submit(interpreted.gated, kernel, name, "fp32", 20, 192, m, parts).result() is None
    assert triton.submit(interpreted.exact_error, kernel, name, 20, 192, m).result() < 1e-6


@pytest.mark.parametrize(
    ("kernel", "name", "n", "k", "m", "parts"),
    (
        ("few", "w4a16-g64-asym", 9, 576, 8, 4),
        ("few", "w3a16-g128", 17, 1536, 1, 2),
        ("many", "w4a16-g128-asym", 65, 1536, 1, 4),
        ("many", "w2a16-g64", 192, 576, 16, 1),
        ("many", "w4a8-g64", 66, 576, 33, 2),
        ("few", "lut4a16-g64", 9, 576, 1, None),
    ),
)
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_odd_shapes(
    triton: ProcessPoolExecutor, kernel: interpreted.Name, name: str, n: int, k: int, m: int, parts: int | None, dtype: str
) -> None:
    assert triton.submit(interpreted.gated, kernel, name, dtype, n, k, m, parts).result() is None


@pytest.mark.parametrize(("n", "k", "m", "parts"), ((40, 192, 1, 1), (65, 576, 3, 3), (24, 1536, 16, 2), (70, 192, 33, 1)))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_int8_at_any_number_of_tokens(triton: ProcessPoolExecutor, n: int, k: int, m: int, parts: int, dtype: str) -> None:
    assert triton.submit(interpreted.gated, "int8", "w8a8-token", dtype, n, k, m, parts).result() is None


def test_int8_sums_are_exact(triton: ProcessPoolExecutor) -> None:
    assert triton.submit(interpreted.exact_error, "int8", "w8a8-token", 40, 576, 5).result() < 1e-6


@pytest.mark.parametrize("name", ("fp8-token", "fp8-tensor"))
def test_fp8(triton: ProcessPoolExecutor, name: str) -> None:
    for m in (1, 17):
        assert triton.submit(interpreted.gated, "fp8", name, "bf16", 48, 192, m, None).result() is None


@pytest.mark.parametrize("name", ("w8a8-token", "w4a8-g64", "fp8-token"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_inputs_are_rounded_as_the_reference_rounds_them(triton: ProcessPoolExecutor, name: str, dtype: str) -> None:
    assert triton.submit(interpreted.unlike_reference, name, 9, 1344, dtype).result() == 0


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize(
    ("kernel", "name"),
    (
        ("few", "w4a16-g64"),
        ("many", "nf4"),
        ("few", "w4a8-g64"),
        ("many", "w4a8-token-g64"),
        ("int8", "w8a8-token"),
        ("fp8", "fp8-token"),
    ),
)
def test_values_that_are_not_finite_are_not_hidden(
    triton: ProcessPoolExecutor, kernel: interpreted.Name, name: str, bad: float
) -> None:
    assert triton.submit(interpreted.not_finite_rows, kernel, name, bad).result() == [False, True, False]


@pytest.mark.parametrize("name", ("w3a16-g64-asym", "lut4a16"))
def test_few_and_many_tokens_share_the_packed_weight(triton: ProcessPoolExecutor, name: str) -> None:
    shared, apart = triton.submit(interpreted.same_memory, name).result()
    assert shared and apart < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("capability", (80, 89, 90))
def test_kernels_compile_and_fit_into_shared_memory(capability: int) -> None:
    cases: list[tuple[interpreted.Name, str]] = [("few", name) for name in ("w3a16-g64-asym", "w4a8-g64", "lut4a16-g64", "nf4")]
    cases += [("many", name) for name in ("w2a16-g32", "w6a16-g64-asym", "w8a16", "w4a8-g64", "nf4", "lut4a16-g64")]
    cases += [("int8", "w8a8-token"), *([("fp8", "fp8-token")] if capability >= 89 else [])]
    with interpreted.pool(False) as pool:
        for kernel, name in cases:
            for m in (1, 8) if kernel == "few" else (16, 64, 512):
                found = pool.submit(interpreted.shared_memory, kernel, name, m, 576, capability).result()
                assert found and max(found.values()) <= 99 << 10, (kernel, name, m, found)
