"""Latencies of machines that are not here: stored, between cells, from a sister, from a datasheet, each with its label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from predictors.absent import Elsewhere, label_of, scaled, summed
from profilers import stored
from profilers.datasheets import DATASHEETS
from profilers.label import weakest
from profilers.resolution import resolve
from profilers.roofline import linear
from profilers.table import KernelKey
from tests.profilers.machines import GPU, THERE, cell, table_of, timing


def test_between_cells_is_interpolated_and_beyond_them_nothing_is_said(tmp_path: Path) -> None:
    sizes = [(64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256)]
    stored.write(table_of(THERE, {cell(n, k): 0.01 + 1e-6 * n * k for n, k in sizes}), tmp_path / "bigbox.parquet")
    elsewhere = Elsewhere(resolve("bigbox", [tmp_path]))
    table = elsewhere.table(
        [cell(192, 128), cell(1024, 512), cell(192, 128, m=2), cell(192, 128, fmt="w8a8-g64"), cell(64, 64)]
    )
    kernel, found = table.best(cell(192, 128))
    assert (kernel, found.label) == ("grouped", "interpolated")
    assert found.median_ms == pytest.approx(0.01 + 1e-6 * 192 * 128, rel=1e-3)
    assert found.p10_ms <= found.median_ms <= found.p90_ms
    assert sorted(key.n for key in table.keys()) == [64, 192]  # noqa: SIM118  # not a mapping
    assert table.best(cell(64, 64))[1].label == "measured"


def test_a_datasheet_prices_what_a_kernel_of_the_device_would_run() -> None:
    target = resolve("a100", (), allow_modelled=True)
    keys = [KernelKey("linear", name, 1, 4096, 4096) for name in ("bf16", "w4a16-g64", "fp8-token")]
    table = Elsewhere(target).table(keys)
    assert [table.has(key) for key in keys] == [True, True, False]
    assert table.best(keys[1])[0] == "roofline" and label_of(table, keys) == "modelled"


def test_a_sisters_table_is_rescaled_by_the_datasheets(tmp_path: Path) -> None:
    key = KernelKey("linear", "w4a16-g64", 1, 4096, 4096)
    stored.write(table_of(GPU, {key: 1.0, KernelKey("model-decode-x", "bf16", 1, 512, 32): 3.0}), tmp_path / "h100.parquet")
    target = resolve("h200", [tmp_path])
    assert target.label == "transferred" and target.sister == "h100" and not target.present
    expected = linear(DATASHEETS["h200"], key).median_ms / linear(DATASHEETS["h100"], key).median_ms
    found = Elsewhere(target).table([key, cell(8, 8)])
    assert found.best(key)[1].median_ms == pytest.approx(expected) and 0.7 < expected < 0.9
    assert found.best(key)[1].label == "transferred" and not found.has(cell(8, 8))
    whole = Elsewhere(target).table([KernelKey("model-decode-x", "bf16", 1, 512, 32)])
    (row,) = whole.rows.values()
    assert row.timing is not None and row.timing.median_ms == pytest.approx(3.0 * 3350 / 4800)


def test_a_few_probes_take_the_place_of_datasheets(tmp_path: Path) -> None:
    sizes = [(128 * i, 64) for i in range(1, 8)]
    stored.write(table_of(GPU, {cell(n, k): n * k * 1e-6 for n, k in sizes}), tmp_path / "h100.parquet")
    probes = {cell(n, k): 0.5 * n * k * 1e-6 for n, k in sizes[:5]}
    own = replace(GPU, sheet="h200", fingerprint="2" * 16)
    stored.write(table_of(own, probes), tmp_path / "h200.parquet")
    target = resolve("h200", [tmp_path])
    assert target.label == "measured" and target.sister == "h100"
    found = Elsewhere(target).table([cell(128, 64), cell(896, 64)])
    assert found.best(cell(128, 64))[1].label == "measured"
    beyond = found.best(cell(896, 64))[1]
    assert beyond.label == "transferred" and beyond.median_ms == pytest.approx(0.5 * 896 * 64 * 1e-6)
    assert label_of(found, [cell(128, 64), cell(896, 64)]) == "transferred"


def test_labels_add_up_to_the_weakest() -> None:
    assert weakest(("measured", "modelled", "interpolated")) == "modelled"
    assert weakest(()) == "measured"
    assert scaled(timing(1.0, "modelled"), 2.0).label == "modelled"
    assert scaled(timing(1.0, "interpolated"), 2.0).label == "transferred"
    total = summed([(timing(1.0), 2), (timing(3.0, "interpolated"), 1)])
    assert (total.median_ms, total.p90_ms, total.label) == (pytest.approx(5.0), pytest.approx(6.0), "interpolated")
