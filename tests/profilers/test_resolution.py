"""What a target's name stands for here, and tables of machines that are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from profilers import stored, sweep
from profilers.datasheets import DATASHEETS, sheet_of
from profilers.resolution import listing, look_up, resolve
from profilers.roofline import IDEAL, POOR, linear
from profilers.table import Check, KernelKey, LatencyTable, Row, TableError
from profilers.target import TargetError, cuda_capabilities, local_cpu
from tests.profilers.machines import GPU, HERE, THERE, cell, table_of


def test_the_cpu_is_here() -> None:
    assert resolve("cpu", (), threads=1) == HERE
    with pytest.raises(TargetError, match="--threads 0: "):
        local_cpu(0)


def test_unknown_and_absent_names_are_refused_in_a_line_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="'abacus': not known here; known targets: cpu, cuda, a100"):
        resolve("abacus", [tmp_path])
    with pytest.raises(TargetError) as caught:
        resolve("a100", [tmp_path])
    assert all(way in str(caught.value) for way in ("search profile", "--devices", "--allow-modelled", "--target cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match="no CUDA device"):
        resolve("cuda", [tmp_path])


def test_a_datasheet_will_do_only_where_it_is_allowed() -> None:
    target = resolve("a100", (), allow_modelled=True)
    assert not target.present and target.label == "modelled" and target.device == "cuda"
    assert {"sm80"} == target.capabilities - cuda_capabilities((7, 5))
    assert target.fingerprint != resolve("h100", (), allow_modelled=True).fingerprint


def test_a_stored_table_makes_an_absent_target(tmp_path: Path) -> None:
    table = table_of(THERE, {cell(96, 64): 1.0})
    stored.write(table, tmp_path / "bigbox.parquet")
    there = resolve("bigbox", [tmp_path])
    assert not there.present and there.fingerprint == THERE.fingerprint and there.label == "measured"
    with pytest.raises(ValueError, match="not here"):
        sweep.measure(there, [cell(96, 64)], table)


def test_a_stored_table_of_this_very_machine_is_this_machine(tmp_path: Path) -> None:
    stored.write(table_of(HERE, {}), tmp_path / "mine.parquet")
    found = look_up("mine", [tmp_path])
    assert found.state == "here" and found.target == replace(HERE, name="mine")


def test_what_the_local_driver_calls_a_device_finds_its_sheet() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA H100 PCIe": None,
        "NVIDIA A100-SXM4-40GB": None,
        "NVIDIA L40": None,
    }
    found = {name: sheet_of(name) for name in names}
    assert {name: sheet and sheet.name for name, sheet in found.items()} == names


def test_every_sheet_has_a_source_and_plausible_numbers() -> None:
    for name, sheet in DATASHEETS.items():
        assert name == sheet.name and sheet.source
        assert 100 < sheet.bandwidth < 10_000 and 50 < sheet.peak["bf16"] < sheet.peak["int8"]
        assert ("fp8" in sheet.peak) == (sheet.capability >= (8, 9))


def test_roofline_by_hand() -> None:
    sheet = DATASHEETS["h100"]
    decode, prefill = (linear(sheet, KernelKey("linear", "bf16", m, 4096, 4096)) for m in (1, 2048))
    n_bytes = 2 * 4096 * 4096 + 2 * 8192
    assert decode.p10_ms == pytest.approx(n_bytes / 3350e6)
    assert prefill.p10_ms == pytest.approx(2 * 2048 * 4096**2 / 989.4e9)
    assert decode.p90_ms == pytest.approx(POOR.start_ms + n_bytes / (POOR.bandwidth * 3350e6))
    assert IDEAL.start_ms == 0 and decode.p10_ms < decode.median_ms < decode.p90_ms
    assert decode.label == prefill.label == "modelled"
    narrow = linear(sheet, KernelKey("linear", "w4a16-g64", 1, 4096, 4096))
    assert 3 < decode.p10_ms / narrow.p10_ms < 4


def test_parquet_keeps_everything_and_says_how_it_was_made(tmp_path: Path) -> None:
    table = table_of(THERE, {cell(96, 64): 1.0, cell(64, 64): 2.0})
    table.add([Row("odd", cell(64, 64), "unsupported", "hash", "too odd")])
    table.add_checks([Check("repeat", "grouped", cell(96, 64), 1.0, 1.1, 99, 0.5)])
    stored.write(table, tmp_path / "t.parquet", {"driver": "550.1", "clock_mhz": 1980})
    again = LatencyTable.read(tmp_path / "t.parquet")
    assert again.rows == table.rows and again.checks[0].ratio == pytest.approx(1.1)
    assert again.header["provenance"] == {"driver": "550.1", "clock_mhz": 1980}
    assert again.header["content_hash"] == stored.content_hash(table.records())
    assert again.path is None


def test_corrupt_foreign_and_future_files_are_refused_in_one_line(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a100.parquet"
    table = table_of(THERE, {cell(96, 64): 1.0})

    def refusal() -> str:
        with pytest.raises(TableError) as caught:
            LatencyTable.read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    path.write_bytes(b"not parquet at all")
    assert "cannot be read" in refusal()
    stored.write(table, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refusal()
    parquet.write_table(pyarrow.table({"x": [1]}), path)
    assert "not a latency table" in refusal()
    stored.write(table, path)
    data = parquet.read_table(path)
    header = json.loads(data.schema.metadata[b"isolatency"])
    for change, message in (
        ({"schema": 99}, "newer than this program"),
        ({"kind": "x"}, "not a latency table"),
        ({"content_hash": ""}, "hash"),
    ):
        parquet.write_table(data.replace_schema_metadata({b"isolatency": json.dumps({**header, **change}).encode()}), path)
        assert message in refusal()
    (state,) = [found for found in listing([tmp_path]) if found.name == "a100"]
    assert state.state == "not here" and "hash" in state.why


def test_tables_of_one_machine_are_merged_and_of_two_are_not(tmp_path: Path) -> None:
    first, second = (
        table_of(THERE, {cell(96, 64): 1.0, cell(64, 64): 2.0}),
        table_of(THERE, {cell(96, 64): 3.0, cell(32, 64): 4.0}),
    )
    merged = stored.merge([first, second])
    assert {key.n: merged.best(key)[1].median_ms for key in merged.keys()} == {32: 4.0, 64: 2.0, 96: 3.0}  # noqa: SIM118
    with pytest.raises(TableError, match="two devices or set-ups"):
        stored.merge([first, table_of(GPU, {})])
    old, new = (table_of(replace(THERE, fingerprint=name, facts={"torch": name, "threads": 1}), {}) for name in ("1.0", "2.0"))
    with pytest.raises(TableError, match=r"they differ in torch 1\.0 in the first, 2\.0 in the second$"):
        stored.merge([old, new])
