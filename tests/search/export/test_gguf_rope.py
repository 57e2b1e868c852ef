"""Scaled rotary embeddings in a GGUF: written as llama.cpp reads them, read back as the same model, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.model.gguf import as_stored
from methods.model.load import LoadedModel, load
from search.export import gguf, gguf_rope, llama_cpp
from search.export.gguf import export
from search.export.gguf_layout import MODEL
from search.export.verification import agreement, predictions
from tests.search.export.test_gguf import IDS, _mixed, _reader, _verified
from tests.tiny import save_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _loaded(folder: Path, arch: str, rope: dict[str, Any]) -> LoadedModel:
    save_tiny(folder / "model", arch)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {"rope_parameters": {"rope_theta": 10_000.0, **rope}}
    path.write_text(json.dumps(config))
    return load(str(folder / "model"), folder / "cache")


@pytest.mark.parametrize(
    ("arch", "rope"),
    [
        ("llama", LLAMA3),
        ("llama", LINEAR),
        ("qwen2", YARN),
        ("llama", {**YARN, "attention_factor": 1.5}),
        ("qwen2", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    ],
    ids=["llama3", "linear", "yarn", "yarn-attention", "yarn-mscale"],
)
def test_a_scaled_rotary_embedding_is_read_back_and_run_as_the_same_model(
    tmp_path: Path, arch: str, rope: dict[str, Any]
) -> None:
    loaded = _loaded(tmp_path, arch, rope)
    file, edits = _mixed(loaded)
    export(tmp_path / "gguf", loaded, file, edits)
    result = _verified(tmp_path / "gguf", loaded, edits)
    assert result.ok, result.message
    assert result.max_weight_diff == 0.0
    if llama_cpp.installed():
        assert "llama.cpp of" in result.message and result.kl < 1e-3

    serve = json.loads((tmp_path / "gguf" / "serve.json").read_text())
    losses = json.loads((tmp_path / "gguf" / "losses.json").read_text())
    assert list(serve) == ["llama.cpp"]
    assert any(loss["lost"] == "rotary scaling" and rope["rope_type"] in loss["why"] for loss in losses)

    # A search of the file begins with the model that was evaluated: moved off its grids, it computes the same.
    again = load(str(tmp_path / "gguf" / MODEL), tmp_path / "cache")
    assert again.model.config.rope_parameters["rope_type"] == rope["rope_type"]
    stored = as_stored(tmp_path / "gguf" / MODEL)
    kl, _ = agreement(predictions(stored, IDS), predictions(again.model, IDS))
    assert kl < 1e-4
    plain = as_stored(tmp_path / "gguf" / MODEL)
    for module in plain.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.copy_(gguf_rope.plain_frequencies(10_000.0, 16).float())
            module.attention_scaling = 1.0
    assert agreement(predictions(stored, IDS), predictions(plain, IDS))[0] > 100 * kl


def test_what_the_file_says(tmp_path: Path) -> None:
    loaded = _loaded(tmp_path, "llama", LLAMA3)
    export(tmp_path / "llama3", loaded, *_mixed(loaded))
    (found,) = (tensor for tensor in _reader(tmp_path / "llama3").tensors if tensor.name == "rope_freqs.weight")
    # Wavelengths are 2 pi 10 ** (i / 2): below 16 = 64 / 4 positions nothing is divided, above 64 all is, and two lie in between.
    shares = [(64 / (2 * np.pi * 10 ** (i / 2)) - 1) / 3 for i in (1, 2)]
    expected = [1, *(1 / ((1 - share) / 8 + share) for share in shares), *[8] * 5]
    assert found.data.dtype == np.float32 and np.allclose(found.data, expected, rtol=1e-6)
    assert not any("rope.scaling" in name for name in _reader(tmp_path / "llama3").fields)

    loaded = _loaded(tmp_path / "y", "qwen2", {**YARN, "attention_factor": 1.5})
    export(tmp_path / "yarn", loaded, *_mixed(loaded))
    reader = _reader(tmp_path / "yarn")
    fields = {name: field.contents() for name, field in reader.fields.items() if ".rope.scaling." in name}
    assert fields == {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
        "qwen2.rope.scaling.attn_factor": pytest.approx(1.5 / (1 + 0.1 * np.log(4))),
    }
    assert "rope_freqs.weight" not in {tensor.name for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("arch", "rope", "message"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, "by the rule dynamic, which the file does not describe"),
        ("qwen2", LLAMA3, "by the rule llama3, which llama.cpp does not read for qwen2"),
        ("llama", {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}, "a YaRN of its own .*'beta_fast': 8.0.* computes otherwise"),
        ("llama", {**YARN, "truncate": False}, "a YaRN of its own"),
    ],
)
def test_what_the_file_does_not_describe_is_refused(tmp_path: Path, arch: str, rope: dict[str, Any], message: str) -> None:
    loaded = _loaded(tmp_path, arch, rope)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "gguf", loaded, *_mixed(loaded))
    assert not (tmp_path / "gguf").exists()


def test_a_file_without_its_scaling_fails_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _loaded(tmp_path, "llama", LLAMA3)
    file, edits = _mixed(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "divisors", lambda *_: None)
        export(tmp_path / "without", loaded, file, edits)
    assert "rope_freqs.weight does not hold the divisors" in _verified(tmp_path / "without", loaded, edits).message
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "divisors", lambda *_: np.full(8, 2, dtype=np.float32))
        export(tmp_path / "other", loaded, file, edits)
    assert "rope_freqs.weight does not hold the divisors" in _verified(tmp_path / "other", loaded, edits).message

    loaded = _loaded(tmp_path / "l", "qwen2", LINEAR)
    file, edits = _mixed(loaded)
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter.add_rope_scaling_factor", lambda *_: None)
        export(tmp_path / "linear", loaded, file, edits)
    result = _verified(tmp_path / "linear", loaded, edits)
    assert not result.ok and "its predictions have KL" in result.message
    assert torch.isfinite(torch.tensor(result.nll_loaded))
