"""Which files a model's weights are read from: those of the index, whatever lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from methods.errors import InputError
from methods.model.load import load
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


def sharded(folder: Path) -> Path:
    """An untied Llama in bf16, in several files with an index."""
    model = tiny_model("llama-untied").to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def stray(folder: Path, name: str) -> None:
    """Weights under other names, in fp32 and larger than the model's, with an infinite one."""
    tensor = torch.full((1024, 1024), float("inf"))
    save_file({"layers.0.attention.wq.weight": tensor}, folder / name, {"format": "pt"})


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "model-extra.safetensors"])
def test_files_that_the_index_does_not_list_are_not_read(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    expected = load(str(folder), tmp_path / "cache")
    stray(folder, name)
    loaded = load(str(folder), tmp_path / "cache")
    assert loaded.structure.dtype == "bf16"
    assert (loaded.structure, loaded.digest, loaded.notes) == (expected.structure, expected.digest, ())


def test_files_beside_a_single_one_are_not_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama-untied")
    stray(folder, "consolidated.safetensors")
    loaded = load(str(folder), tmp_path / "cache")
    assert (loaded.structure.dtype, loaded.notes) == ("bf16", ())


def test_the_file_that_the_configuration_names_is_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama-untied")
    expected = load(str(folder), tmp_path / "cache").digest
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": "other.safetensors"}))
    assert load(str(folder), tmp_path / "cache").digest == expected


def _without(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def _missing(folder: Path) -> None:
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()


def _index(text: str):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


REFUSALS = {
    "no index": (_without, r"holds model-00001-of-\d+\.safetensors, but no model\.safetensors and no index that lists it"),
    "a missing file": (_missing, r"index\.json lists model-00001-of-.*, which is missing \(1 of \d+ files\); fetch it again"),
    "an index that is none": (_index("{"), "not JSON"),
    "an index without a map": (_index("{}"), "weight_map: expected an object, found nothing"),
    "an index of numbers": (_index('{"weight_map": {"a": 1}}'), "weight_map.a: expected text, found 1"),
    "an adapter": (_adapter, r"an adapter lies beside the weights \(adapter_config\.json\); merge it"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, tmp_path: Path) -> None:
    change, message = REFUSALS[case]
    folder = sharded(tmp_path / "m")
    change(folder)
    with pytest.raises(InputError, match=message) as refusal:
        load(str(folder), tmp_path / "cache")
    assert "\n" not in str(refusal.value)
