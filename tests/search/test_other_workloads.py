"""A profile of one workload prices others on another machine: from the run that it holds and the cells of what is no linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from profilers import plan, stored
from profilers.operators import kind_of
from profilers.table import LatencyTable
from search.cli import main
from search.config import ConfigError, RunConfig
from search.pricing import check_priced, price, priced_sites
from search.progress import Progress
from search.session import Session
from search.whole_model import assume_map
from tests.search.run_server import MS_PER_BYTE, fixed_prices
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A tiny model, and its profile as another machine's table: cells for contexts of 16 and 64, a run at 32."""
    folder = tmp_path_factory.mktemp("box")
    save_tiny(folder / "model", "llama")
    command = [
        "profile",
        "--target",
        "cpu",
        "--threads",
        "1",
        "--model",
        str(folder / "model"),
        "--cache",
        str(folder / "cache"),
    ]
    with pytest.MonkeyPatch.context() as patch, fixed_prices():
        patch.setattr(plan, "CONTEXTS", (16, 64))
        patch.setattr(plan, "CACHES", ("kv-int8",))
        patch.setattr("search.profile.PREFILL_ROWS", (64,))
        patch.setattr("search.profile.DECODE_ROWS", (1, 8))
        patch.setattr("search.profile.ROUNDS", 2)
        patch.setattr(plan, "PREFILL_ROWS", (64, 128))
        command += ["--workload", "decode:context=32", "--formats", "w8a8-token", "--out", str(folder / "here.parquet")]
        assert main(command) in (0, 1)  # 1: the table says that the machine was busy
    here = LatencyTable.read(folder / "here.parquet")
    other = LatencyTable("0" * 16, "another CPU", header={**here.header, "fingerprint": "0" * 16})
    other.add(here.rows.values())
    (folder / "devices").mkdir()
    stored.write(other, folder / "devices" / "bigbox.parquet")
    return folder


def dense_step(box: Path, workload: str) -> dict[str, Any]:
    """The map of the absent target in a workload."""
    config = RunConfig(
        model=str(box / "model"), target="bigbox", latency="0.9x", workload=workload, formats=("w8a8-token",), threads=1,
        cache=str(box / "cache"), devices=str(box / "devices"), results=str(box / "results"),
    )  # fmt: skip
    session = Session(config, Progress(quiet=True))
    table = price(session)
    (sites,) = priced_sites(session, table)
    check_priced(session)
    return assume_map(session, table, sites, config.load)


def test_a_profile_holds_what_is_no_linear(box: Path) -> None:
    table = LatencyTable.read(box / "here.parquet")
    kinds = {kind_of(key.op) for key in table.keys()}  # noqa: SIM118  # not a mapping
    assert {"attention", "norm", "embedding", "sampling", "linear"} < kinds
    attention = {(key.format, key.m, key.n, key.k) for key in table.keys() if kind_of(key.op) == "attention"}  # noqa: SIM118
    dense = f"kv-{table.header['compute_dtype']}"
    assert attention == {
        (name, *cell)
        for name in (dense, "kv-int8")
        for cell in ((1, 1, 16), (1, 1, 32), (1, 1, 64), (8, 1, 16), (8, 1, 64), (1, 64, 0), (1, 128, 0))
    }


def test_another_context_is_the_run_and_the_bytes_of_the_cache_between(box: Path) -> None:
    """The stopwatch reads bytes, so from 32 to 48 tokens a step grows by 16 keys and values in each of three layers."""
    here, there = dense_step(box, "decode:context=32"), dense_step(box, "decode:context=48")
    header = LatencyTable.read(box / "here.parquet").header
    n_bytes = 3 * 16 * 2 * 3 * 16 * (2 if header["compute_dtype"] == "bf16" else 4)
    assert there["dense_ms"][0] - here["dense_ms"][0] == pytest.approx(1.002 * MS_PER_BYTE * n_bytes, rel=1e-3)
    assert (here["label"], there["label"]) == ("measured", "interpolated")


def test_a_larger_batch_is_priced_from_the_same_run(box: Path) -> None:
    ms = [dense_step(box, f"decode:batch={batch},context=32")["dense_ms"][0] for batch in (1, 8)]
    assert ms[1] > ms[0]


def test_beyond_the_cells_it_is_refused_with_the_way_out(box: Path) -> None:
    with pytest.raises(ConfigError, match="no run of this model in decode:batch=1,context=100") as error:
        dense_step(box, "decode:context=100")
    assert "decode:batch=1,context=32 is there" in str(error.value) and "search profile" in str(error.value)
