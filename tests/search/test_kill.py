"""Runs that are killed at random moments end as if they had not been.

Five kills or a few more here; fifty, at other moments, in the slow job: `make slow`, or `pytest -m slow tests/search/test_kill.py`.
"""

import json
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from search.cli import main
from search.config import read_toml
from search.results import answers
from tests.search.run_server import Server, server
from tests.tiny import save_tiny

KILLS = 5
"""A chain: the same command, killed at so many moments before it may end. A run that is through by then is no kill: how fast the machine
is changes from run to run, and chains are added until enough have hit."""

FLAGS = {
    "latency": "0.6x",
    "workload": "decode:batch=1,context=8",
    "formats": "w8a8-token,w4a8-g32-asym,w2a8-g32-asym",
    "sequence": 32,
    "calibration-tokens": 128,
    "search-tokens": 256,
    "validation-tokens": 128,
    "evaluations": 6,
    "finalists": 1,
    "study": "s",
}


def command(model: Path, folder: Path, **other: object) -> list[object]:
    """The run, with results and cache of its own."""
    flags = {**FLAGS, "model": model, "results": folder / "results", "cache": folder / "cache", **other}
    return ["run", *(part for name, value in flags.items() for part in (f"--{name}", value))]


@dataclass(frozen=True)
class Outcome:
    """What a run ends with, less what it took: the answer, the evaluations in their order, the files that people use."""

    answer: str
    trials: list[tuple[Any, ...]]
    files: dict[str, bytes]
    exported: dict[str, bytes]


def outcome(study: Path) -> Outcome:
    """Of a finished study."""
    (answer,) = answers(study).values()
    kept = {name: value for name, value in answer.to_json().items() if name not in ("cost", "versions", "written")}
    files = {name: (study / name).read_bytes() for name in ("frontier.csv", "policies/0.6x.yaml")}
    files |= {path.name: path.read_bytes() for path in study.glob("models/*/*.safetensors")}
    (export,) = study.glob("exports/dense/*/*.safetensors")
    exported = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(export).items()}
    return Outcome(json.dumps(kept, sort_keys=True), trials(study), files, exported)


def trials(study: Path) -> list[tuple[Any, ...]]:
    """(number, KL, attributes less the time taken) of every trial in the store as it lies on the disk."""
    if not (study / "study.db").exists():
        return []
    with sqlite3.connect(study / "study.db") as store:
        if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return []
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = store.execute(
            "SELECT t.number, v.value, group_concat(a.key || '=' || a.value_json, ';') FROM trials t "
            "JOIN trial_values v ON v.trial_id = t.trial_id AND v.objective = 0 "
            "JOIN (SELECT * FROM trial_user_attributes WHERE key != 'seconds' ORDER BY key) a ON a.trial_id = t.trial_id "
            "GROUP BY t.number ORDER BY t.number"
        )
        return list(rows)


def _tensors(path: Path) -> bool:
    with safe_open(path, framework="np") as tensors:
        return bool(tensors.keys())


WHOLE: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text())["schema"],
    ".toml": read_toml,
    ".safetensors": _tensors,
    ".png": lambda path: path.read_bytes().endswith(b"IEND\xaeB`\x82"),
    ".html": lambda path: path.read_text().rstrip().endswith("</html>"),
    ".jsonl": lambda path: [
        json.loads(line) for line in path.read_text().split("\n")[:-1]
    ],  # the last may be torn: it does not count
}


def check_files(folder: Path) -> None:
    """Every file that has its name is whole; what is unfinished is hidden."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix in WHOLE:
            assert WHOLE[path.suffix](path), path


def unfinished(folder: Path) -> list[Path]:
    """What a killed process left."""
    return list(folder.rglob(".*.part"))


@dataclass(frozen=True)
class Reference:
    """A run that nobody interrupted. seconds: what it took."""

    model: Path
    runs: Server
    folder: Path
    seconds: float
    outcome: Outcome


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    model = save_tiny(folder / "model")
    with server(model) as runs:
        began = time.monotonic()
        assert runs.run(command(model, folder), folder / "log") == 0, (folder / "log").read_text()
        yield Reference(model, runs, folder, time.monotonic() - began, outcome(folder / "results" / "s"))


def killed_and_resumed(reference: Reference, folder: Path, seed: int) -> int:
    """The command, killed at sorted random moments of its way, each run going on from the last; how many kills hit."""
    folder.mkdir(exist_ok=True)
    study, arguments = folder / "results" / "s", command(reference.model, folder)
    generator = random.Random(seed)
    moments = sorted(generator.uniform(0, reference.seconds) for _ in range(KILLS))
    before: list[tuple[Any, ...]] = []
    hit = 0
    for last, moment in zip([0.0, *moments], moments, strict=False):
        run = reference.runs.start(arguments, folder / "log")
        if not run.ends_within(moment - last):
            run.signal(signal.SIGKILL)
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.log.read_text()
        hit += status != 0
        check_files(folder)
        found = trials(study)
        assert found[: len(before)] == before
        before = found
    assert reference.runs.run(arguments, folder / "log") == 0, (folder / "log").read_text()
    assert outcome(study) == reference.outcome
    (answer,) = answers(study).values()
    assert answer.cost["true evaluations in this run"] <= len(reference.outcome.trials) - len(before)
    assert not unfinished(folder)
    return hit


@pytest.mark.parametrize(("kills", "seed"), [(5, 0), pytest.param(50, 1000, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_with_the_same_answer(reference: Reference, tmp_path: Path, kills: int, seed: int) -> None:
    assert json.loads(reference.outcome.answer)["verdict"] == "met" and len(reference.outcome.trials) > 8
    hits = chains = 0
    while hits < kills:
        hits += killed_and_resumed(reference, tmp_path / str(chains), seed + chains)
        chains += 1
        assert chains < 4 * kills, f"{hits} of {chains * KILLS} kills met a run: the moments are not those of its way"


def test_the_same_seed_searches_the_same_and_another_one_does_not(reference: Reference, tmp_path: Path) -> None:
    """Given the same prices: the second run makes its own text, table and weights."""
    assert reference.runs.run(command(reference.model, tmp_path), tmp_path / "log") == 0
    assert outcome(tmp_path / "results" / "s") == reference.outcome
    assert reference.runs.run(command(reference.model, tmp_path, seed=1, study="t"), tmp_path / "log") == 0
    assert trials(tmp_path / "results" / "t") != reference.outcome.trials


def test_a_finished_run_repeats_nothing(reference: Reference) -> None:
    log, study = reference.folder / "again", reference.folder / "results" / "s"
    steps = {path.name: path.stat().st_mtime_ns for path in (study / "steps").iterdir()}
    assert {name.split("-")[0] for name in steps} >= {"measured", "search", "validate", "report"}
    assert reference.runs.run(command(reference.model, reference.folder), log) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (study / "steps").iterdir()} == steps
    assert outcome(study) == reference.outcome
    (answer,) = answers(study).values()
    assert answer.cost["true evaluations in this run"] == 0
    said = log.read_text()
    assert not any(step in said for step in ("writes", "measuring", "calibrating"))


def test_the_environment_is_recorded_with_what_was_prepared_and_with_the_answer(reference: Reference) -> None:
    study = reference.folder / "results" / "s"
    recorded = json.loads((study / "steps" / "environment.json").read_text())["value"]
    (answer,) = answers(study).values()
    assert recorded == answer.versions
    assert recorded["torch"] == torch.__version__ and recorded["threads"] == "1" and "1 thread" in recorded["device"]
    assert {"python", "isolatency", "transformers", "numpy", "optuna", "system"} <= recorded.keys()


def test_a_budget_that_is_used_up_still_gives_a_guarded_answer(reference: Reference, tmp_path: Path) -> None:
    """Two evaluations of four sequences fit; the answer is that of the solver or a simple one, and says why there are no more."""
    arguments = command(reference.model, tmp_path, tokens=256)
    assert reference.runs.run(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    found = trials(tmp_path / "results" / "s")
    assert len(found) == 2 < len(reference.outcome.trials)
    (answer,) = answers(tmp_path / "results" / "s").values()
    assert answer.simple is not None and answer.best is not None
    assert any("--tokens 256 being used up" in note for note in answer.notes)
    assert reference.runs.run(arguments, tmp_path / "log") == 0
    assert trials(tmp_path / "results" / "s") == found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_at_once_with_what_is_known(
    reference: Reference, tmp_path: Path, number: int, status: int
) -> None:
    run = reference.runs.start(command(reference.model, tmp_path), tmp_path / "log")
    study = tmp_path / "results" / "s"
    while not run.ends_within(0.05) and len(trials(study)) < 10:  # in the refinement
        pass
    run.signal(number)
    assert run.ends_within(10)  # a second or two; the machine may be busy
    assert run.wait() == status
    said = run.log.read_text()
    assert "best so far: " in said and "nothing was validated yet" in said
    assert said.rstrip().endswith("the same command goes on from there")
    assert "Traceback" not in said and not unfinished(tmp_path)
    check_files(tmp_path)
    assert reference.runs.run(command(reference.model, tmp_path), tmp_path / "log") == 0
    assert outcome(study) == reference.outcome


def test_a_second_run_of_the_study_is_told_who_holds_it(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(reference.model, tmp_path)
    first = reference.runs.start(arguments, tmp_path / "log")
    while not (tmp_path / "results" / "s" / "config.toml").exists():
        assert not first.ends_within(0.02)
    assert main([str(part) for part in arguments]) == 2
    said = capsys.readouterr().err
    assert f"is held by process {first.pid} on " in said and "choose another --study" in said and said.count("\n") == 1
    assert first.wait() == 0
    assert outcome(tmp_path / "results" / "s") == reference.outcome


@pytest.mark.parametrize("fault", [("full disk", 2), ("full disk", 40), ("file limit", 12_000), ("file limit", 250_000)])
def test_a_full_disk_is_one_error_and_the_same_command_goes_on(
    reference: Reference, tmp_path: Path, fault: tuple[str, int]
) -> None:
    arguments = command(reference.model, tmp_path)
    assert reference.runs.run(arguments, tmp_path / "log", fault) == 2
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and said.count("search: ") == 1
    assert str(tmp_path) in said.splitlines()[-1]
    check_files(tmp_path)
    assert not unfinished(tmp_path)
    assert reference.runs.run(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert outcome(tmp_path / "results" / "s") == reference.outcome


def test_a_run_on_a_machine_that_something_slows_says_so(reference: Reference, tmp_path: Path) -> None:
    """Of its map and of its finalists; slow steps are long ones, so that what is met then is met."""
    assert reference.runs.run(command(reference.model, tmp_path), tmp_path / "log", ("slow machine", 0)) == 0
    (answer,) = answers(tmp_path / "results" / "s").values()
    said, notes = (tmp_path / "log").read_text(), " ".join(answer.notes)
    assert answer.verdict == "met" and all(item.slowed and not item.contended for item in answer.finalists)
    assert f"during most steps of {len(answer.finalists)} of {len(answer.finalists)} policies" in notes
    assert "note: the latency map of decode:batch=1,context=8: something interrupted or slowed the machine" in said
    assert said.count("] something interrupted or slowed the machine during most steps") == 4
    assert "slowed" not in " ".join(next(iter(answers(reference.folder / "results" / "s").values())).notes)


def test_an_evaluation_without_memory_is_a_failed_trial_with_its_reason(reference: Reference, tmp_path: Path) -> None:
    arguments, study = command(reference.model, tmp_path), tmp_path / "results" / "s"
    assert reference.runs.run(arguments, tmp_path / "log", ("no memory", 3)) == 0, (tmp_path / "log").read_text()
    assert any("1 evaluation(s) failed: out of memory" in note for note in next(iter(answers(study).values())).notes)
    with sqlite3.connect(study / "study.db") as store:
        states = [state for (state,) in store.execute("SELECT state FROM trials ORDER BY number")]
        (reason,) = store.execute("SELECT value_json FROM trial_user_attributes WHERE key = 'reason'").fetchone()
    assert states.count("FAIL") == 1 and states[2] == "FAIL" and states.count("COMPLETE") > 5
    assert "allocate memory" in reason


def test_a_run_whose_every_evaluation_lacks_memory_says_so(reference: Reference, tmp_path: Path) -> None:
    assert reference.runs.run(command(reference.model, tmp_path), tmp_path / "log", ("no memory", 0)) == 2
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert "candidates could be evaluated: out of memory" in said and "--search-tokens" in said
