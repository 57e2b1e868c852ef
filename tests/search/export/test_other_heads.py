"""What every export says of a model whose files hold more than config.json does: a head of its own, a block beside the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods import checkpoint
from methods.model.load import LoadedModel, load
from search.export.registry import EXPORTERS, exporter
from search.export.standalone import export_checkpoint
from tests.search.export.wide import compressed, verified, wide_model

FORMATS = {"modelopt": "w8a16", "mlx": "w4a16-g32-asym", "gguf": "w8a16-g32"}
"""What an export takes, where it is not `w4a16-g32`."""

HEAD, EMBEDDING, LAST = "lm_head.weight", "model.embed_tokens.weight", "model.layers.2."
LEFT_OUT = "left out, not part of the model: next-token-prediction block (9 tensors, model.layers.3.*)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Tied by its configuration, with another head in the file and a next-token-prediction block behind the last."""
    folder = tmp_path_factory.mktemp("wide")
    wide_model(folder, biases=False)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        name.replace(LAST, "model.layers.3."): tensor.clone() for name, tensor in tensors.items() if name.startswith(LAST)
    }
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    return load(str(folder), folder / "cache")


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_export_says_what_the_model_is(name: str, model: LoadedModel, tmp_path: Path) -> None:
    file, edits = compressed(model, (FORMATS.get(name, "w4a16-g32"),))
    out = tmp_path / "out"
    exporter(name).export(out, model, file, edits)
    losses = json.loads((out / "losses.json").read_text())
    assert {"lost": "tensors", "why": LEFT_OUT} in losses
    if name == "gguf":
        from gguf import GGUFReader

        assert "output.weight" in {tensor.name for tensor in GGUFReader(out / "model.gguf").tensors}
    else:
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert "num_nextn_predict_layers" not in config
    for weights in out.glob("*.safetensors"):
        assert torch.equal(load_file(weights)[HEAD].float(), model.model.lm_head.weight)


@pytest.mark.parametrize("name", ["dense", "compressed-tensors"])
def test_what_is_loaded_back_is_that_model(name: str, model: LoadedModel, tmp_path: Path) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    module = exporter(name)
    module.export(tmp_path / "out", model, file, edits)
    assert verified(module, tmp_path / "out", model, edits).ok


def test_the_export_of_a_checkpoint_says_so_too(model: LoadedModel, tmp_path: Path) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    checkpoint.write(tmp_path / "c", model, file, edits)
    assert export_checkpoint(tmp_path / "c", "dense", tmp_path / "out").ok
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert {"lost": "tensors", "why": LEFT_OUT} in losses
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["dense", "mlx"])
def test_a_tied_model_is_exported_as_tied(name: str, tmp_path: Path) -> None:
    loaded = wide_model(tmp_path / "m")
    file, edits = compressed(loaded, (FORMATS.get(name, "w4a16-g32"),))
    exporter(name).export(tmp_path / "out", loaded, file, edits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert all(loss["lost"] != "tensors" for loss in json.loads((tmp_path / "out" / "losses.json").read_text()))
