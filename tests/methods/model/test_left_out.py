"""Tensors of a checkpoint that are not part of the model: named, counted by the files, and gone from the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods import checkpoint
from methods.model.load import load
from methods.model.save import save
from methods.policy import Policy
from methods.policy_file import PolicyFile
from tests.edits import loaded_tiny
from tests.tiny import save_tiny

Tensors = dict[str, Tensor]
LAST = "model.layers.2."
START = "left out, not part of the model: "


def add(folder: Path, extra: Callable[[Tensors], Tensors], **settings: object) -> Path:
    """Adds tensors to a checkpoint and settings to its configuration."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **extra(tensors)}, path, {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


def copied(to: str) -> Callable[[Tensors], Tensors]:
    """The last block again, under another beginning of its names."""
    return lambda tensors: {name.replace(LAST, to): tensor.clone() for name, tensor in tensors.items() if name.startswith(LAST)}


def named(*names: str) -> Callable[[Tensors], Tensors]:
    """A small tensor for every name."""
    return lambda _: {name: torch.ones(4, dtype=torch.bfloat16) for name in names}


CASES = {
    "mtp": (copied("mtp.layers.0."), {}, "next-token-prediction block (9 tensors, mtp.*)"),
    "announced": (
        copied("model.layers.3."),
        {"num_nextn_predict_layers": 1},
        "next-token-prediction block (9 tensors, model.layers.3.*)",
    ),
    "beyond": (copied("model.layers.3."), {}, "block beyond the 3 of config.json (9 tensors, model.layers.3.*)"),
    "adapter": (
        named(*(f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in range(3) for x in "AB")),
        {},
        "adapter (6 tensors, model.layers.*.self_attn.q_proj.lora_A.*, model.layers.*.self_attn.q_proj.lora_B.*)",
    ),
    "tower": (named("vision_tower.embed.weight"), {}, "vision or audio part (1 tensor, vision_tower.*)"),
    "bias": (
        named(*(f"model.layers.{i}.self_attn.o_proj.bias" for i in range(3))),
        {},
        "tensors that LlamaForCausalLM does not have (3 tensors, model.layers.*.self_attn.o_proj.bias); "
        "the weights may be another architecture's than the one that config.json names",
    ),
    "two kinds": (
        lambda tensors: {**copied("mtp.layers.0.")(tensors), **named("vision_tower.a", "vision_tower.b")(tensors)},
        {},
        "next-token-prediction block (9 tensors, mtp.*); vision or audio part (2 tensors, vision_tower.*)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_named_and_counted(case: str, tmp_path: Path) -> None:
    extra, settings, words = CASES[case]
    loaded = load(str(add(save_tiny(tmp_path / "m", "llama"), extra, **settings)), tmp_path / "cache")
    assert loaded.left_out == START + words
    assert loaded.notes == (START + words,)
    assert len(loaded.structure.blocks) == 3


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.1.attn.bias"]),
        ("neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)
def test_buffers_of_old_checkpoints_are_no_news(arch: str, names: list[str], tmp_path: Path) -> None:
    loaded = load(str(add(save_tiny(tmp_path / "m", arch), named(*names))), tmp_path / "cache")
    assert (loaded.left_out, loaded.notes) == ("", ())


def test_a_model_without_the_prefix_of_its_names_is_counted_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **named("h.3.ln_1.weight", "h.3.ln_1.bias")({})}, folder / "model.safetensors", {"format": "pt"})
    loaded = load(str(folder), tmp_path / "cache")
    assert loaded.left_out == f"{START}block beyond the 3 of config.json (2 tensors, transformer.h.3.*)"


def test_nothing_that_transformers_hides_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model took and what the note counts are together all names in the file's header."""
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    hidden = [r"^mtp.*", r"model\.layers\.3.*"]
    monkeypatch.setattr(LlamaPreTrainedModel, "_keys_to_ignore_on_load_unexpected", hidden)
    folder = add(save_tiny(tmp_path / "m", "llama-untied"), copied("mtp.layers.0."))
    loaded = load(str(add(folder, copied("model.layers.3."), num_mtp_layers=2)), tmp_path / "cache")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        n_held = len(list(file.keys()))
    n_left = n_held - len(loaded.model.state_dict())
    assert loaded.left_out == f"{START}next-token-prediction block ({n_left} tensors, model.layers.3.*, mtp.*)"
    assert LlamaPreTrainedModel._keys_to_ignore_on_load_unexpected == hidden


def test_the_blocks_of_a_model_with_experts_are_counted_by_the_file(tmp_path: Path) -> None:
    """GLM's classes pass over some blocks' names in silence; experts lie one by one in a file and fused in the model."""
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    config = Glm4MoeConfig(
        vocab_size=128, hidden_size=96, intermediate_size=160, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, head_dim=16, dtype=torch.bfloat16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")

    def extra(tensors: Tensors) -> Tensors:
        old, new = "model.layers.1.", "model.layers.92."
        return {name.replace(old, new): tensor.clone() for name, tensor in tensors.items() if name.startswith(old)}

    add(tmp_path / "m", extra, num_nextn_predict_layers=1)
    n_extra = sum(name.startswith("model.layers.92.") for name in load_file(tmp_path / "m" / "model.safetensors"))
    loaded = load(str(tmp_path / "m"), tmp_path / "cache")
    assert n_extra > 12  # the experts' own among them
    assert loaded.left_out == f"{START}next-token-prediction block ({n_extra} tensors, model.layers.92.*)"


FLAGS = {"num_nextn_predict_layers": 1, "mtp_loss_lambda": 0.1, "num_mtp_layers": 0}


def test_no_setting_speaks_of_what_was_left_out(tmp_path: Path) -> None:
    loaded = load(str(add(save_tiny(tmp_path / "m", "llama"), copied("model.layers.3."), **FLAGS)), tmp_path / "cache")
    checkpoint.write(tmp_path / "c", loaded, PolicyFile(Policy(), id="none"), {})
    save(loaded.model, loaded.tokenizer, tmp_path / "s", "bf16")
    for settings in (loaded.model.config.to_dict(), *(json.loads((tmp_path / x / "config.json").read_text()) for x in "cs")):
        assert not settings.keys() & FLAGS.keys()
        assert settings["num_hidden_layers"] == 3


def test_a_checkpoint_remembers_what_was_left_out(tmp_path: Path) -> None:
    loaded = load(str(add(save_tiny(tmp_path / "m", "llama"), copied("mtp.layers.0."))), tmp_path / "cache")
    checkpoint.write(tmp_path / "c", loaded, PolicyFile(Policy(), id="none"), {})
    back = checkpoint.load_dense(tmp_path / "c")
    assert back.left_out == loaded.left_out
    assert loaded.left_out in back.notes


def test_a_whole_checkpoint_has_nothing_to_remember(tmp_path: Path) -> None:
    loaded = loaded_tiny(tmp_path, "llama")
    checkpoint.write(tmp_path / "c", loaded, PolicyFile(Policy(), id="none"), {})
    assert checkpoint.load_dense(tmp_path / "c").left_out == ""
    assert "left_out" not in checkpoint.read(tmp_path / "c").marker
