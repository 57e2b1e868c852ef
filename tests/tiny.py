"""Tiny random models of every supported architecture, and a tokenizer for them: what tests run instead of checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128
HIDDEN = 96
INNER = 160

_GQA: dict[str, Any] = {
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
_MHA = {name: value for name, value in _GQA.items() if name != "num_key_value_heads"}
_EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_GQA, tie_word_embeddings=True)


def _llama_untied() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_GQA, tie_word_embeddings=False, attention_bias=True)


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_GQA, sliding_window=8, tie_word_embeddings=False)


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_GQA, tie_word_embeddings=True)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_GQA, head_dim=16, tie_word_embeddings=False)


def _gemma() -> Any:
    from transformers import GemmaConfig

    return GemmaConfig(**_GQA, head_dim=16)


def _gemma2() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(**_GQA, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(**_GQA, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=kinds)


def _gpt2() -> Any:
    from transformers import GPT2Config

    sizes = {"vocab_size": VOCABULARY, "n_positions": 256, "n_embd": HIDDEN, "n_layer": 3, "n_head": 6, "n_inner": INNER}
    return GPT2Config(**sizes, initializer_range=0.08, bos_token_id=1, eos_token_id=2)


def _opt(pre_norm: bool) -> Any:
    from transformers import OPTConfig

    sizes = {**_MHA, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "init_std": 0.08}
    sizes = {name: value for name, value in sizes.items() if name not in ("intermediate_size", "initializer_range")}
    return OPTConfig(**sizes, do_layer_norm_before=pre_norm)


def _neox(parallel: bool) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**_MHA, use_parallel_residual=parallel)


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)


def _qwen2_moe() -> Any:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(**_GQA, **_EXPERTS, shared_expert_intermediate_size=64)


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**_GQA, **_EXPERTS, head_dim=16)


def _phi() -> Any:
    from transformers import PhiConfig

    return PhiConfig(**_GQA)


def _phi3() -> Any:
    from transformers import Phi3Config

    return Phi3Config(**_GQA)


def _falcon() -> Any:
    from transformers import FalconConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 6}
    return FalconConfig(**sizes, ffn_hidden_size=INNER, initializer_range=0.08, bos_token_id=1, eos_token_id=2)


def _stablelm() -> Any:
    from transformers import StableLmConfig

    return StableLmConfig(**_GQA)


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-untied": _llama_untied,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "opt": lambda: _opt(True),
    "opt-post-norm": lambda: _opt(False),
    "neox": lambda: _neox(True),
    "neox-sequential": lambda: _neox(False),
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "qwen3-moe": _qwen3_moe,
    "phi": _phi,
    "phi3": _phi3,
    "falcon": _falcon,
    "stablelm": _stablelm,
}
_EVEN = {
    **_GQA,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_NAMED = {name: _GQA[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")}
_GPT = {**_NAMED, "n_embd": 128, "n_layer": 2, "n_head": 8, "n_inner": 192, "n_positions": 256}
_FALCON = {**_NAMED, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
_OLD = {name: value for name, value in _EVEN.items() if name != "num_key_value_heads"}
_MIXTURE = {**_EVEN, "num_experts_per_tok": 2, "head_dim": 16}

_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True}),
    "falcon-40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon-rw": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "bigcode": ("gpt_bigcode", {**_GPT}),
    "bigcode-mha": ("gpt_bigcode", {**_GPT, "multi_query": False}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8}),
    "gpt2-even": ("gpt2", {**_GPT}),
    "bloom": ("bloom", {**_NAMED, "hidden_size": 128, "n_layer": 2, "n_head": 8}),
    "mpt": (
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": 128, "n_layers": 2, "n_heads": 8, "expansion_ratio": 2, "max_seq_len": 256},
    ),
    "gpt-neo": (
        "gpt_neo",
        {
            **_NAMED,
            "hidden_size": 128,
            "num_layers": 2,
            "num_heads": 8,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "neox-even": ("gpt_neox", {**_OLD}),
    "phi-even": ("phi", {**_EVEN}),
    "phi-tied": ("phi", {**_EVEN, "tie_word_embeddings": True}),
    "stablelm-even": ("stablelm", {**_EVEN}),
    "gemma-even": ("gemma", {**_EVEN, "head_dim": 16}),
    "nanochat": ("nanochat", {**_EVEN}),
    "starcoder2": ("starcoder2", {**_EVEN}),
    "mixtral-even": ("mixtral", {**_MIXTURE, "num_local_experts": 4, "sliding_window": None}),
    "qwen2-moe-even": (
        "qwen2_moe",
        {**_MIXTURE, "num_experts": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3-moe-even": ("qwen3_moe", {**_MIXTURE, "num_experts": 3, "moe_intermediate_size": 32}),
    "granite-moe": ("granitemoe", {**_EVEN, "num_experts_per_tok": 2, "num_local_experts": 3}),
}
"""Further ones, by `model_type` and configuration: all sizes are multiples of 32, as some runtimes ask for."""

ARCHITECTURES: list[str] = list(_CONFIGS)
"""What `tiny_model` builds: 3 blocks, hidden size 96, 6 heads of 16 (3 key/value heads where the architecture has GQA)."""

MORE_ARCHITECTURES: list[str] = list(_MORE)
"""What it builds beside these, for tests of single kinds: 2 blocks, hidden size 128, 8 heads of 16 (4 key/value heads)."""


def _config(arch: str) -> Any:
    from transformers import CONFIG_MAPPING

    if arch in _CONFIGS:
        return _CONFIGS[arch]()
    kind, sizes = _MORE[arch]
    return CONFIG_MAPPING[kind](**sizes)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator at `seed` inside, as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_config(arch: str) -> Any:
    """The configuration of `tiny_model`."""
    return _CONFIGS[arch]()


def tiny_model(arch: str, seed: int = 0, *, stock: bool = False) -> Any:
    """A random model in fp32, eval mode, without gradients; norms and biases are random too, so that no test passes on ones.

    Experts are plain linears, as `methods.model.load` returns them; `stock=True` leaves them as transformers fuses them.
    """
    from transformers import AutoModelForCausalLM

    from methods.model.experts import unfuse_experts

    with seeded(seed):
        model = AutoModelForCausalLM.from_config(_config(arch), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.data.normal_(std=0.08)
    if not stock:
        unfuse_experts(model)
    return model.eval().requires_grad_(False)


def tiny_tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length) without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens: 4 special ones, printable ASCII, then merges of a fixed text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = ["the quick brown fox jumps over the lazy dog, again and again, while the rain in the plain stays the same."]
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(text, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tiny(folder: Path, arch: str = "llama", seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint folder (config, safetensors in `dtype`, tokenizer) as the hub would hold it; returns `folder`."""
    model = tiny_model(arch, seed, stock=True).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
