"""A model on the hub: its configuration comes first, and what that refuses is refused before anything else is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from methods.model import hub
from methods.model.experts import UnsupportedModel
from methods.model.load import LoadError, load
from methods.model.outline import outline
from search.cli import main
from tests.methods.model.test_hub_cache import hub as hub_cache  # noqa: F401
from tests.methods.model.test_multimodal import CASES, VISION, _saved, _whole
from tests.tiny import save_tiny

NAME = "someone/tiny"


class Hub:
    """The hub's two downloaders, which give what lies in a folder and note what was asked."""

    def __init__(self, repository: Path, snapshot: Path) -> None:
        self.repository, self.snapshot = repository, snapshot
        self.asked: list[str] = []

    def file(self, name: str, file: str) -> str:
        self.asked.append(file)
        if not (self.repository / file).exists():
            raise RemoteEntryNotFoundError(f"404: {file}", response=_Response())  # type: ignore[arg-type]
        self.snapshot.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.repository / file, self.snapshot))

    def all(self, name: str, **_: Any) -> str:
        self.asked.append("everything")
        shutil.copytree(self.repository, self.snapshot, dirs_exist_ok=True)
        return str(self.snapshot)


class _Response:
    """As much of an answer as the error reads."""

    request, status_code = None, 404

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Hub]:
    def serve(repository: Path) -> Hub:
        made = Hub(repository, tmp_path / "snapshot")
        monkeypatch.setattr("huggingface_hub.hf_hub_download", made.file)
        monkeypatch.setattr("huggingface_hub.snapshot_download", made.all)
        return made

    return serve


def _changed(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def _blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"vocab_size": 128, "hidden_size": 48, "encoder_hidden_size": 16, "intermediate_size": 64, "projection_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 3}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**VISION, "num_hidden_layers": 2})
    return _saved(folder, BlipForConditionalGeneration(config))


def _mamba(folder: Path) -> Path:
    from transformers import MambaConfig

    MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, architectures=["MambaForCausalLM"]
    ).save_pretrained(folder)
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], type[ValueError], str]] = {
    "another kind": (
        lambda f: _changed(save_tiny(f), model_type="t5", architectures=["T5ForConditionalGeneration"]),
        LoadError,
        rf"^{NAME}: model_type='t5' with architectures=.* is no causal language model",
    ),
    "quantized": (lambda f: _changed(save_tiny(f), quantization_config={}), LoadError, rf"^{NAME}: already quantized"),
    "own code": (lambda f: _changed(save_tiny(f), auto_map={"a": "b"}), LoadError, rf"^{NAME}: the model brings its own code"),
    "vision": (
        _blip,
        LoadError,
        rf"^{NAME}: a vision-language checkpoint \(Blip.*its language model alone can be compressed, but",
    ),
    "layers": (_mamba, UnsupportedModel, "attention"),
}


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_configuration_refuses_is_not_fetched(
    case: str, tmp_path: Path, served: Callable[[Path], Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    build, kind, message = REFUSED[case]
    asked = served(build(tmp_path / "there")).asked
    with pytest.raises(kind, match=message):
        load(NAME, tmp_path / "cache")
    with pytest.raises(kind, match=message):
        outline(NAME, tmp_path / "cache", fetch=True)
    assert asked == ["config.json"] * 2
    own = ("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"))
    assert main(["run", "--model", NAME, "--latency", "0.9x", *own]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("search: ") and not list((tmp_path / "results").glob("*"))
    assert asked == ["config.json"] * 3


@pytest.mark.usefixtures("hub_cache")
def test_a_repository_without_a_configuration_is_not_fetched(tmp_path: Path, served: Callable[[Path], Hub]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "adapter_config.json").write_text("{}")
    asked = served(tmp_path / "there").asked
    with pytest.raises(LoadError, match=rf"^{NAME}: no config.json on the hub; give a repository with config.json"):
        load(NAME, tmp_path / "cache")
    assert asked == ["config.json"]


@pytest.mark.usefixtures("hub_cache")
def test_what_is_not_refused_is_fetched_and_checked_once(
    tmp_path: Path, served: Callable[[Path], Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = save_tiny(tmp_path / "there")
    made = served(there)
    assert outline(NAME, tmp_path / "cache") is None and made.asked == []  # a plan fetches nothing
    found = outline(NAME, tmp_path / "cache", fetch=True)
    assert found is not None and made.asked == ["config.json"]
    loaded = load(NAME, tmp_path / "cache")
    assert made.asked == ["config.json"] * 2 + ["everything"] and loaded.structure == found.structure
    assert loaded.digest == load(str(there), tmp_path / "cache").digest
    monkeypatch.setattr("methods.model.load._refuse_early", lambda *_: pytest.fail("checked though it is all here"))
    assert load(NAME, tmp_path / "cache").digest == loaded.digest


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_does_not_answer_is_told_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", away)
    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    assert hub.configured(NAME) is None and outline(NAME, tmp_path, fetch=True) is None
    with pytest.raises(
        LoadError, match=r"the hub does not give it \(LocalEntryNotFoundError\); check the name and the network"
    ):
        load(NAME, tmp_path)


@pytest.mark.parametrize("case", ["llava", "gemma3, tower with a head", "qwen2.5-vl", "qwen3-vl-moe", "qwen2-audio"])
def test_the_language_model_of_a_checkpoint_with_a_tower_is_told_by_its_configuration(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _saved(tmp_path / "whole", _whole(CASES[case][0]))
    expected = load(str(folder), tmp_path / "cache").structure
    monkeypatch.setattr("methods.model.load._read", lambda *_: pytest.fail("weights were read"))
    found = outline(str(folder), tmp_path / "cache")
    assert found is not None and found.structure == expected
