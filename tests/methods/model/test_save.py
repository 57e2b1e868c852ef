"""What is saved is what stock transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods.model.save import save
from methods.model.trace import logits_of
from tests.tiny import tiny_model, tiny_tokenizer, tiny_tokens


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen2-moe", "qwen3-moe", "gemma3"])
def test_stock_transformers_loads_it(arch, tmp_path):
    model = tiny_model(arch)
    names = [name for name, _ in model.named_parameters()]
    save(model, tiny_tokenizer(), tmp_path / "out", "fp32")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.allclose(logits_of(loaded, tiny_tokens()), logits_of(model, tiny_tokens()), atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids == tiny_tokenizer()("the fox").input_ids


@pytest.mark.parametrize(("dtype", "stored", "name"), [("bf16", "BF16", "bfloat16"), ("fp16", "F16", "float16")])
def test_the_storage_dtype(dtype, stored, name, tmp_path):
    model = tiny_model("llama")
    save(model, tiny_tokenizer(), tmp_path / "out", dtype, {"origin.json": "{}"})
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as tensors:
        kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    assert set(kinds.values()) == {stored}
    assert "lm_head.weight" not in kinds  # tied: stored once
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert (tmp_path / "out" / "origin.json").read_text() == "{}"
    assert model.dtype == torch.float32


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        save(tiny_model("llama"), tiny_tokenizer(), folder, "bf16")

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tiny_model("llama"), Broken(), tmp_path / "new", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.iterdir()] == ["precious"]
