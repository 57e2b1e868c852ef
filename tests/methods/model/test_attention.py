"""The heads of every block: read where blocks are alike, refused by name where a model is a hybrid or its blocks differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.model.attention import Heads, check_alike, heads
from methods.model.describe import UnsupportedModel, describe
from methods.model.experts import unfuse_experts
from methods.model.load import load
from methods.model.trace import logits_of, probe_tokens
from tests.tiny import save_tiny, tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STATES = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
MIXED = ["full_attention", "linear_attention", "full_attention", "linear_attention"]

LONE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}

HYBRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "jamba": ({**STATES, "num_experts": 6, "attn_layer_period": 2, "attn_layer_offset": 0}, "2 of JambaMambaDecoderLayer"),
    "bamba": (
        {**STATES, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
        "in 3 of 4 blocks",
    ),
    "qwen3_next": ({**LINEAR, **LONE, "layer_types": MIXED}, "LinearAttentionLayer in 2 of 4"),
    "qwen3_5_text": ({**LINEAR, "layer_types": MIXED}, "LinearAttentionLayer in 2 of 4"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv", "conv"]}, "in 3 of 4 blocks"),
    "recurrent_gemma": ({"lru_width": 48, "attention_window_size": 16, "head_dim": 8}, "LinearAttentionLayer in 3 of 4"),
    "minimax": ({"layer_types": MIXED, "num_local_experts": 2}, "LinearAttentionLayer in 2 of 4"),
    "olmo_hybrid": ({**LINEAR, "layer_types": MIXED}, "2 of OlmoHybridAttention"),
}


def _built(kind: str, **extra: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **extra}), dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids_are_called_by_that_name(kind: str) -> None:
    extra, told = HYBRIDS[kind]
    model = _built(kind, **extra)
    unfuse_experts(model)
    with pytest.raises(UnsupportedModel, match=rf"{type(model).__name__} is a hybrid: .*({told})"):
        describe(model)


def test_encoders_are_no_decoders() -> None:
    with pytest.raises(UnsupportedModel, match="BertLMHeadModel reads tokens ahead, as an encoder does"):
        describe(_built("bert"))
    assert describe(_built("bert", is_decoder=True)).n_kv_heads == 6


def test_latent_attention_has_no_single_head_size() -> None:
    model = _built("deepseek_v3", **LATENT, num_key_value_heads=6, first_k_dense_replace=4)
    with pytest.raises(UnsupportedModel, match="keeps 12 channels a head as keys and 4 as values"):
        describe(model)


def test_blocks_with_different_heads_are_refused_without_an_entry_that_says_so() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    extra = {"layer_types": kinds, "head_dim": 8, "v_head_dim": 8, "num_local_experts": 2, "sliding_window": 8}
    model = _built("mimo_v2_flash", **extra, mlp_layer_types=["dense"] * 4)
    with pytest.raises(UnsupportedModel, match="3 key/value heads of 8 in 2 blocks, 6 key/value heads of 8 in 2 blocks"):
        describe(model)


def test_a_configuration_of_uneven_blocks_is_refused_before_an_attribute_raises() -> None:
    model = _built(
        "gemma4_text", head_dim=8, global_head_dim=16, **PER_LAYER, layer_types=["sliding_attention", "full_attention"] * 2
    )
    with pytest.raises(RuntimeError, match="head_dim"):
        getattr(model.config, "head_dim", None)
    with pytest.raises(
        UnsupportedModel, match=r"Gemma4ForCausalLM: per_layer_config gives blocks 1, 3 a head_dim of their own"
    ):
        describe(model)


def test_an_entry_that_the_architecture_ignores_is_refused(tmp_path: Any) -> None:
    import json

    path = save_tiny(tmp_path / "llama") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "per_layer_config": {"1": {"intermediate_size": 64, "attention_bias": True}}}))
    with pytest.raises(UnsupportedModel, match="blocks 1 a attention_bias, intermediate_size of their own"):
        load(str(tmp_path / "llama"), tmp_path / "cache")
    equal = {"1": {"intermediate_size": config["intermediate_size"]}}
    path.write_text(json.dumps({**config, "per_layer_config": equal}))
    assert load(str(tmp_path / "llama"), tmp_path / "cache").structure.head_dim == 16


def test_a_block_that_is_left_out_is_refused() -> None:
    from transformers import LlamaConfig

    with pytest.raises(UnsupportedModel, match="blocks 2 a skip of their own"):
        check_alike(LlamaConfig(**SIZES, per_layer_config={2: {"skip": ["mlp"]}}), "a model")


@pytest.mark.parametrize(("arch", "expected"), [("llama", (6, 3, 16)), ("falcon", (6, 1, 16)), ("gpt2", (6, 6, 16))])
def test_heads_are_read_off_the_cache(arch: str, expected: tuple[int, int, int]) -> None:
    model, ids = tiny_model(arch), probe_tokens(128)
    assert heads(model, ids, logits_of(model, ids), 3) == Heads(*expected)


def test_a_number_that_the_projections_contradict_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_attention_heads = 5
    with pytest.raises(UnsupportedModel, match="5 heads of 16 channels do not make the 96 inputs"):
        describe(model)
    model.config.__dict__["num_attention_heads"] = [6, 6, 6]
    with pytest.raises(UnsupportedModel, match=r"num_attention_heads=\[6, 6, 6\] is no single number"):
        describe(model)
