"""Kernels of other CPUs than this one: what oneDNN does not compute, or not exactly, below an instruction set is refused and not run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from methods.formats.format import parse_format
from profilers import target as targets
from profilers.kernels import dense, gate, int8_token
from profilers.kernels.catalogue import supported
from profilers.kernels.dense import Dense
from profilers.kernels.int8_token import Int8Token
from profilers.kernels.low_rank import LowRank
from profilers.kernels.payloads import random_payload
from profilers.target import Target, local_cpu

FORMATS = ("bf16", "w8a8-token", "bf16-r24")
ABLE = {"capabilities": frozenset({"avx512_vnni", "avx512_bf16"}), "compute_dtype": "bf16"}


def _agree(target: Target) -> list[str]:
    """The kernels that run a few formats on a target; raises AssertionError for one that does not compute what its format says."""
    ran = []
    for name in FORMATS:
        fmt = parse_format(name)
        payload = random_payload(fmt, 40, 192, torch.Generator().manual_seed(0))
        for m in (1, 17):
            x = torch.randn(m, 192, generator=torch.Generator().manual_seed(m)).to(target.dtype)
            for kernel in supported(fmt, 40, 192, m, target):
                assert gate.check(kernel.prepare(fmt, payload, target, m=m), fmt, payload, x) is None, (kernel.name, name, m)
                ran.append(kernel.name)
    return ran


def test_a_target_multiplies_in_what_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_cpu_model", lambda: ("a CPU", frozenset({"avx2", "avx512bw", "avx512_bf16", "amx_bf16"})))
    for able, dtype, kept in ((True, "bf16", {"avx512_bf16", "amx_bf16"}), (False, "fp32", set())):
        monkeypatch.setattr(targets, "multiplies_bf16", lambda able=able: able)
        found = local_cpu(1)
        assert found.compute_dtype == dtype and found.capabilities == {"avx2", "avx512bw"} | kept


def test_bf16_that_onednn_does_not_pack_is_multiplied_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(dense, "_reordered", lambda *_: pytest.fail("packed"))
    target, fmt = replace(local_cpu(1), compute_dtype="bf16"), parse_format("bf16")
    assert "packs no bf16" in str(Dense(prepacked=True).supports(fmt, 40, 192, 1, target))
    assert Dense(prepacked=True).supports(fmt, 40, 192, 1, replace(target, compute_dtype="fp32")) is None
    assert Dense(prepacked=True).supports(fmt, 40, 192, 1, replace(target, present=False)) is None
    assert LowRank().supports(parse_format("bf16-r24"), 40, 192, 1, target) is None
    ran = _agree(target)
    assert "dense" in ran and "low-rank" in ran and "dense-prepacked" not in ran


def test_int8_products_that_saturate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of products are added in 16 bits, of inputs that were moved to 0..255."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products = (a.int() + 128)[:, None] * b.t().int()[None]
        pairs = products.view(*products.shape[:2], -1, 2).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - 128 * b.t().int().sum(-1)).to(torch.int32)

    fmt, target = parse_format("w8a8-token"), replace(local_cpu(1), **ABLE)  # type: ignore[arg-type]
    try:
        for product, exact in ((saturating, False), (lambda a, b: a.int() @ b.int(), True)):
            int8_token.sums_exactly.cache_clear()
            monkeypatch.setattr(torch, "_int_mm", product)
            refused = Int8Token().supports(fmt, 40, 192, 1, target)
            assert (refused is None) == exact and (exact or "not exact" in str(refused))
            assert Int8Token().supports(fmt, 40, 192, 1, replace(target, present=False)) is None
    finally:
        int8_token.sums_exactly.cache_clear()


@pytest.mark.parametrize("most", ["SSE41", "AVX2", "AVX512_CORE"])
def test_kernels_agree_under_other_instruction_sets(most: str) -> None:
    script = "from tests.profilers.test_instructions import _agree; from profilers.target import local_cpu; print(_agree(local_cpu(1)))"
    held = {**os.environ, "ONEDNN_MAX_CPU_ISA": most, **({"ATEN_CPU_CAPABILITY": "default"} if most == "SSE41" else {})}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=held, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-600:]
    assert "'dense'" in done.stdout
