"""`tie_word_embeddings` says what the tensors are: at load, in every folder that is written, and when it is opened again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods import atomic, checkpoint
from methods.model.load import LoadedModel, load
from methods.model.save import save
from methods.model.trace import logits_of
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from methods.rotate.model import transform_model
from tests.edits import edits_of
from tests.tiny import save_tiny, tiny_model, tiny_tokens

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied_with_head(folder: Path, *, own: bool) -> Path:
    """A Llama that its configuration ties, with a head in the file: its own, or the embedding's once more."""
    save_tiny(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    head = tensors[EMBEDDING].clone()
    if own:
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(5))
        head = (head.float() + 0.1 * noise).to(head.dtype)
    save_file({**tensors, HEAD: head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def flag(folder: Path) -> bool:
    """What a folder's configuration says."""
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


def written(loaded: LoadedModel, folder: Path) -> Path:
    """A compressed checkpoint with one site in 8 bits."""
    policy, edits = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w8a16"})
    checkpoint.write(folder, loaded, PolicyFile(policy, id="one"), edits)
    return folder


def test_a_head_of_its_own_is_the_head(tmp_path: Path) -> None:
    folder = tied_with_head(tmp_path / "m", own=True)
    loaded = load(str(folder), tmp_path / "cache")
    assert not loaded.structure.tied
    assert not loaded.model.config.tie_word_embeddings
    assert any("a head of its own: the model is untied" in note for note in loaded.notes)
    expected = tiny_model("llama-untied")
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    expected.load_state_dict(stored, strict=False)
    for name, parameter in expected.named_parameters():
        if name not in stored:
            parameter.data.zero_()  # biases, which the tied one has not
    assert torch.equal(logits_of(loaded.model, tiny_tokens()), logits_of(expected, tiny_tokens()))


def test_the_embedding_stored_twice_is_one_tensor(tmp_path: Path) -> None:
    loaded = load(str(tied_with_head(tmp_path / "m", own=False)), tmp_path / "cache")
    plain = load(str(save_tiny(tmp_path / "plain", "llama")), tmp_path / "cache")
    assert loaded.structure.tied
    assert loaded.model.config.tie_word_embeddings
    assert (loaded.notes, loaded.structure, loaded.digest) == ((), plain.structure, plain.digest)


def test_an_untied_head_that_equals_the_embedding_stays_as_the_file_says(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama-untied")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    loaded = load(str(folder), tmp_path / "cache")
    assert not loaded.structure.tied
    assert not flag(written(loaded, tmp_path / "c"))
    assert checkpoint.load_dense(tmp_path / "c").structure == loaded.structure


def test_a_checkpoint_of_it_is_opened_again(tmp_path: Path) -> None:
    loaded = load(str(tied_with_head(tmp_path / "m", own=True)), tmp_path / "cache")
    folder = written(loaded, tmp_path / "c")
    assert not flag(folder)
    back = checkpoint.load_dense(folder)
    assert back.structure == loaded.structure
    assert not back.model.config.tie_word_embeddings
    assert torch.equal(back.model.lm_head.weight, loaded.model.lm_head.weight)


def test_a_checkpoint_that_says_tied_and_holds_a_head_is_opened_too(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    loaded = load(str(tied_with_head(tmp_path / "m", own=True)), tmp_path / "cache")
    folder = written(loaded, tmp_path / "c")
    config, marker = folder / "config.json", folder / "isolatency.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    held = json.loads(marker.read_text())
    held["files"]["config.json"] = atomic.sha256(config)
    held["digest"] = checkpoint._marker_digest(held)
    marker.write_text(json.dumps(held))
    back = checkpoint.load_dense(folder)
    assert back.structure == loaded.structure
    assert not back.model.config.tie_word_embeddings
    assert torch.equal(back.model.lm_head.weight, loaded.model.lm_head.weight)


def test_saving_keeps_the_head_and_says_so(tmp_path: Path) -> None:
    loaded = load(str(tied_with_head(tmp_path / "m", own=True)), tmp_path / "cache")
    save(loaded.model, loaded.tokenizer, tmp_path / "s", "bf16")
    assert not flag(tmp_path / "s")
    again = load(str(tmp_path / "s"), tmp_path / "cache")
    assert (again.structure, again.digest, again.notes) == (loaded.structure, loaded.digest, ())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_tied_model_stays_tied(arch: str, tmp_path: Path) -> None:
    loaded = load(str(save_tiny(tmp_path / "m", arch)), tmp_path / "cache")
    assert flag(written(loaded, tmp_path / "c"))
    assert checkpoint.load_dense(tmp_path / "c").structure == loaded.structure


def test_a_rotation_that_unties_the_head_says_so(tmp_path: Path) -> None:
    loaded = load(str(save_tiny(tmp_path / "m", "llama")), tmp_path / "cache")
    decision = Decision.of("quarot", seed=0)
    structure = transform_model(loaded.model, loaded.structure, [decision])
    assert not structure.tied
    rotated = LoadedModel(loaded.model, loaded.tokenizer, structure, "m", "m", "d")
    checkpoint.write(tmp_path / "c", rotated, PolicyFile(Policy({}, (decision,)), id="r"), {})
    assert not flag(tmp_path / "c")
    assert checkpoint.load_dense(tmp_path / "c").structure == structure
