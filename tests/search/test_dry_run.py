"""A dry run says what a run would take and whether it can succeed, and does nothing; what is refused, is refused as early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profilers.kernels import build
from profilers.kernels.build import NoCompiler, library, planning
from search.cli import main
from search.config import RunConfig
from search.estimate import peak_bytes, seconds, words
from search.foresee import foreseen
from search.progress import Progress
from tests.tiny import save_tiny


@pytest.fixture
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights, converting, compiling and measuring all fail the test."""

    def never(*_: object, **__: object) -> Any:
        pytest.fail("something was done")

    for name in (
        "methods.model.load._read",
        "methods.model.load.convert",
        "profilers.kernels.build._call",
        "profilers.timer.take",
    ):
        monkeypatch.setattr(name, never)
    monkeypatch.setattr(build, "_loaded", never)


def dry(model: Path, folder: Path, *flags: str) -> int:
    own = (
        "--results",
        str(folder / "results"),
        "--cache",
        str(folder / "cache"),
        "--workload",
        "decode:batch=1,context=8",
        "--quiet",
    )
    return main(["run", "--model", str(model), "--dry-run", "--json", *own, *flags])


@pytest.mark.usefixtures("nothing_is_done")
def test_a_dry_run_gives_time_memory_and_feasibility_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    assert dry(model, tmp_path, "--latency", "0.9x", "--formats", "w8a8-token") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["time"].startswith("about ") and plan["memory"].startswith("about ")
    assert "decided weights from 0.2 MiB to 0.4 MiB" in plan["feasibility"]
    assert "not known before 8 kernel cells" in plan["feasibility"] and plan["kernel cells to measure"] == "8 of 8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.usefixtures("nothing_is_done")
def test_what_a_runtime_does_not_get_is_refused_before_the_weights_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model", "neox")
    own = ("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--runtime", "llama.cpp")
    assert main(["run", "--model", str(model), "--latency", "0.9x", *own]) == 2
    assert "GPTNeoXForCausalLM is not exported to llama.cpp" in capsys.readouterr().err
    assert not list((tmp_path / "results").glob("*"))


def test_more_work_takes_longer_and_a_larger_model_more_memory(tmp_path: Path) -> None:
    session = foreseen(RunConfig(model=str(save_tiny(tmp_path / "model"))), Progress(quiet=True))
    assert session is not None
    structure = session.loaded.structure
    counts = {"cells": 10, "runs": 20, "choices": 24, "evaluations": 10}
    small, large = (
        seconds(RunConfig(calibration_tokens=n, search_tokens=n, validation_tokens=n), structure, counts, 2)
        for n in (4096, 8192)
    )
    assert large["calibration"] > 1.5 * small["calibration"] and large["search"] > small["search"]
    assert small["latency table"] == large["latency table"] == 12
    assert seconds(RunConfig(), structure, {**counts, "cells": 0}, 2)["latency table"] == 0
    assert peak_bytes(structure) > 8 * structure.n_parameters
    assert words({"a": 30.0, "b": 0.2, "c": 600.0}).startswith("about 11 min on a machine that is free (a 30 s, c 10 min)")


def test_while_planning_a_compiler_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_loaded", lambda _: pytest.fail("compiled"))
    with planning():
        assert library() is not None
        monkeypatch.setattr(build, "compiler", lambda: None)
        monkeypatch.setattr(build, "_loaded", _no_compiler)
        with pytest.raises(NoCompiler):
            library()


def _no_compiler(_: object) -> Any:
    raise NoCompiler("no C++ compiler found")


@pytest.mark.usefixtures("nothing_is_done")
def test_a_model_with_experts_is_planned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model", "qwen3-moe")
    assert dry(model, tmp_path, "--latency", "0.9x", "--formats", "w8a8-token") == 0
    assert "weights were read" not in json.loads(capsys.readouterr().out)["model"]
