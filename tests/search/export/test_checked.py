"""What is exported loads as what was evaluated, or is not there; what was damaged afterwards is found and made again."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from methods import checkpoint
from methods.atomic import SEAL
from methods.method import Edit
from methods.model.load import LoadedModel
from methods.policy import Policy
from methods.policy_file import PolicyFile
from search.cli import main
from search.config import RunConfig
from search.deliver import _exported, _write_checkpoint, export_answer
from search.evaluate import Switch
from search.export import checked, dense
from search.export.verification import Verification
from search.progress import Progress
from tests.edits import edits_of, loaded_tiny
from tests.tiny import tiny_tokens

GOOD = Verification(0.0, 1.0, 1.0, 1, True, "equal")
BAD = Verification(0.5, 1.0, 2.0, 1, False, "w differs by 0.5")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, object]:
    """What lies in an exported folder; safetensors writes its header in another order every time, and checksums follow."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    found["tensors"] = {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}
    del found[SEAL]
    return found


def write(folder: Path) -> None:
    """An export of two files, one of them deeper."""
    (folder / "below").mkdir(parents=True)
    (folder / "model.bin").write_text("weights")
    (folder / "below" / "more").write_text("words")


def raising(error: BaseException) -> Callable[[Path], Verification]:
    def verify(folder: Path) -> Verification:
        raise error

    return verify


def test_it_is_read_back_before_it_is_there(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def verify(folder: Path) -> Verification:
        seen.append(names(folder))
        assert folder.name == "out" and not (tmp_path / "out").exists()
        return GOOD

    assert checked.export(tmp_path / "out", write, verify) is GOOD
    assert seen == [["below", "model.bin"]] and names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / SEAL).read_text()).keys() == {"below/more", "model.bin"}
    with pytest.raises(FileExistsError, match="is not empty"):
        checked.export(tmp_path / "out", write, verify)


REFUSALS = (
    (lambda folder: BAD, r"out: what is loaded back is not what was evaluated: w differs by 0\.5"),
    (raising(KeyError("rope_theta")), r"out: .* it does not load \(KeyError: 'rope_theta'\)"),
    (raising(RuntimeError("size mismatch\nfor w")), r"it does not load \(RuntimeError: size mismatch for w\)"),
    (raising(SafetensorError("no header")), r"it does not load \(SafetensorError: no header\)"),
)


@pytest.mark.parametrize(("verify", "message"), REFUSALS)
def test_a_refused_export_leaves_nothing(tmp_path: Path, verify: Callable[[Path], Verification], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        checked.export(tmp_path / "out", write, verify)
    assert names(tmp_path) == [] and ".part" not in str(refusal.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError(), RuntimeError("can't allocate memory")])
def test_a_machine_that_is_full_is_no_fault_of_the_export(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        checked.export(tmp_path / "out", write, raising(error))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    (
        (lambda folder: (folder / "model.bin").write_text("weighty"), "model.bin was changed after it was written"),
        (lambda folder: (folder / "below" / "more").unlink(), "below/more is missing"),
        (lambda folder: (folder / SEAL).write_text("{"), f"{SEAL} is damaged"),
        (lambda folder: (folder / SEAL).write_text("[]"), f"{SEAL} is damaged: no JSON object"),
    ),
)
def test_damage_is_found_without_loading(tmp_path: Path, damage: Callable[[Path], object], problem: str) -> None:
    checked.export(tmp_path / "out", write, lambda folder: GOOD)
    damage(tmp_path / "out")
    found = checked.standing(tmp_path / "out", raising(AssertionError()))
    assert not found.ok and found.message.startswith(problem)


def test_what_was_added_does_not_matter_and_without_checksums_loading_decides(tmp_path: Path) -> None:
    checked.export(tmp_path / "out", write, lambda folder: GOOD)
    (tmp_path / "out" / "README").write_text("mine")
    assert checked.standing(tmp_path / "out", lambda folder: GOOD) is GOOD
    (tmp_path / "out" / SEAL).unlink()  # as earlier versions left it
    assert checked.standing(tmp_path / "out", lambda folder: GOOD) is GOOD
    assert checked.standing(tmp_path / "out", lambda folder: BAD) is BAD


class Case:
    """A tiny model with three sites at 8 bits, and as much of a session as delivering needs."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.loaded: LoadedModel = loaded_tiny(folder, "llama")
        sites = self.loaded.structure.sites[:3]
        policy, self.edits = edits_of(self.loaded.model, self.loaded.structure, {site.name: "w8a16" for site in sites})
        self.file = PolicyFile(policy)
        self.said: list[str] = []
        progress = Progress(quiet=True)
        progress.say = self.said.append  # type: ignore[method-assign]
        self.session: Any = SimpleNamespace(
            config=RunConfig(latency="0.5x", results=str(folder / "results"), study="s", **flags),
            loaded=self.loaded,
            model=self.loaded.model,
            switch=Switch(self.loaded.model, self.loaded.structure, lambda site, decision: Edit()),
            corpora={"report": SimpleNamespace(tokens=tiny_tokens())},
            progress=progress,
        )
        self.folder = self.session.config.folder

    def export(self, folder: Path, heal: bool = True) -> Verification:
        return export_answer(self.session, "dense", self.file, self.edits, folder, heal)


def test_a_damaged_export_is_moved_aside_and_made_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    out = case.folder / "exports" / "dense" / "key"
    assert case.export(out).ok
    whole = contents(out)
    for name in ("tokenizer.json", "model.safetensors", "serve.json"):
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} was changed .*; remove it or choose another folder"):
            case.export(out, heal=False)
        case.said.clear()
        assert case.export(out).ok
        assert contents(out) == whole
        assert f"{name} was changed after it was written; it is moved to .damaged-key" in case.said[0]
    assert names(out.parent) == [".damaged-key", ".damaged-key-2", ".damaged-key-3", "key"]
    case.said.clear()
    assert case.export(out).ok and len(case.said) == 1


def test_an_export_of_other_weights_is_made_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    out = case.folder / "exports" / "dense" / "key"
    case.export(out)
    layers = {site.name for site in case.loaded.structure.sites[:2]}
    policy, edits = edits_of(case.loaded.model, case.loaded.structure, {site: "w4a16" for site in layers})
    case.file, case.edits = PolicyFile(policy), edits
    assert case.export(out).ok and (out.parent / ".damaged-key").is_dir()


def test_what_stands_elsewhere_is_left_alone(tmp_path: Path) -> None:
    case = Case(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(ValueError, match=r"mine is no sound dense export of it: .*; remove it or choose another folder"):
        case.export(tmp_path / "mine", heal=False)
    assert names(tmp_path / "mine") == ["letter"] and not list(tmp_path.glob(".damaged*"))


@pytest.mark.parametrize(("flags", "asked"), [({}, False), ({"export": ("dense",)}, True), ({"runtime": "vllm"}, False)])
def test_a_missing_export_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], asked: bool
) -> None:
    case = Case(tmp_path, **flags)
    monkeypatch.setattr(dense, "verify", lambda folder, reference, ids: BAD)
    place = case.folder / "exports" / "dense" / "key"
    found = _exported(case.session, "dense", case.file, case.edits, place)
    assert (found.format, found.folder, found.asked) == ("dense", "exports/dense/key", asked)
    assert "w differs by 0.5" in found.problem and not place.exists() and names(place.parent) == []
    monkeypatch.undo()
    assert not _exported(case.session, "dense", case.file, case.edits, place).problem and place.is_dir()


def test_the_format_that_an_engine_reads_is_asked_for_by_naming_the_engine(tmp_path: Path) -> None:
    case = Case(tmp_path, runtime="vllm")
    case.file, case.edits = PolicyFile(Policy()), {}
    found = _exported(case.session, "compressed-tensors", case.file, case.edits, case.folder / "exports" / "ct" / "key")
    assert found.asked and "compresses nothing" in found.problem


def test_a_damaged_checkpoint_is_moved_aside_and_written_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    folder = case.folder / "models" / "key"
    _write_checkpoint(case.session, folder, case.file, case.edits)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "payload.safetensors").write_bytes(whole["payload.safetensors"][:-1] + b"\x01")
    _write_checkpoint(case.session, folder, case.file, case.edits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert "payload.safetensors was changed after it was written; it is moved to .damaged-key" in case.said[-1]
    case.said.clear()
    _write_checkpoint(case.session, folder, case.file, case.edits)
    assert case.said == []


def test_a_refused_export_of_a_checkpoint_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path)
    checkpoint.write(tmp_path / "checkpoint", case.loaded, case.file, case.edits)
    command = ["export", str(tmp_path / "checkpoint"), "--format", "dense", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as changed:
        changed.setattr(dense, "verify", lambda folder, reference, ids: BAD)
        assert main(command) == 2
    assert "w differs by 0.5" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
    assert main(command) == 0 and (tmp_path / "out" / SEAL).is_file()
    assert main(command) == 2 and "is not empty" in capsys.readouterr().err
