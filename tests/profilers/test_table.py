"""The latency table: what it keeps, what it refuses, how it is filled."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from methods.errors import InputError
from profilers import sweep
from profilers.kernels.catalogue import KERNELS
from profilers.kernels.dense import Dense, DenseLinear
from profilers.table import KernelKey, LatencyTable, MissingCell, Row, TableError
from profilers.target import local_cpu
from profilers.timer import Timing, exclusive

TARGET = local_cpu(1)
KEY = KernelKey("linear", "w4a8-g32", 1, 96, 64)


def _row(kernel: str, ms: float, key: KernelKey = KEY) -> Row:
    return Row(kernel, key, "ok", "hash", timing=Timing(ms, ms / 2, ms * 2, 9), size_bytes=7, cpu_ms=ms, load=0.5)


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    rows = [_row("slow", 2.0), _row("fast", 1.0), Row("odd", KEY, "unsupported", "hash", "too odd")]
    table.add(rows)
    again = LatencyTable.open(tmp_path, TARGET)
    assert {row.kernel: row for row in again.rows.values()}.keys() == {"slow", "fast", "odd"}
    assert again.rows["slow", KEY].timing.median_ms == 2.0  # type: ignore[union-attr]
    assert again.rows["odd", KEY] == rows[2]
    assert again.best(KEY)[0] == "fast" and list(again.timings(KEY)) == ["fast", "slow"]
    assert again.reasons(KEY) == {"odd": "too odd"}
    assert list(again.keys()) == [KEY] and again.has(KEY)


def test_the_latest_row_counts(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 2.0)])
    table.add([_row("a", 3.0)])
    assert LatencyTable.open(tmp_path, TARGET).best(KEY)[1].median_ms == 3.0


def test_a_missing_cell_raises_with_what_is_known() -> None:
    table = LatencyTable("f", "a machine")
    with pytest.raises(MissingCell, match=r"no latency of w4a8-g32 at m=1, n=96, k=64 on a machine \(not measured\)"):
        table.best(KEY)
    table.add([Row("odd", KEY, "failed", "hash", "relative error 1.0")])
    with pytest.raises(KeyError, match="odd: relative error"):
        table.best(KEY)


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0), _row("b", 2.0)])
    assert table.path is not None
    whole = table.path.read_text()
    table.path.write_text(whole[:-30])
    again = LatencyTable.open(tmp_path, TARGET)
    assert [row.kernel for row in again.rows.values()] == ["a"]
    again.add([_row("c", 3.0)])
    assert [row.kernel for row in LatencyTable.open(tmp_path, TARGET).rows.values()] == ["a", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda header: {**header, "schema": 99}, "schema 99 is newer"),
        (lambda header: {**header, "kind": "something"}, "not a latency table"),
        (lambda header: {**header, "fingerprint": "0" * 16}, "another machine"),
    ),
)
def test_foreign_headers_are_refused(tmp_path: Path, change, message: str) -> None:
    path = LatencyTable.open(tmp_path, TARGET).path
    assert path is not None
    path.write_text(json.dumps(change(json.loads(path.read_text()))) + "\n")
    with pytest.raises(TableError, match=message) as error:
        LatencyTable.open(tmp_path, TARGET)
    assert "\n" not in str(error.value)


LINES = (b"{not json}", b"[1]", b'{"kernel": "a"}', b'{"kernel": "a", "key": {"op": "linear"}}', b"\xff\x00", b"")


@pytest.mark.parametrize("line", LINES)
def test_a_broken_line_is_left_out_with_a_word_and_gone_afterwards(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0), _row("b", 2.0)])
    assert table.path is not None
    whole = table.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    table.path.write_bytes(b"".join([lines[0], lines[1], line + b"\n", lines[2]]))
    with pytest.raises(InputError, match="line 3"):
        LatencyTable.load(table.path)  # whoever asks whether it is sound is told
    assert LatencyTable.open(tmp_path, TARGET).rows.keys() == table.rows.keys()
    (told,) = caplog.messages
    assert str(table.path) in told and "line 3" in told and "measured again" in told
    assert table.path.read_bytes() == whole
    caplog.clear()
    assert LatencyTable.open(tmp_path, TARGET).rows.keys() == table.rows.keys() and not caplog.messages


def test_a_line_whose_row_was_changed_is_measured_again(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    sweep.measure(TARGET, [KEY], table)
    assert table.path is not None
    lines = table.path.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if '"kernel": "grouped"' in line)
    median = json.loads(lines[at])["timing"]["median_ms"]
    lines[at] = lines[at].replace(str(median), str(median / 100))
    table.path.write_text("\n".join(lines) + "\n")
    again = LatencyTable.open(tmp_path, TARGET)
    assert again.missing([KEY]) == [KEY] and ("grouped", KEY) not in again.rows
    sweep.measure(TARGET, [KEY], again)
    assert LatencyTable.open(tmp_path, TARGET).missing([KEY]) == []


def test_a_table_that_someone_is_writing_is_not_mended_under_him(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0)])
    assert table.path is not None
    table.path.write_bytes(damaged := table.path.read_bytes() + b"{not json}\n")
    with exclusive(tmp_path):
        assert LatencyTable.open(tmp_path, TARGET).rows.keys() == table.rows.keys()
    assert table.path.read_bytes() == damaged


def test_a_file_that_is_mostly_damaged_is_refused(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0)])
    assert table.path is not None
    table.path.write_bytes(table.path.read_bytes() + b"{not json}\n" * 2)
    with pytest.raises(InputError, match="line 3: not JSON"):
        LatencyTable.open(tmp_path, TARGET)


def test_a_table_of_another_machine_is_whole_or_refused(tmp_path: Path) -> None:
    """Nothing can be measured again there."""
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0), _row("b", 2.0)])
    assert table.path is not None
    table.path.write_bytes(table.path.read_bytes() + b"{not json}\n")
    with pytest.raises(InputError, match="line 4: not JSON"):
        LatencyTable.open(tmp_path, replace(TARGET, present=False, table=table.path))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"{TARGET.fingerprint}.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError):
        LatencyTable.open(tmp_path, TARGET)


def test_measure_fills_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    keys = [replace(KEY, format=name) for name in ("w4a8-g32", "bf16", "w4a16-g64")]
    seen: list[tuple[int, int]] = []
    assert sweep.measure(TARGET, keys, table, lambda done, of: seen.append((done, of))) == []
    assert seen == [(3, 3)]
    assert all(table.has(key) for key in keys)
    assert len(table.rows) == len(keys) * len(KERNELS)
    assert table.best(keys[1])[0].startswith("dense")
    row = table.rows["grouped", KEY]
    assert row.timing is not None and row.timing.repeats > 0 and row.cold and row.size_bytes > 96 * 64 // 2
    again = LatencyTable.open(tmp_path, TARGET)
    assert again.missing(keys) == []
    assert sweep.measure(TARGET, keys, again, lambda done, of: seen.append((done, of))) == [] and len(seen) == 1


def test_rows_of_other_kernel_code_are_measured_again(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    sweep.measure(TARGET, [KEY], table)
    table.add([replace(table.rows["grouped", KEY], source="old")])
    assert table.missing([KEY]) == [KEY]


def test_a_budget_leaves_the_rest_and_says_which() -> None:
    table = LatencyTable(TARGET.fingerprint, "here")
    assert sweep.measure(TARGET, [KEY], table, lock_folder=Path("/tmp"), budget_s=-1.0) == [KEY]


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(self: DenseLinear, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], 96)

    monkeypatch.setattr(DenseLinear, "__call__", wrong)
    table = LatencyTable.open(tmp_path, TARGET)
    key = replace(KEY, format="bf16")
    sweep.measure(TARGET, [key], table)
    row = table.rows[Dense().name, key]
    assert row.status == "failed" and "relative error" in row.reason and row.timing is None
    assert not table.has(key)


def test_threads_change_the_fingerprint() -> None:
    assert local_cpu(1).fingerprint != local_cpu(2).fingerprint
    assert local_cpu(1) == TARGET


def test_only_what_changes_timings_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = local_cpu(1).fingerprint
    monkeypatch.setenv("KMP_INIT_AT_FORK", "something")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "false")
    monkeypatch.setenv("OMP_PROC_BIND", "")
    assert local_cpu(1).fingerprint == before
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    assert local_cpu(1).fingerprint != before


def test_a_row_that_was_changed_is_found(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0), _row("b", 2.0)])
    assert table.path is not None
    text = table.path.read_text()
    table.path.write_text(text.replace('"median_ms": 2.0', '"median_ms": 3.0'))
    with pytest.raises(TableError, match="line 3 was changed: its checksum does not fit"):
        LatencyTable.load(table.path)
    without = [{k: v for k, v in json.loads(line).items() if k != "sha256"} for line in text.splitlines()]
    table.path.write_text("".join(json.dumps(line) + "\n" for line in without))
    assert LatencyTable.open(tmp_path, TARGET).rows.keys() == table.rows.keys()  # as earlier versions wrote them


def test_a_run_that_adds_after_another_was_killed_cuts_off_its_torn_line(tmp_path: Path) -> None:
    ours, theirs = (LatencyTable.open(tmp_path, TARGET) for _ in range(2))
    theirs.add([_row("a", 1.0), _row("b", 2.0)])
    assert ours.path is not None
    ours.path.write_text(ours.path.read_text()[:-30])
    ours.add([_row("c", 3.0)])
    assert [row.kernel for row in LatencyTable.open(tmp_path, TARGET).rows.values()] == ["a", "c"]
    theirs.refresh()
    assert {row.kernel for row in theirs.rows.values()} == {"a", "b", "c"}


def test_reading_leaves_the_file_alone_that_another_run_is_writing(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0)])
    assert table.path is not None
    torn = table.path.read_text()[:-10]
    table.path.write_text(torn)
    assert LatencyTable.open(tmp_path, TARGET).rows == {}
    assert table.path.read_text() == torn


def test_a_full_disk_leaves_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = LatencyTable.open(tmp_path, TARGET)
    table.add([_row("a", 1.0)])
    assert table.path is not None
    before = table.path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("profilers.table.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        table.add([_row("b", 2.0)])
    assert raised.value.filename == str(table.path) and table.path.read_text() == before


def test_what_another_run_measured_meanwhile_is_not_measured_again(tmp_path: Path) -> None:
    ours, theirs = (LatencyTable.open(tmp_path, TARGET) for _ in range(2))
    sweep.measure(TARGET, [KEY], theirs)
    seen: list[tuple[int, int]] = []
    assert sweep.measure(TARGET, [KEY], ours, lambda done, of: seen.append((done, of))) == []
    assert seen == [] and ours.rows.keys() == theirs.rows.keys()
