"""A GGUF's metadata: the model that is read is the one that was written, for every architecture, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from methods.model.gguf import UnreadableGGUF, convert
from methods.model.gguf_header import Header
from methods.model.gguf_metadata import MODEL_TYPES, read_description
from methods.model.load import load
from methods.model.trace import logits_of
from tests.gguf_files import ARCHITECTURES, write_gguf
from tests.tiny import HIDDEN, INNER, VOCABULARY, seeded, tiny_model, tiny_tokens

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _built(config):
    """A random model of a configuration, norms and biases random too."""
    with seeded(0):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def _experts(**more):
    return {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, **more}


def _rope(base, **more):
    return {"rope_type": "default", "rope_theta": base, **more}


MODELS = {
    # Every size and rule differs from its class's default where a file can say so.
    "llama": lambda: transformers.LlamaConfig(**SIZES, rms_norm_eps=0.05, rope_parameters=_rope(5e5), head_dim=24),
    "llama with biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, rope_parameters=_rope(1e6), tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=24, rope_parameters=_rope(1e6)),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SIZES, **_experts(shared_expert_intermediate_size=64)),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **_experts(head_dim=24, norm_topk_prob=True)),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=24, query_pre_attn_scalar=24, sliding_window=8, attn_logit_softcapping=3.0, final_logit_softcapping=2.0
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **(SIZES | {"num_hidden_layers": 7}), head_dim=24, query_pre_attn_scalar=24, sliding_window=8
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=8, rope_parameters=_rope(5e4, partial_rotary_factor=0.5)),
    "stablelm": lambda: transformers.StableLmConfig(
        **SIZES, use_qkv_bias=True, layer_norm_eps=0.05, rope_parameters=_rope(1e4, partial_rotary_factor=0.5)
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES, norm_epsilon=0.05, rope_parameters=_rope(1e6)),
    "nemotron": lambda: transformers.NemotronConfig(
        **SIZES, norm_eps=0.05, rope_parameters=_rope(5e4, partial_rotary_factor=0.25), tie_word_embeddings=False
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=6, ffn_hidden_size=INNER,
        initializer_range=0.08, layer_norm_epsilon=0.05, rope_parameters=_rope(5e4), bos_token_id=1, eos_token_id=2,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=HIDDEN, n_layer=3, n_head=6, n_inner=INNER, layer_norm_epsilon=0.05,
        initializer_range=0.08, bos_token_id=1, eos_token_id=2,
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=3, n_head=6, layer_norm_epsilon=0.05, initializer_range=0.08
    ),
}  # fmt: skip


def test_every_architecture_is_compared():
    assert {ARCHITECTURES[name.split()[0]] for name in MODELS} == set(MODEL_TYPES)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_one_that_was_written(name, tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf", _built(MODELS[name]()), name=name)
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(model, tiny_tokens()), atol=2e-5)
    assert loaded.notes == ()


@pytest.mark.parametrize(("n_blocks", "scalar"), [(26, 128), (46, 144)])
def test_a_large_gemma_divides_its_queries_by_the_width_of_a_head(n_blocks, scalar):
    """The file does not say so: Gemma 2 27B is known by its 46 blocks, and 4608 channels over 32 heads are 144, where heads have 128."""
    sizes = {"block_count": n_blocks, "context_length": 8192, "embedding_length": 4608, "attention.head_count": 32}
    sizes |= {"attention.key_length": 128, "attention.sliding_window": 4096, "attention.layer_norm_rms_epsilon": 1e-6}
    metadata = {"general.architecture": "gemma2", **{f"gemma2.{key}": value for key, value in sizes.items()}}
    settings = read_description(Header(Path("gemma.gguf"), "gemma2", metadata, {}, {})).settings
    assert settings["query_pre_attn_scalar"] == scalar
    assert settings["layer_types"][:3] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_sizes_that_older_files_do_not_name_are_read_off_the_tensors(tmp_path):
    left_out = ("vocab_size", "expert_feed_forward_length", "expert_shared_feed_forward_length", "attention.head_count_kv")
    config = transformers.Qwen2MoeConfig(**(SIZES | {"num_key_value_heads": 6}), **_experts(shared_expert_intermediate_size=64))
    changed = {f"{{arch}}.{key}": None for key in left_out}
    model = write_gguf(tmp_path / "tiny.gguf", _built(config), changed=changed)
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(model, tiny_tokens()), atol=2e-5)


NEUTRAL = {
    "{arch}.attention.causal": True,
    "{arch}.logit_scale": 1.0,
    "{arch}.residual_scale": 0.0,
    "{arch}.expert_count": 0,
    "{arch}.attention.sliding_window": 4096,
    "{arch}.rope.scaling.finetuned": True,
    "{arch}.tensor_data_layout": "Meta AI original pth",
    "general.type": "model",
    "quantize.imatrix.file": "imatrix.dat",
    "tokenizer.ggml.eot_token_id": 2,
}


def test_what_changes_nothing_is_let_pass(tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), changed=NEUTRAL)
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(model, tiny_tokens()), atol=1e-5)
    assert loaded.notes == ()


EXTRA = np.ones((HIDDEN, HIDDEN), dtype=np.float32)
REFUSED = [
    ({"{arch}.logit_scale": 0.0625}, {}, r"llama\.logit_scale = 0\.0625 is not understood"),
    ({"{arch}.residual_scale": 0.22}, {}, r"llama\.residual_scale = 0\.22 is not understood"),
    ({"{arch}.embedding_scale": 12.0}, {}, r"llama\.embedding_scale = 12\.0 is not understood"),
    ({"{arch}.attention.scale": 0.015625}, {}, r"llama\.attention\.scale = 0\.015625 is not understood"),
    ({"{arch}.attention.causal": False}, {}, r"llama\.attention\.causal = False is not understood"),
    ({"{arch}.attention.clamp_kqv": 8.0}, {}, r"llama\.attention\.clamp_kqv = 8\.0 is not understood"),
    ({"{arch}.final_logit_softcapping": 30.0}, {}, r"llama\.final_logit_softcapping = 30\.0 is not understood"),
    ({"{arch}.expert_count": 8}, {}, r"llama\.expert_count = 8 is not understood"),
    ({"{arch}.a_key_of_tomorrow": 1}, {}, r"llama\.a_key_of_tomorrow = 1 is not understood"),
    ({"{arch}.attention.sliding_window": 64}, {}, r"llama\.attention\.sliding_window = 64 is a window"),
    ({"{arch}.attention.value_length": 32}, {}, r"llama\.attention\.value_length = 32 differs from the length of keys, 16"),
    (
        {"{arch}.feed_forward_length": [160, 160, 96]},
        {},
        r"llama\.feed_forward_length = \[160, 160, 96\] differs from block to block",
    ),
    ({"{arch}.block_count": None}, {}, r"llama\.block_count = None is no number of at least 1"),
    ({"{arch}.attention.head_count": "six"}, {}, r"llama\.attention\.head_count = 'six' is no number of at least 1"),
    ({"{arch}.attention.head_count": 0}, {}, r"llama\.attention\.head_count = 0 is no number of at least 1"),
    ({"{arch}.rope.freq_base": float("nan")}, {}, r"llama\.rope\.freq_base = nan is no number of at least 1\.01"),
    ({"{arch}.rope.dimension_count": "all"}, {}, r"llama\.rope\.dimension_count = 'all' is no number of at least 2"),
    ({"{arch}.attention.layer_norm_rms_epsilon": None}, {}, r"epsilon = None is missing"),
    ({"split.count": 3}, {}, r"split\.count = 3 says that this is one of several parts"),
    ({"general.type": "adapter"}, {}, r"general\.type = 'adapter' is no language model"),
    ({}, {"blk.0.attn_output.scale": np.ones(1, dtype=np.float32)}, r"blk\.0\.attn_output\.scale \(1 in all\) has no place"),
    ({}, {"blk.3.attn_q.weight": EXTRA}, r"blk\.3\.attn_q\.weight \(1 in all\) has no place"),
    ({}, {"blk.0.nextn.eh_proj.weight": EXTRA}, r"blk\.0\.nextn\.eh_proj\.weight \(1 in all\) has no place"),
    ({}, {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}, r"blk\.0\.attn_q_norm\.weight \(1 in all\) has no place"),
]


@pytest.mark.parametrize(("changed", "tensors", "message"), REFUSED)
def test_what_is_not_understood_is_refused(changed, tensors, message, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), changed=changed, tensors=tensors)
    with pytest.raises(UnreadableGGUF, match=message) as refusal:
        convert(tmp_path / "tiny.gguf", tmp_path / "cache", str)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("cache/models/*"))
