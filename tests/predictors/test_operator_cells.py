"""Operators between timed batches and lengths, and the rest of a step in a workload that no model was run in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from methods.formats.format import parse_format
from methods.model.describe import describe
from methods.model.structure import Structure
from predictors.absent import Elsewhere, rest_of_step
from predictors.operator_cells import between
from profilers import stored
from profilers.cells import model_key, outside_cells, site_cells, widths_of, workload_of
from profilers.operators import kind_of
from profilers.plan import model_cells, operators
from profilers.resolution import resolve
from profilers.roofline import operator
from profilers.table import KernelKey, Row
from profilers.workload import Workload
from tests.profilers.machines import GPU, THERE, table_of, timing
from tests.tiny import tiny_model

NAME = "attention-9x3x64"
LEFT = 0.25
"""Milliseconds of a step that belong to no cell."""


def row(m: int, n: int, k: int, ms: float, kernel: str = "attend", fmt: str = "kv-bf16") -> Row:
    return Row(kernel, KernelKey(NAME, fmt, m, n, k), "ok", "", timing=timing(ms))


def at(m: int, n: int, k: int) -> KernelKey:
    return KernelKey(NAME, "kv-bf16", m, n, k)


def test_a_context_between_two_is_on_their_line_and_a_batch_too() -> None:
    rows = [row(m, 1, k, m * (1 + k / 64)) for m in (1, 8) for k in (128, 512, 2048)]
    for m, k in ((1, 200), (8, 1024), (3, 128), (5, 1000)):
        ((kernel, found),) = between(rows, at(m, 1, k))
        assert (kernel, found.label) == ("attend", "interpolated")
        assert found.median_ms == pytest.approx(m * (1 + k / 64)) and found.lo_ms == pytest.approx(0.95 * found.median_ms)
    # Between two cells it is their line, not that of all of them.
    ((_, bent),) = between([*rows[:2], row(1, 1, 2048, 100.0)], at(1, 1, 1280))
    assert bent.median_ms == pytest.approx((9 + 100) / 2)


def test_nothing_is_said_beyond_the_timed_cells_or_of_others() -> None:
    rows = [row(m, 1, k, 1.0) for m in (1, 8) for k in (128, 512)]
    assert [list(between(rows, key)) for key in (at(1, 1, 127), at(1, 1, 513), at(9, 1, 128), at(1, 128, 0))] == [[]] * 4
    assert not list(between(rows, replace(at(1, 1, 256), format="kv-int8")))
    assert not list(between(rows, replace(at(1, 1, 256), op="attention-9x3x32")))
    # Of two kernels only one was timed around it.
    assert [kernel for kernel, _ in between([*rows, row(1, 1, 128, 0.5, "sdpa")], at(1, 1, 256))] == ["attend"]
    # A batch of 3 lies between 1 and 8, but 8 was timed up to 512 only.
    assert not list(between([*rows, row(1, 1, 2048, 2.0)], at(3, 1, 1024)))


def test_of_a_prefill_the_time_per_query_is_on_a_line() -> None:
    rows = [row(1, n, 0, 0.5 * n + 0.01 * n * n, "sdpa") for n in (128, 512)]
    ((_, found),) = between(rows, at(1, 300, 0))
    assert found.median_ms == pytest.approx(0.5 * 300 + 0.01 * 300**2)


def test_other_operators_are_lines_in_their_rows() -> None:
    rows = [Row("rms-norm", KernelKey("norm", "bf16", m, 96, 1), "ok", "", timing=timing(2.0 + m)) for m in (1, 512)]
    ((_, found),) = between(rows, KernelKey("norm", "bf16", 100, 96, 1))
    assert found.median_ms == pytest.approx(102.0)
    assert not list(between(rows, KernelKey("norm", "bf16", 100, 48, 1)))


@pytest.fixture(scope="module")
def structure() -> Structure:
    return describe(tiny_model("llama"), "bf16")


def cost(key: KernelKey) -> float:
    """A device's time: of a linear by its products, of attention by what it reads and of a prefill by its square, of others by rows."""
    if key.op == "linear":
        return 1e-5 * key.m * key.n * key.k + 1e-3
    if kind_of(key.op) == "attention":
        return 1e-4 * key.m * (key.k + 3) if key.n == 1 else 1e-6 * key.m * key.n * (key.n + 50)
    return 1e-4 * key.m * key.n


def whole(structure: Structure, workload: Workload) -> float:
    fmt = parse_format(structure.dtype)
    cells = [item for site in structure.sites for item in site_cells(site, fmt, workload.tokens_in_flight)]
    return LEFT + sum(cost(key) * count for key, count in (*cells, *outside_cells(structure, workload, THERE.compute_dtype)))


def elsewhere(folder: Path, structure: Structure, *runs: Workload) -> Elsewhere:
    keys = operators([widths_of(structure)], THERE.compute_dtype)
    keys += model_cells(structure, (), sorted({1, 8, *(run.tokens_in_flight for run in runs)}))
    cells: Mapping[KernelKey, float] = {key: cost(key) for key in keys}
    measured = {model_key(structure, run): whole(structure, run) for run in runs}
    stored.write(table_of(THERE, {**cells, **measured}), folder / "box.parquet")
    return Elsewhere(resolve("box", [folder]))


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (Workload(context=512), Workload(context=700)),
        (Workload(context=512), Workload(context=8192)),
        (Workload(context=512), Workload(batch=8, context=300)),
        (Workload(batch=8, context=2048), Workload(context=129)),
        (Workload("prefill", prompt=512), Workload("prefill", prompt=1000)),
    ],
    ids=lambda load: load.name,
)
def test_another_batch_and_context_from_one_run_and_the_cells(
    tmp_path: Path, structure: Structure, run: Workload, wanted: Workload
) -> None:
    """Exact on a device whose cells are what it takes: attention, norms, embedding, sampling and head change, nothing else does."""
    known = elsewhere(tmp_path, structure, run)
    expected = {
        load: LEFT + sum(cost(k) * n for k, n in outside_cells(structure, load, THERE.compute_dtype)) for load in (run, wanted)
    }
    same = rest_of_step(known, structure, run, THERE.compute_dtype)
    other = rest_of_step(known, structure, wanted, THERE.compute_dtype)
    assert same is not None and other is not None
    assert (same.label, other.label) == ("measured", "interpolated")
    assert same.median_ms == pytest.approx(expected[run]) and other.median_ms == pytest.approx(expected[wanted])
    assert other.lo_ms < other.median_ms < other.hi_ms and abs(other.median_ms / same.median_ms - 1) > 0.05


def test_a_workload_beyond_the_cells_has_no_rest(tmp_path: Path, structure: Structure) -> None:
    known = elsewhere(tmp_path, structure, Workload(context=512))
    for wanted in (Workload(context=64), Workload(context=9000), Workload(batch=16), Workload("prefill")):
        assert rest_of_step(known, structure, wanted, THERE.compute_dtype) is None


def test_the_nearest_run_is_gone_out_from(tmp_path: Path, structure: Structure) -> None:
    runs = [Workload(context=128), Workload(context=2048), Workload(batch=8, context=512)]
    known = elsewhere(tmp_path, structure, *runs)
    assert [run.name for run in known.runs(structure, Workload(context=1024))] == [runs[i].name for i in (1, 0, 2)]
    assert known.runs(structure, Workload(batch=6, context=128))[0] == runs[2]
    assert known.runs(structure, Workload("prefill")) == []
    assert all(workload_of(model_key(structure, run)) == run for run in (*runs, Workload("prefill", 2, prompt=77)))


def test_a_sisters_operators_are_rescaled_by_the_roofline(tmp_path: Path) -> None:
    key = KernelKey("attention-32x8x128", "kv-bf16", 8, 1, 8192)
    stored.write(table_of(GPU, {key: 1.0}), tmp_path / "h100.parquet")
    found = Elsewhere(resolve("h200", [tmp_path])).best(key)
    assert found is not None and found.label == "transferred" and 0.6 < found.median_ms < 0.8
    modelled = Elsewhere(resolve("a100", (), allow_modelled=True))
    assert (
        modelled.best(key) == operator_of("a100", key) and modelled.rows(replace(key, op="model-decode-x", format="bf16")) == []
    )


def operator_of(name: str, key: KernelKey):
    from profilers.datasheets import DATASHEETS

    return operator(DATASHEETS[name], key)
