"""Kernels of optional packages: run where those are installed, on this CPU or in Triton's interpreter; the rest everywhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from methods.formats import scales
from methods.formats.format import parse_format
from profilers.kernels import bitsandbytes_nf4, device, gate, gemlite_grouped
from profilers.kernels.bitsandbytes_nf4 import BitsAndBytes, Nf4Linear, from_panels, from_rows, panel_nibbles, row_nibbles
from profilers.kernels.catalogue import CUDA_KERNELS, KERNELS
from profilers.kernels.check_device import payload_of
from profilers.kernels.gemlite_grouped import GemLite, from_words, roomy
from profilers.kernels.kernel import hash_of
from profilers.table import KernelKey, LatencyTable, Row
from profilers.target import Target, cuda_capabilities, local_cpu
from tests.profilers import interpreted_gemlite

CPU = replace(local_cpu(1), compute_dtype="bf16", capabilities=frozenset({"avx512f", "avx512_bf16"}))
GPU = replace(CPU, name="gpu", arch="sm80", present=False, device="cuda", capabilities=cuda_capabilities((8, 0)))


def _installed(package: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: SimpleNamespace())
    monkeypatch.setattr(device, "version_of", lambda _: version)


def _codes(n: int, k: int, bits: int = 4) -> torch.Tensor:
    return torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(n + k), dtype=torch.uint8)


@pytest.mark.parametrize(("entry", "package"), ((BitsAndBytes(), "bitsandbytes"), (GemLite(), "gemlite")))
def test_without_the_package_the_reason_comes_first(
    entry: BitsAndBytes | GemLite, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    here = replace(GPU, present=True)
    assert f"pip install {package}" in (entry.supports(parse_format("bf16"), 64, 64, 1, here) or "")
    assert "pip install" not in (entry.supports(parse_format("bf16"), 64, 64, 1, GPU) or "pip install")


@pytest.mark.parametrize(
    ("version", "right"), (("0.49.9", False), ("0.50.0", True), ("0.50.2.dev0", True), ("1.0", True), ("1", True), ("", False))
)
def test_older_packages_are_refused(version: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed("bitsandbytes", version, monkeypatch)
    reason = BitsAndBytes().supports(parse_format("nf4"), 64, 64, 1, replace(GPU, present=True))
    assert (reason is None) is right, reason
    assert right or "needs bitsandbytes 0.50 or newer" in (reason or "")


@pytest.mark.parametrize(
    ("name", "k", "target", "reason"),
    (
        ("nf4", 192, GPU, None),
        ("nf4-dq", 256, GPU, None),
        ("nf4a16-g64", 192, GPU, None),
        ("nf4a16-g32", 192, GPU, None),
        ("nf4a16", 512, GPU, None),
        ("nf4a16-g48", 192, GPU, "blocks"),
        ("nf4a16", 192, GPU, "blocks"),
        ("nf4a16-g64", 96, GPU, "blocks"),
        ("nf4a8-g64", 192, GPU, "NF4 by row"),
        ("nf3a16-g64", 192, GPU, "NF4 by row"),
        ("w4a16-g64", 192, GPU, "NF4 by row"),
        ("bf16", 192, GPU, "NF4 by row"),
        ("nf4", 192, replace(GPU, capabilities=cuda_capabilities((7, 5))), "sm80"),
        ("nf4", 192, replace(GPU, compute_dtype="fp32"), "bf16"),
        ("nf4a16-g64", 192, replace(CPU, present=False), None),
        ("nf4", 192, replace(CPU, present=False), "rounds scales"),
        ("nf4a16-g64", 192, replace(CPU, present=False, capabilities=frozenset({"avx2"})), "avx512_bf16"),
    ),
)
def test_what_bitsandbytes_takes(name: str, k: int, target: Target, reason: str | None) -> None:
    found = BitsAndBytes().supports(parse_format(name), 64, k, 1, target)
    assert found is None if reason is None else reason in (found or "")
    assert found or "multiple of 32" in (BitsAndBytes().supports(parse_format(name), 40, k, 1, target) or "multiple of 32")


@pytest.mark.parametrize(
    ("name", "k", "reason"),
    (
        ("w2a16-g32", 192, None),
        ("w4a16-g64-asym", 192, None),
        ("w8a16-g128", 256, None),
        ("w8a16", 96, None),
        ("w4a16-g96", 96, None),
        ("w4a16-asym", 192, "offsets"),
        ("w4a16-g64-asym", 64, "offsets"),
        ("w3a16-g64", 192, "bits"),
        ("w4a8-g64", 192, "inputs left alone"),
        ("w4a16-g16", 192, "no power of two"),
        ("w4a16-g96", 192, "no power of two"),
        ("w4a16-g64", 96, "group 64"),
        ("w4a16", 48, "multiple of 32"),
        ("nf4", 192, "integers"),
        ("bf16", 192, "integers"),
    ),
)
def test_what_gemlite_takes(name: str, k: int, reason: str | None) -> None:
    found = GemLite().supports(parse_format(name), 64, k, 1, GPU)
    assert found is None if reason is None else reason in (found or "")
    assert "runs on cuda" in (GemLite().supports(parse_format(name), 64, k, 1, CPU) or "")


def test_versions_change_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({hash_of(__file__), hash_of(__file__, versions=("1",)), hash_of(__file__, versions=("", "1"))}) == 3
    for module in (bitsandbytes_nf4, gemlite_grouped):
        found = set()
        for version in ("", "0.50.2", "0.50.3"):
            monkeypatch.setattr(module, "version_of", lambda _, version=version: version)
            module._hash.cache_clear()
            found.add(module._hash())
        assert len(found) == 3
        monkeypatch.undo()
        module._hash.cache_clear()


def test_a_refused_cell_is_not_missing_until_the_package_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    key = KernelKey("linear", "nf4a16-g64", 1, 64, 192)
    table = LatencyTable(GPU.fingerprint, GPU.description, header={"device": "cuda"})
    table.add(Row(entry.name, key, "unsupported", entry.source_hash, "needs the package") for entry in CUDA_KERNELS)
    assert table.missing([key]) == []
    monkeypatch.setattr(gemlite_grouped, "version_of", lambda _: "99.0")
    gemlite_grouped._hash.cache_clear()
    assert table.missing([key]) == [key]
    monkeypatch.undo()
    gemlite_grouped._hash.cache_clear()
    assert table.missing([key]) == []


def test_adapters_are_tried_last() -> None:
    assert CUDA_KERNELS[-2:] == (GemLite(), BitsAndBytes()) and KERNELS[-1] == BitsAndBytes()


@pytest.mark.slow
def test_asking_adapters_imports_no_package() -> None:
    asks = (
        "import sys; from profilers.kernels.catalogue import kernel; from profilers.target import local_cpu;"
        "from methods.formats.format import parse_format;"
        "[(k.source_hash, k.supports(parse_format('nf4a16-g64'), 64, 192, 1, local_cpu(1)))"
        " for k in map(kernel, ('bitsandbytes', 'gemlite'))];"
        "print({'bitsandbytes', 'gemlite', 'triton'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", asks], cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "set()"


def test_layouts_hold_codes_where_they_are_said_to() -> None:
    codes = _codes(64, 96)
    rows, panels = row_nibbles(codes), panel_nibbles(codes)
    assert rows.shape == (64 * 48, 1) and panels.shape == (64, 48)
    assert int(rows[5 * 48 + 7]) == int(codes[5, 14]) << 4 | int(codes[5, 15])
    # Panel 1, the pair of inputs 6 and 7, outputs 32 + 3 and 32 + 19, the odd input.
    assert int(panels.reshape(2, 48, 32)[1, 3, 7]) == int(codes[35, 7]) | int(codes[51, 7]) << 4
    assert torch.equal(from_rows(rows, (64, 96)), codes) and torch.equal(from_panels(panels), codes)
    assert not torch.equal(from_panels(panels.flip(0)), codes)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_words_are_read_back(bits: int) -> None:
    codes, slots = _codes(6, 64, bits).int(), 32 // bits
    words = sum(codes[:, slot::slots] << (slot * bits) for slot in range(slots))
    assert isinstance(words, torch.Tensor)
    assert torch.equal(from_words(words.T.contiguous(), bits), codes.to(torch.uint8))


def test_scales_have_zeros_behind_them() -> None:
    values = torch.arange(1.0, 7).view(3, 2).T
    found = roomy(values)
    assert torch.equal(found, values) and found.is_contiguous()
    behind = torch.as_strided(found, (16 * 3 + 1024,), (1,), found.numel())
    assert not behind.any()


@pytest.fixture
def nf4() -> BitsAndBytes:
    reason = BitsAndBytes().supports(parse_format("nf4a16-g64"), 64, 192, 1, local_cpu(1))
    if reason is not None:
        pytest.skip(reason)
    return BitsAndBytes()


@pytest.mark.parametrize(
    ("name", "n", "k"),
    (
        ("nf4a16-g64", 96, 192),
        ("nf4a16-g32", 32, 160),
        ("nf4a16-g64", 576, 1536),
        ("nf4a16", 64, 512),
        ("nf4a16-g128", 64, 384),
    ),
)
@pytest.mark.parametrize("m", (1, 3, 33))
def test_bitsandbytes_agrees_with_the_reference(nf4: BitsAndBytes, name: str, n: int, k: int, m: int) -> None:
    fmt = parse_format(name)
    payload = payload_of(fmt, n, k, seed=m)
    generator = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, k, generator=generator).bfloat16(), torch.randn(n, generator=generator)
    assert nf4.supports(fmt, n, k, m, CPU) is None
    prepared = nf4.prepare(fmt, payload, CPU, bias, m=m)
    assert gate.check(prepared, fmt, payload, x, bias) is None
    assert torch.equal(prepared.clone()(x), prepared(x))
    assert torch.equal(prepared(x.view(m, 1, k)), prepared(x).view(m, 1, n))
    assert prepared.size_bytes() == n * k // 2 + 2 * n * fmt.groups(k)


def test_bitsandbytes_takes_the_threads_of_the_target(nf4: BitsAndBytes) -> None:
    fmt = parse_format("nf4a16-g64")
    x, payload, asked = torch.randn(2, 192).bfloat16(), payload_of(fmt, 64, 192), []
    found = []
    for threads in (2, 1):
        prepared = nf4.prepare(fmt, payload, replace(CPU, threads=threads)).clone()
        own = prepared._set_threads
        prepared._set_threads = lambda n, own=own: (asked.append(n), own(n))
        found.append(prepared(x))
    assert asked == [2, 1] and torch.equal(*found)


@pytest.mark.parametrize("name", ("nf4", "nf4a16-g64", "nf4-dq"))
@pytest.mark.parametrize("m", (1, 5))
def test_the_layout_of_cuda_devices(nf4: BitsAndBytes, name: str, m: int) -> None:
    """The same calls as there; for CPUs bitsandbytes unpacks the weight behind them."""
    fmt = parse_format(name)
    n, k = 40, 512
    payload = payload_of(fmt, n, k, seed=m)
    scale = scales.read(fmt, "scale", payload).float().contiguous()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(m)).bfloat16()
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    prepared = Nf4Linear(row_nibbles(payload["codes"]), scale, replace(fmt, codec="fp32"), (n, k), bias, None)
    assert gate.check(prepared, fmt, payload, x, bias) is None
    assert torch.equal(prepared.clone()(x), prepared(x))
    assert prepared.size_bytes() == n * k // 2 + 4 * n * fmt.groups(k)


def test_bitsandbytes_hides_no_values_that_are_not_finite(nf4: BitsAndBytes) -> None:
    fmt = parse_format("nf4a16-g64")
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1, 100] = float("nan")
    got = nf4.prepare(fmt, payload_of(fmt, 64, 192), CPU)(x)
    assert [bool(row.isfinite().all()) for row in got] == [True, False, True]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    for package in ("triton", "gemlite"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with interpreted_gemlite.pool() as pool:
        yield pool


@pytest.mark.parametrize("name", ("w2a16-g32", "w4a16-g64", "w4a16-g64-asym", "w8a16-g64", "w8a16-g32-asym", "w8a16", "w4a16"))
@pytest.mark.parametrize("m", (1, 3, 17))
def test_gemlite_in_the_interpreter(interpreter: ProcessPoolExecutor, name: str, m: int) -> None:
    assert interpreter.submit(interpreted_gemlite.gated, name, 40, 192, m).result() is None


def test_gemlite_reads_a_bit_for_a_bit(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(interpreted_gemlite.weight_bytes, "w4a16-g64-asym", 40, 192).result() == 40 * (96 + 2 * 2 * 3)
    assert interpreter.submit(interpreted_gemlite.weight_bytes, "w2a16-g32", 40, 192).result() == 40 * (48 + 2 * 6) + 4
