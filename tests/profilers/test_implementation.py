"""What a kernel really ran: as oneDNN, the project's library or CUDA's profiler tell, and as the table keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.formats.format import parse_format
from profilers import implementation as names
from profilers import stored, sweep
from profilers.implementation import implementation, implementations, own_code, refusal
from profilers.kernels.build import compiled_for
from profilers.kernels.catalogue import KERNELS
from profilers.kernels.dense import Dense
from profilers.kernels.kernel import Prepared
from profilers.kernels.payloads import random_payload
from profilers.table import SCHEMA, KernelKey, LatencyTable, Row, TableError, header_of
from profilers.target import local_cpu, local_cuda

TARGET = local_cpu(1)
KEY = KernelKey("linear", "bf16", 1, 96, 64)

OLD = "onednn_verbose,exec,cpu,matmul,gemm:jit,undef,src_f32,,,1x64:64x96,0.01"
NEW = """onednn_verbose,v1,info,oneDNN v3.12.0 (commit 80afa71)
onednn_verbose,v1,primitive,info,template:operation,engine,primitive,implementation,prop_kind,exec_time
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:bf16,,,96x64,0.01
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16,,,1x64:64x96,0.01
onednn_verbose,v1,primitive,exec,cpu,gemm_api,,undef,src_s8,,,1x64:64x96,0.01
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16,,,1x64:64x96,0.01
a line of another library, exec,cpu
"""


def prepared(kernel: Any, fmt: str) -> Prepared:
    payload = random_payload(parse_format(fmt), 96, 64, torch.Generator().manual_seed(0))
    return kernel.prepare(parse_format(fmt), payload, TARGET)  # type: ignore[no-any-return]


def test_what_onednn_prints_is_read_in_all_its_versions() -> None:
    assert implementations(NEW) == ["brg_matmul:avx512_core_bf16", "gemm_api"]
    assert implementations(OLD) == ["gemm:jit"] and implementations("") == []


@pytest.mark.skipif(os.name == "nt" or not torch.backends.mkldnn.is_available(), reason="oneDNN does not tell here")
def test_onednn_tells_of_a_call_and_nothing_of_it_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    kernel = Dense(prepacked=True)
    made, x = prepared(kernel, "bf16"), torch.randn(3, 64, dtype=TARGET.dtype)
    made(x)
    os.write(1, b"before\n")
    found = implementation(made, (x,), TARGET)
    os.write(1, b"after\n")
    assert ":" in found and "C++" not in found and "reorder" not in found
    made(x)
    assert capfd.readouterr().out == "before\nafter\n"


def test_a_call_that_fails_leaves_standard_output_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        names.onednn(fails)
    print("still here")  # noqa: T201
    assert capfd.readouterr().out == "still here\n"


def test_own_code_is_told_by_its_instructions() -> None:
    own = {kernel.name: kernel for kernel in KERNELS}
    x = torch.randn(1, 64, dtype=TARGET.dtype)
    assert own_code(prepared(own["grouped"], "w4a8-g32")) == f"C++ for {compiled_for()}"
    assert own_code(prepared(own["decoded"], "w4a16-g32")) == f"C++ for {compiled_for()}"
    assert own_code(prepared(Dense(), "bf16")) == ""
    assert implementation(prepared(own["grouped"], "w4a8-g32"), (x,), TARGET) == f"C++ for {compiled_for()}"


def test_a_reference_is_refused() -> None:
    assert refusal("brg_matmul:avx512_core_bf16 + C++ for AVX2") is None and refusal("") is None
    assert "ref_int8:any" in str(refusal("ref_int8:any + C++ for AVX2"))
    assert refusal("gemm_api, ref:any") == "oneDNN runs its reference implementation ref:any"


def test_a_sweep_keeps_them_and_does_not_time_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []

    def looked(work: Any, inputs: Any, target: Any) -> str:
        looks.append(work)
        return "ref:any" if len(looks) == 1 else "brg_matmul:isa"

    monkeypatch.setattr(sweep, "implementation", looked)
    table = LatencyTable(TARGET.fingerprint, TARGET.description, header=header_of(TARGET))
    sweep.measure(TARGET, [KEY], table, lock_folder=tmp_path)
    found = {row.status: row for row in table.rows.values() if row.implementation}
    assert found["unsupported"].reason == "oneDNN runs its reference implementation ref:any"
    assert found["unsupported"].timing is None and found["unsupported"].implementation == "ref:any"
    assert found["ok"].implementation == "brg_matmul:isa" and len(looks) == 2


def test_real_cells_say_what_ran(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    sweep.measure(TARGET, [KEY, replace(KEY, format="w4a8-g32")], table)
    again = LatencyTable.open(tmp_path, TARGET)
    assert again.rows["grouped", replace(KEY, format="w4a8-g32")].implementation == f"C++ for {compiled_for()}"
    stored.write(again, tmp_path / "t.parquet")
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(tmp_path / "t.parquet").column("implementation").to_pylist()
    assert f"C++ for {compiled_for()}" in column
    assert LatencyTable.read(tmp_path / "t.parquet").rows == again.rows


def test_tables_without_them_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    row = {name: value for name, value in asdict(Row("dense", KEY, "ok", "")).items() if name != "implementation"}
    path.write_text("\n".join(map(json.dumps, [{**header_of(TARGET), "schema": 2}, row])) + "\n")
    assert LatencyTable.read(path).rows["dense", KEY].implementation == ""
    path.write_text(json.dumps({**header_of(TARGET), "schema": SCHEMA + 1}) + "\n")
    with pytest.raises(TableError, match="newer"):
        LatencyTable.read(path)


@pytest.mark.gpu
def test_cuda_kernels_have_names() -> None:
    target = local_cuda()
    assert target is not None
    x = torch.randn(64, 64, device="cuda")
    assert names.cuda_kernels(lambda: x @ x)
