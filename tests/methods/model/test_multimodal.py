"""Checkpoints with a tower: their language model is loaded as one of text, exactly, or the refusal says what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import checkpoint
from methods.model.load import LoadError, load
from methods.model.multimodal import language_model, whole_class
from methods.model.trace import logits_of
from methods.policy import Policy
from methods.policy_file import PolicyFile
from search.export import dense
from tests.edits import edits_of
from tests.tiny import seeded, tiny_tokenizer, tiny_tokens

TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.08,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 4, "hidden_size": 16, "out_hidden_size": 48, "num_heads": 2, "intermediate_size": 24}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _gemma3(layers: int, head: bool) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**VISION, num_hidden_layers=layers, vision_use_head=head)
    text = Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=8)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=120)
    )


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**VISION, num_hidden_layers=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=120)
    )


def _qwen2_5() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": AXES}, vision_config=QWEN_VISION, tie_word_embeddings=True)
    )


def _qwen3_experts() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        **TEXT,
        "rope_parameters": AXES,
        "head_dim": 16,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def _audio() -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2Config

    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(text_config=Qwen2Config(**TEXT).to_dict(), audio_config=audio))


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma3, tower of fewer layers": (lambda: _gemma3(2, False), "Gemma3ForCausalLM"),
    "gemma3, tower of more layers": (lambda: _gemma3(5, False), "Gemma3ForCausalLM"),
    "gemma3, tower with a head": (lambda: _gemma3(2, True), "Gemma3ForCausalLM"),
    "llava": (_llava, "LlamaForCausalLM"),
    "qwen2.5-vl": (_qwen2_5, "Qwen2ForCausalLM"),
    "qwen3-vl-moe": (_qwen3_experts, "Qwen3MoeForCausalLM"),
    "qwen2-audio": (_audio, "Qwen2ForCausalLM"),
}


def _whole(build: Callable[[], Any]) -> Any:
    with seeded(0):
        model = build().float().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).to(torch.bfloat16))
    return model


def _saved(folder: Path, whole: Any) -> Path:
    whole.config.dtype = torch.bfloat16
    # Of the tensors alone: casting the module would round its rotary frequencies too.
    whole.save_pretrained(folder, state_dict={name: tensor.to(torch.bfloat16) for name, tensor in whole.state_dict().items()})
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_language_model_is_what_the_whole_computes_on_text(case: str, tmp_path: Path) -> None:
    build, name = CASES[case]
    whole = _whole(build)
    loaded = load(str(_saved(tmp_path / "whole", whole)), tmp_path / "cache")
    assert loaded.structure.architecture == name == type(loaded.model).__name__
    assert len(loaded.structure.blocks) == 3 and loaded.structure.blocks[2] == "model.layers.2"
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(whole, tiny_tokens()), atol=1e-5)
    assert loaded.structure.tied == (whole.lm_head.weight is whole.get_input_embeddings().weight)
    assert loaded.structure.n_parameters < sum(p.numel() for p in whole.parameters())
    (note,) = loaded.notes
    sense = "an audio" if "audio" in case else "a vision"
    assert note.startswith(
        f"{sense}-language checkpoint ({type(whole).__name__}): its language model alone, {name}, is compressed"
    )


def test_what_is_exported_is_the_language_model(tmp_path: Path) -> None:
    loaded = load(str(_saved(tmp_path / "whole", _whole(_llava))), tmp_path / "cache")
    policy, edits = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w8a16-g16"})
    dense.export(tmp_path / "out", loaded, PolicyFile(policy), edits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"]) and "vision_config" not in config
    again = load(str(tmp_path / "out"), tmp_path / "cache")
    assert (again.structure.blocks, again.notes) == (loaded.structure.blocks, ())
    plain = tmp_path / "plain"
    dense.export(plain, loaded, PolicyFile(Policy()), {})
    assert load(str(plain), tmp_path / "cache").digest == loaded.digest


def test_its_checkpoint_is_read_again(tmp_path: Path) -> None:
    loaded = load(str(_saved(tmp_path / "whole", _whole(_qwen2_5))), tmp_path / "cache")
    policy, edits = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[1].name: "w4a16-g16"})
    checkpoint.write(tmp_path / "own", loaded, PolicyFile(policy), edits)
    again = checkpoint.load_dense(tmp_path / "own")
    assert again.structure == loaded.structure
    (layer,) = loaded.structure.sites[1].layers
    assert torch.equal(
        again.model.get_submodule(layer.name).weight, edits[loaded.structure.sites[1].name].linears[layer.name].dense
    )


def test_a_text_model_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    whole = _whole(_llava)
    decoder = whole.get_decoder()
    decoder.register_forward_hook(lambda _module, _args, out: type(out)(last_hidden_state=out.last_hidden_state * 1.01))
    with pytest.raises(ValueError, match=r"its text model alone \(LlamaForCausalLM\) computes other logits than the whole"):
        language_model(whole)


def test_refused_by_name_where_there_is_no_class_of_text(tmp_path: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"vocab_size": 128, "hidden_size": 48, "encoder_hidden_size": 16, "intermediate_size": 64, "projection_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 3}  # fmt: skip
    whole = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={**VISION, "num_hidden_layers": 2}))
    folder = _saved(tmp_path / "blip", whole)
    with pytest.raises(
        LoadError, match=r"a vision-language checkpoint \(BlipForConditionalGeneration\); its language model alone can be"
    ):
        load(str(folder), tmp_path / "cache")


def test_which_configurations_have_a_tower() -> None:
    assert (
        whole_class({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]})
        == "Gemma3ForConditionalGeneration"
    )
    assert whole_class({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]}) is None
    assert whole_class({"model_type": "llava"}) == "LlavaForConditionalGeneration"
    assert whole_class({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}) is None
