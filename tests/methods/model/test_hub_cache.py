"""A model in the hub's cache as another tool left it, without a network: what is there is loaded, what is not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods.model.hub import missing_files
from methods.model.load import LoadError, load
from tests.tiny import save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(root: Path, listed: tuple[str, ...] = ()) -> Path:
    """A snapshot of someone/tiny, whose repository lists further files that nobody fetched."""
    repository = root / "models--someone--tiny"
    folder = save_tiny(repository / "snapshots" / COMMIT, "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    if listed:
        write_listing(repository, [path.name for path in folder.iterdir()] + list(listed))
    return folder


def write_listing(repository: Path, names: list[str]) -> None:
    """What huggingface_hub keeps of a repository's tree since version 2."""
    tree = pytest.importorskip("huggingface_hub._tree_cache")
    entry = tree.TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    tree.write_tree_cache(str(repository), COMMIT, dict.fromkeys(names, entry))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; tests run without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("listed", [(), ("LICENSE.txt", "onnx/config.json")])
def test_what_is_there_is_loaded(hub: Path, tmp_path: Path, listed: tuple[str, ...]) -> None:
    folder = cached(hub, listed)
    said: list[str] = []
    loaded = load("someone/tiny", tmp_path, log=said.append)
    assert loaded.digest == load(str(folder), tmp_path).digest and loaded.tokenizer is not None
    assert any("taken from its cache" in line for line in said) == bool(listed)


@pytest.mark.parametrize(
    ("spoil", "lacks"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "a tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "weights as safetensors"),
        (lambda f: index(f, {"a": "model-1.safetensors", "b": "model-2.safetensors"}), r"model-1.safetensors \(2 of 2 files"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json"),
    ],
)
def test_what_is_missing_is_named(hub: Path, tmp_path: Path, spoil: Any, lacks: str) -> None:
    folder = cached(hub, ("LICENSE.txt",))
    spoil(folder)
    with pytest.raises(LoadError, match=f"someone/tiny: the hub does not give it .* lacks {lacks}"):
        load("someone/tiny", tmp_path)


def index(folder: Path, weights: dict[str, str]) -> None:
    """An index of shards."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def test_shards_that_are_all_there_lack_nothing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    index(folder, {"a": "model.safetensors"})
    assert missing_files(folder) == ""


def test_a_model_that_nobody_fetched_is_not_there(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no local folder of that name, and the hub does not give it"):
        load("someone/else", tmp_path)
