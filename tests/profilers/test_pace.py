"""The yardstick, on machines whose pace the tests set, and once on the real one."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from methods.sealed import unsealed
from profilers import end_to_end, sweep
from profilers.pace import LEEWAY, SPAN_S, SPANS, WINDOW, YARDSTICK, Pace, kept_in, yardstick
from profilers.sweep import measure, torch_threads
from profilers.table import KernelKey, LatencyTable, header_of
from profilers.target import local_cpu


def made(seconds, kept: Path | None = None) -> Pace:
    return Pace(iter(seconds).__next__, kept, first_s=0.0)


def test_the_best_is_a_pace_and_not_a_moment() -> None:
    pace = made([*[1.0] * (WINDOW - 1), 0.1, *[1.2] * 5, 1.3])
    assert pace.best_s == 1.0
    assert [pace.full() for _ in range(6)] == [True] * 5 + [False]


def test_a_faster_pace_counts_from_then_on() -> None:
    pace = made([*[2.0] * WINDOW, *[1.0] * WINDOW, 1.0, 2.0])
    assert all(pace.full() for _ in range(WINDOW)) and pace.best_s == 1.0
    assert pace.full() and not pace.full()


def test_a_process_that_starts_on_a_busy_machine_knows_the_best(tmp_path: Path) -> None:
    kept = tmp_path / "pace" / "machine.json"
    assert made(itertools.repeat(1.0), kept).full() and kept_in(kept)[0] == 1.0
    assert not made(itertools.repeat(1.5), kept).full()
    assert kept_in(kept)[0] == 1.0


def watched(paces, kept: Path | None = None) -> tuple[Pace, list[bool]]:
    """A machine of one pace after the other for a span each, and whether it was at its full pace at the end of each."""
    at = {"time": 0.0, "pace": paces[0]}
    pace = Pace(lambda: at["pace"], kept, first_s=0.0, clock=lambda: at["time"])
    full = []
    for at["pace"] in paces:
        full.append([pace.full() for _ in range(2 * WINDOW)][-1])
        at["time"] += SPAN_S
    return pace, full


def test_a_neighbour_that_never_rests_is_the_machines_usual_pace(tmp_path: Path) -> None:
    """Ten seconds are waited for; then what the machine shows is what it has, also in the next process."""
    kept = tmp_path / "machine.json"
    pace, full = watched([1.0, *[1.5, 1.55] * SPANS], kept)
    assert full[0] and not any(full[1 : SPANS // 2]) and all(full[-SPANS:])
    assert pace.usual == pytest.approx(1.5, rel=0.05) and "1.5" in pace.words
    assert pace.limit == LEEWAY * pace.usual
    again = Pace(iter([1.6, 1.9]).__next__, kept)
    assert again.full() and not again.full()


def test_a_machine_that_is_free_again_is_judged_by_its_best_again() -> None:
    pace, _ = watched([1.0, *[1.5] * (2 * SPANS), *[1.0, 1.5, 1.5] * SPANS])
    assert pace.usual == 1.0 and not pace.words


def test_moments_of_the_best_pace_are_waited_for() -> None:
    """A machine that is free in one second out of five is a free one with guests."""
    pace, _ = watched([1.0, *[1.5, 1.5, 1.5, 1.5, 1.0] * SPANS])
    assert pace.usual == 1.0


OTHER = '{"yardstick": "an earlier one", "seconds": 0.1}'


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", OTHER, *(OTHER.replace("an earlier one", YARDSTICK).replace("0.1", s) for s in ("-1", '"x"'))]
)
def test_a_file_that_is_damaged_or_of_another_yardstick_is_made_anew(tmp_path: Path, text: str) -> None:
    kept = tmp_path / "machine.json"
    kept.write_text(text)
    made(itertools.repeat(3.0), kept)
    assert unsealed(kept.read_text(), kept) == {"yardstick": YARDSTICK, "seconds": 3.0, "usual": 1.0}


def test_a_pace_that_was_changed_is_measured_again_and_one_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    kept = tmp_path / "machine.json"
    made(itertools.repeat(3.0), kept)
    assert kept_in(kept) == (3.0, 1.0)
    kept.write_text(kept.read_text().replace("3.0", "0.3"))  # a machine that would never be at its full pace again
    assert kept_in(kept)[0] == math.inf
    assert made(itertools.repeat(3.0), kept).full() and kept_in(kept) == (3.0, 1.0)
    kept.write_text(json.dumps({"yardstick": YARDSTICK, "seconds": 2.0}))
    assert kept_in(kept) == (2.0, 1.0)


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert made(itertools.repeat(1.0), tmp_path / "file" / "machine.json").full()


def test_the_real_yardstick_reads_seconds() -> None:
    """Some 50 µs on a free machine; on a crowded one no bound holds that would say anything."""
    for threads in (1, 2):
        with torch_threads(threads):
            read = yardstick(threads)
            assert 1e-7 < min(read() for _ in range(20)) < 10


def test_a_sweep_asks_for_the_pace_of_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cell whose machine was never at full pace says that it was disturbed."""
    target, asked = local_cpu(2), []
    slow = made([*[1.0] * WINDOW, *itertools.repeat(9.0, 10_000_000)])
    monkeypatch.setattr("profilers.sweep.pace_of", lambda of: asked.append(of) or slow)
    monkeypatch.setattr("profilers.sweep._PATIENCE", 0.01)
    table = LatencyTable("0" * 16, "here", header=header_of(target))
    key = KernelKey("linear", "bf16", 1, 64, 64)
    measure(replace(target, fingerprint="0" * 16), [key], table)
    assert asked and asked[0].threads == 2
    assert all(timing.disturbed for timing in table.timings(key).values())


def test_no_other_test_waits_for_the_machine() -> None:
    """A busy machine makes tests slower, but none of them waits for it to be free."""
    assert sweep.pace_of(local_cpu(1)).full() and end_to_end.pace_of(local_cpu(1)).usual == 1.0
    assert sweep.pace_of(local_cpu(1)) is end_to_end.pace_of(local_cpu(2))
