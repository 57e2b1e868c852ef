"""Sweeps of a device: plans of cells, budgets, repeats and drift, killed and gone on with; and the CUDA timer on a device that is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from profilers import campaign, cuda_timer
from profilers.campaign import REFERENCE, main, sweep
from profilers.checks import problems, summary
from profilers.clocks import Clocks
from profilers.duration import parse_duration
from profilers.plan import MODELS, by_shape, cells, log_uniform, read_shapes
from profilers.table import Check, KernelKey, LatencyTable, Row, header_of
from profilers.target import Target, local_cpu
from profilers.timer import Timing
from tests.profilers.machines import FakeDevice

TARGET = local_cpu(1)
SHAPES = [(96, 64), (192, 64), (64, 96)]


def test_a_plan_has_both_phases_first_and_formats_that_divide() -> None:
    keys = cells(SHAPES, ("bf16", "w4a8-g64"), (1, 8, 512))
    assert [key.m for key in keys if key.n == 96] == [1, 1, 512, 512, 8, 8]
    assert {key.k for key in keys if key.format == "w4a8-g64"} == {64}
    assert [len(group) for group in by_shape(keys)][:3] == [2, 2, 1]


def test_log_uniform_shapes_are_multiples_of_64_and_spread() -> None:
    shapes = log_uniform(60)
    sides = sorted(side for shape in shapes for side in shape)
    assert len(set(shapes)) == 60 and (192, 576) in shapes and all(side % 64 == 0 for side in sides)
    assert sides[0] == 192 and 1000 < sides[len(sides) // 2] < 3000 and sides[-1] > 12000
    assert shapes == log_uniform(60) != log_uniform(60, seed=1)


def test_models_have_the_shapes_that_people_know() -> None:
    assert MODELS["llama-3.1-8b"].shapes() == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
    assert MODELS["smollm2-135m"].shapes() == [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]


def test_shapes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.txt"
    path.write_text("# outputs inputs\n1536 576\n576,1536  # down\n\n192x576\n")
    assert read_shapes(path) == [(1536, 576), (576, 1536), (192, 576)]
    path.write_text("1536 576\nwide\n")
    with pytest.raises(ValueError, match="line 2, 'wide'"):
        read_shapes(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no shapes"):
        read_shapes(path)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2min", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", "soon", "0s", ""])
def test_durations_without_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--budget"):
        parse_duration(text)


class Fake:
    """`measure` without kernels: every cell takes `ms`, a second of time passes, and the calls are kept."""

    def __init__(self) -> None:
        self.now, self.ms, self.calls = 0.0, 1.0, []

    def __call__(self, target: Target, keys: list[KernelKey], table: LatencyTable, **_: object) -> list[KernelKey]:
        self.now += 1.0
        self.calls.append((keys[0], table.path is None and table.header.get("kind") is not None))
        table.add(
            Row("grouped", key, "ok", "", timing=Timing(self.ms, self.ms, self.ms, 5), size_bytes=10, load=0.2) for key in keys
        )
        return []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(campaign, "measure", made)
    monkeypatch.setattr(LatencyTable, "missing", lambda self, keys: [key for key in keys if not self.has(key)])
    monkeypatch.setattr(campaign, "_to_repeat", lambda key, _: key.n == 96)
    return made


def table() -> LatencyTable:
    return LatencyTable(TARGET.fingerprint, TARGET.description, header=header_of(TARGET))


def test_how_many_cells_are_measured_again_is_asked_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = cells([(192, 64 * i) for i in range(1, 13)], ("bf16",), (1, 2))
    monkeypatch.undo()
    monkeypatch.setattr(campaign, "measure", fake)
    counts = []
    for repeated in (1, 3):
        found = table()
        sweep(TARGET, keys, found, repeated=repeated, now=lambda: fake.now)
        counts.append(sum(check.kind == "repeat" for check in found.checks))
    assert counts[0] == len(keys) and 2 <= counts[1] <= 2 * len(keys) // 3


def test_a_sweep_measures_repeats_and_looks_at_the_reference(fake: Fake) -> None:
    found, seen = table(), []
    keys = cells(SHAPES, ("bf16",), (1, 2))
    assert sweep(TARGET, keys, found, progress=lambda done, of: seen.append((done, of)), now=lambda: fake.now) == []
    assert [key for key, _ in fake.calls] == [REFERENCE, *keys, keys[0], keys[3], REFERENCE]
    assert [check.kind for check in found.checks] == ["drift", "repeat", "repeat", "drift"]
    assert seen == [(k, 6) for k in range(1, 7)] and problems(found) == []
    assert "2 cells measured twice" in summary(found) and "they agree" in summary(found)
    calls = len(fake.calls)
    assert sweep(TARGET, keys, found, now=lambda: fake.now) == [] and len(fake.calls) == calls


def test_a_budget_leaves_the_rest_for_the_next_slice(fake: Fake) -> None:
    found, keys = table(), cells(SHAPES, ("bf16",), (1, 2, 4))
    left = sweep(TARGET, keys, found, budget_s=4.0, now=lambda: fake.now)
    assert 0 < len(left) < len(keys) and left == keys[len(keys) - len(left) :]
    while left:
        begun = fake.now
        left = sweep(TARGET, keys, found, budget_s=4.0, now=lambda begun=begun: fake.now - begun)
    assert all(found.has(key) for key in keys)


def test_a_device_that_drifts_or_does_not_repeat_fails_its_checks(fake: Fake) -> None:
    found, keys = table(), cells(SHAPES, ("bf16",), (1,))
    sweep(TARGET, keys[:1], found, now=lambda: fake.now)
    found.checks[:] = found.checks[:1]
    fake.ms = 1.3
    sweep(TARGET, keys, found, now=lambda: fake.now)
    said = " ".join(problems(found))
    assert "0 of 1 cells with small weights agree within 10% (worst 30%)" in said
    assert "reference cell changed by 30%" in said


def test_a_busy_machine_is_told() -> None:
    found = table()
    found.add_checks(
        Check("repeat", "grouped", cells(SHAPES, ("bf16",), (m,))[0], 1.0, 1.0, 10, load) for m, load in ((1, 5.0), (2, 4.0))
    )
    assert problems(found) == ["the machine's load was 5.0"]


def test_cells_larger_than_the_memory_are_left_out() -> None:
    small = replace(TARGET, memory_bytes=64 << 20)
    assert campaign.fits(small, KernelKey("linear", "bf16", 1, 1024, 1024))
    assert not campaign.fits(small, KernelKey("linear", "bf16", 1, 4096, 1024))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "gpt-9"], "--models gpt-9: not known"),
        (["--rows", "1,x"], "whole numbers"),
        (["--budget", "10"], "no unit"),
        (["--target", "a100"], "not here"),
        (["--shapes", "/nowhere"], "/nowhere"),
        (["--formats", "int4"], "unknown format"),
    ],
)
def test_bad_flags_of_the_sweep(tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    assert main(["--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sweep: ") and message in error


@pytest.mark.slow
def test_a_killed_sweep_loses_at_most_the_cell_in_flight(tmp_path: Path) -> None:
    """Killed once a few cells are there; the same command keeps them all and finishes."""
    shapes = tmp_path / "shapes.txt"
    shapes.write_text("".join(f"{64 * n} 64\n" for n in range(1, 7)))
    command = [sys.executable, "-m", "profilers.sweep", "--out", str(tmp_path), "--shapes", str(shapes), "--plan", "0"]
    command += ["--formats", "bf16,w4a8-g64", "--rows", "1", "--threads", "1", "--target", "cpu"]
    path = tmp_path / f"{TARGET.fingerprint}.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    while process.poll() is None and (not path.exists() or path.read_text().count('"ok"') < 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {line for line in path.read_text().splitlines()[1:] if line.endswith("}") and '"status"' in line}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    after = path.read_text().splitlines()
    assert before and before <= set(after)
    found = LatencyTable.read(path)
    assert len({key for key in found.keys() if key.op == "linear"}) == 12  # noqa: SIM118  # not a mapping
    assert found.header["provenance"]["command"].endswith("cpu")
    rows = [line for line in after if '"status": "ok"' in line and '"w4a8-g64"' in line and '"grouped"' in line]
    assert len(rows) == 6  # none was measured twice


def test_decode_replays_graphs_over_all_copies() -> None:
    device, used = FakeDevice([Clocks(1000.0)] * 2), []
    samples = cuda_timer.decode(
        {"a": [lambda i=i: used.append(i) for i in range(5)], "b": [lambda: None] * 2}, device, rounds=4
    )
    assert device.captures == 2 and used[:5] == [0, 1, 2, 3, 4]
    assert samples["a"].timing().median_ms == pytest.approx(1.0) == pytest.approx(samples["b"].timing().median_ms)
    assert len(samples["a"].all) == 4 and not samples["a"].contended


def test_prefill_takes_the_copies_in_turns() -> None:
    device, used = FakeDevice([Clocks(1000.0)] * 2), []
    samples = cuda_timer.prefill({"a": [lambda i=i: used.append(i) for i in range(2)]}, device, rounds=4)
    assert used[-4:] in ([0, 1, 0, 1], [1, 0, 1, 0]) and samples["a"].timing().repeats == 4
    assert device.captures == 0


def test_a_block_whose_clock_moved_is_dropped_once_and_then_told() -> None:
    moved, steady = [Clocks(1000.0), Clocks(900.0)], [Clocks(1000.0), Clocks(990.0)]
    again = FakeDevice(moved + steady)
    assert not cuda_timer.prefill({"a": [lambda: None]}, again, rounds=3)["a"].contended
    assert again.timed == 3 + 2 * 3
    assert cuda_timer.prefill({"a": [lambda: None]}, FakeDevice(moved * 2), rounds=3)["a"].contended
    hot = [Clocks(1000.0), Clocks(1000.0, held_back=True)]
    assert cuda_timer.prefill({"a": [lambda: None]}, FakeDevice(hot * 2), rounds=3)["a"].contended


def test_copies_of_a_weight_outweigh_the_cache() -> None:
    gpu = replace(TARGET, device="cuda", cache_bytes=50 << 20, memory_bytes=80 << 30)
    large, small = 32 << 20, 10_000
    assert cuda_timer.copies(gpu, large) * large >= 3 * gpu.cache_bytes
    assert cuda_timer.is_cold(gpu, large, cuda_timer.copies(gpu, large))
    assert cuda_timer.copies(gpu, small) == cuda_timer.MOST_COPIES
    assert not cuda_timer.is_cold(gpu, small, cuda_timer.MOST_COPIES)
