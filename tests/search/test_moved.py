"""A study that was moved works with every command, and a run makes again what was damaged in it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from methods import checkpoint
from methods.atomic import broken_seal
from search.cli import main
from search.export.verification import not_loaded
from search.folder import open_store
from search.progress import Progress
from search.results import Answer, answers, saved_answer, saved_config
from search.results import _keep as keep
from search.session import Session
from search.study import TrialRecord
from tests.search.run_server import fixed_prices, one_core
from tests.search.test_bad_input import SMALL
from tests.tiny import save_tiny


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One core and fixed prices: how fast the machine is says nothing here."""
    with one_core(), fixed_prices():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished study, and its cache."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny(folder / "llama", "llama")
    own = ["--results", str(folder / "results"), "--study", "s", "--cache", str(folder / "cache"), "--quiet"]
    assert main(["run", "--model", str(model), "--latency", "0.9x", *SMALL, *own]) == 0
    return folder / "results" / "s", folder / "cache"


@pytest.fixture
def moved(made: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """The study in another folder, under another name; nothing is left, and nothing is made, where it was."""
    study, _ = made
    away = study.with_name("away")
    shutil.copytree(study, tmp_path / "elsewhere" / "renamed")
    study.rename(away)
    yield tmp_path / "elsewhere" / "renamed"
    made_again = study.exists()
    shutil.rmtree(study, ignore_errors=True)
    away.rename(study)
    assert not made_again


def records(folder: Path) -> list[TrialRecord]:
    """Every evaluation of a study where it lies now."""
    return open_store(Session(saved_config(folder), Progress(quiet=True))).records()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)


def test_a_moved_study_works_with_every_command(
    made: tuple[Path, Path], moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, cache = made
    folder, out = str(moved), str(tmp_path / "out")
    policy = str(moved / "policies" / "0.9x.yaml")
    for command in (
        ["show", folder],
        ["report", folder],
        ["frontier", folder],
        ["compare", folder, str(study.with_name("away"))],
        ["explain", folder],
        ["generate", folder, "--tokens", "2"],
        ["export", folder, "--format", "dense"],
        ["export", folder, "--format", "dense", "--out", f"{out}-export"],
        ["materialize", policy, "--out", f"{out}-made", "--study", folder, "--cache", str(cache)],
        ["cache", "--cache", str(cache), "--results", str(moved.parent)],
    ):
        assert main([*command, "--json"]) == 0, command
    assert "renamed" in capsys.readouterr().out
    assert main(["validate", folder]) == 2 and "only unvalidated ones" in capsys.readouterr().err
    (judged,) = (moved / "models").iterdir()
    assert checkpoint.problem(judged, checkpoint.read(Path(f"{out}-made")).edits) == ""


def test_a_run_mends_what_was_damaged_and_says_which_export_is_missing(
    moved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.export.compressed_tensors.verify", lambda *_: not_loaded(0, "another loss than evaluated", ""))
    before = saved_answer(moved)
    (judged,), (exported,) = (moved / "models").iterdir(), (moved / "exports" / "dense").iterdir()
    payload = (judged / "payload.safetensors").read_bytes()
    n_trials, steps = len(records(moved)), sorted((moved / "steps").glob("validate-*.json"))
    keep(moved, older := other(before, "0.99x"))
    flip(moved / "answers" / f"{older.objective}.json")
    for path in (judged / "payload.safetensors", exported / "tokenizer.json", *steps, *(moved / "bank").rglob("*.safetensors")):
        flip(path)
    assert steps and n_trials
    assert main(["run", "--config", str(moved / "config.toml"), "--export", "dense,compressed-tensors", "--json"]) == 4
    said = capsys.readouterr()
    shown = json.loads(said.out)
    found = {item["format"]: item for item in shown["answer"]["exports"]}
    assert shown["folder"] == str(moved) and shown["answer"]["verdict"] == "met"
    assert (
        not found["dense"]["problem"]
        and found["compressed-tensors"]["asked"]
        and "another loss" in found["compressed-tensors"]["problem"]
    )
    assert not (moved / found["compressed-tensors"]["folder"]).exists()
    for name in ("payload.safetensors", "tokenizer.json"):
        assert f"{name} was changed after it was written; it is moved to .damaged-{judged.name} and" in said.err
    assert (judged / "payload.safetensors").read_bytes() == payload and broken_seal(exported) == ""
    assert "more: damaged, made again" in said.err
    assert list(answers(moved)) == ["0.9x"] and (moved / "answers" / ".damaged-0.99x.json").is_file()
    assert len(records(moved)) == n_trials
    assert main(["show", str(moved)]) == 0 and "there is no compressed-tensors export: " in capsys.readouterr().out
    assert "there is no compressed-tensors export: " in (moved / "report.html").read_text()


def other(answer: Answer, objective: str) -> Answer:
    """The answer for another objective."""
    return Answer(**{**vars(answer), "objective": objective})
