"""A GGUF's metadata as a configuration of transformers: every key is used, harmless, or a reason to refuse the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from methods.model.gguf_header import ROTARY_TENSORS, Header, Keys, UnreadableGGUF
from methods.model.gguf_rope import PARTIAL, Rope, plain_rope, read_rope, rope_parameters

MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "qwen2": "qwen2",
        "qwen2moe": "qwen2_moe",
        "qwen3": "qwen3",
        "qwen3moe": "qwen3_moe",
        "gemma2": "gemma2",
        "gemma3": "gemma3_text",
        "phi3": "phi3",
        "stablelm": "stablelm",
        "starcoder2": "starcoder2",
        "nemotron": "nemotron",
        "falcon": "falcon",
        "gpt2": "gpt2",
        "bloom": "bloom",
    }
)
"""transformers' `model_type` by `general.architecture`: those whose files tests compare with the model that they were written from."""

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "block_count": ("num_hidden_layers", "n_layer"),
        "context_length": ("max_position_embeddings", "n_positions"),
        "embedding_length": ("hidden_size", "n_embd"),
        "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
        "attention.head_count": ("num_attention_heads", "n_head"),
        "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
        "vocab_size": ("vocab_size",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "expert_count": ("num_experts",),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
        "expert_weights_norm": ("norm_topk_prob",),
    }
)
"""The configuration's names for a key; a class has at most one of them."""

REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")
"""Without these a class's defaults would stand in for the file's sizes."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attention.output_scale": (0, 1),
        "attention.scale": (0,),
        "attention.shared_kv_layers": (0,),
        "attention.temperature_length": (0,),
        "attention.temperature_scale": (0, 1),
        "attn_logit_softcapping": (0,),
        "embedding_scale": (0, 1),
        "expert_count": (0,),
        "expert_feed_forward_length": (0,),
        "expert_gating_func": (0, 1),
        "expert_group_count": (0, 1),
        "expert_group_used_count": (0, 1),
        "expert_shared_count": (0,),
        "expert_shared_feed_forward_length": (0,),
        "expert_used_count": (0,),
        "expert_weights_scale": (0, 1),
        "final_logit_softcapping": (0,),
        "leading_dense_block_count": (0,),
        "logit_scale": (0, 1),
        "nextn_predict_layers": (0,),
        "pooling_type": (0,),
        "residual_scale": (0, 1),
        "rope.scaling.alpha": (0, 1),
        "rope.scaling.yarn_attn_factor": (1,),
        "rope.scaling.yarn_ext_factor": (1,),
        "rope.scaling.yarn_log_multiplier": (0,),
        "router_logit_softcapping": (0,),
        "tensor_data_layout": ("Meta AI original pth", "jploski"),
    }
)
"""Values with which a key changes nothing in what the model computes, where its class has no name for the key."""

HARMLESS = frozenset({"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"})
"""Keys that no model here computes with, whatever their value; the two belong to a scaling that the file does not name."""

OTHER_KINDS = ("adapter.", "clip.", "diffusion.", "xielu.")
"""Prefixes of metadata that changes what is computed, beside the architecture's own."""

SKIPPED_TENSORS = ("attn_rot_embd.weight", "rotary_emb.inv_freq")
"""Tensors that llama.cpp itself does not read: frequencies that it computes."""

WINDOWED = frozenset({"phi3", "starcoder2", "gemma2", "gemma3"})
"""Architectures whose class attends through the window that the file names."""

LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Blocks of the Gemmas whose queries are divided by the square root of width / heads, and not of the size of a head."""

BIASES: Mapping[str, Mapping[str, str]] = {
    "llama": {"attention_bias": "attn_q", "mlp_bias": "ffn_up"},
    "qwen3": {"attention_bias": "attn_q"},
    "qwen3moe": {"attention_bias": "attn_q"},
    "gemma2": {"attention_bias": "attn_q"},
    "gemma3": {"attention_bias": "attn_q"},
    "stablelm": {"use_qkv_bias": "attn_q"},
    "starcoder2": {"use_bias": "attn_q"},
    "nemotron": {"attention_bias": "attn_q", "mlp_bias": "ffn_up"},
    "falcon": {"bias": "attn_qkv"},
}
"""The configuration's flags for biases, and the linear whose bias in the file tells of them."""


@dataclasses.dataclass(frozen=True)
class Description:
    """A model as its file describes it: transformers' settings, and its rotary embeddings by the name of transformers' buffer."""

    settings: Mapping[str, Any]
    ropes: Mapping[str, Rope]


def read_description(header: Header) -> Description:
    """The whole metadata of a file, read; raises UnreadableGGUF naming the key and value that are not understood."""
    _check_kind(header)
    keys = Keys(header)
    for key in REQUIRED:
        keys.number(key, 0, 1)
    model_type = MODEL_TYPES[header.architecture]
    names = _fields(model_type)
    settings: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": "output.weight" not in header.tensors}
    settings["vocab_size"] = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    settings |= _named(keys, names)
    settings |= _special_tokens(header)
    head_dim = _head_size(keys)
    if "head_dim" in names or head_dim != keys.take("embedding_length") // keys.take("attention.head_count"):
        settings["head_dim"] = head_dim
    settings |= _attention(keys, head_dim) | _biases(header) | _experts(header, names) | _architecture(keys, settings)
    ropes = _rotary(keys, head_dim, settings)
    _check_left(keys)
    return Description(settings, ropes)


def check_tensors(header: Header, used: Collection[str]) -> None:
    """Raises UnreadableGGUF where a tensor of the file is neither in `used` nor known to be no weight of the model."""
    left = [name for name in header.tensors if name not in used and name not in ROTARY_TENSORS]
    left = [name for name in left if not name.endswith(SKIPPED_TENSORS)]
    if left:
        raise UnreadableGGUF(
            f"{header.path}: {', '.join(left[:3])} ({len(left)} in all) has no place in transformers' {header.architecture}; without "
            "it the model would be another one. Give the model's folder with safetensors"
        )


def _check_kind(header: Header) -> None:
    metadata = header.metadata
    if metadata.get("general.type", "model") != "model":
        raise header.refusal("general.type", "is no language model of its own; give the model's file")
    if metadata.get("split.count", 1) not in (0, 1):
        raise header.refusal("split.count", "says that this is one of several parts; join them with llama-gguf-split --merge")
    other = next((key for key in metadata if key.startswith(OTHER_KINDS)), None)
    if other:
        raise header.refusal(other, "belongs to a kind of file that is not read here")
    if header.architecture not in MODEL_TYPES:
        raise header.refusal(
            "general.architecture",
            f"is not one whose files are read; {', '.join(MODEL_TYPES)} are. Give a folder with safetensors",
        )


def _fields(model_type: str) -> set[str]:
    from transformers import CONFIG_MAPPING

    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}


def _named(keys: Keys, names: Collection[str]) -> dict[str, Any]:
    """The settings that a key of the file names; a soft cap of 0 is none."""
    settings = {}
    for key, candidates in NAMES.items():
        name = next((candidate for candidate in candidates if candidate in names), None)
        value = keys.take(key) if name else None
        if name is None or value is None:
            continue
        if not isinstance(value, bool):
            keys.number(key, 0)
        settings[name] = None if key.endswith("softcapping") and not value else value
    if not any(name in settings for key in NAMES if key.endswith("epsilon") for name in NAMES[key]):
        raise keys.refusal("attention.layer_norm_rms_epsilon", "is missing; the file does not describe its norms")
    kv_heads = next((name for name in NAMES["attention.head_count_kv"] if name in names), None)
    if kv_heads:
        settings.setdefault(kv_heads, keys.take("attention.head_count"))
    return settings


def _special_tokens(header: Header) -> dict[str, int | None]:
    roles = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{role}_token_id": header.metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}


def _head_size(keys: Keys) -> int:
    size = keys.number("attention.key_length", 0) or keys.take("embedding_length") // keys.take("attention.head_count")
    if keys.take("attention.value_length", size) != size:
        raise keys.refusal("attention.value_length", f"differs from the length of keys, {size}; only equal ones are computed")
    return int(size)


def _attention(keys: Keys, head_dim: int) -> dict[str, Any]:
    """The window of the attention, which blocks have it, and what divides the queries."""
    arch, settings = keys.header.architecture, {}
    window = keys.number("attention.sliding_window", 0)
    if arch in WINDOWED:
        settings["sliding_window"] = window or None
    elif window and window < keys.take("context_length"):
        raise keys.refusal("attention.sliding_window", f"is a window that transformers' {arch} does not attend through")
    if not arch.startswith("gemma"):
        return settings
    if not window:
        raise keys.refusal("attention.sliding_window", "is missing; half of a Gemma's blocks attend through a window")
    n_blocks = keys.take("block_count")
    sliding = keys.take("attention.sliding_window_pattern", 2 if arch == "gemma2" else 6)
    if not isinstance(sliding, list):
        period = keys.number("attention.sliding_window_pattern", sliding, 1)
        sliding = [bool((block + 1) % period) for block in range(n_blocks)]
    settings["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    scalar = keys.take("embedding_length") // keys.take("attention.head_count") if n_blocks == LARGE_GEMMA[arch] else head_dim
    scale = keys.number("attention.scale", 0)
    settings["query_pre_attn_scalar"] = round(scale**-2) if scale else scalar
    return settings


def _biases(header: Header) -> dict[str, bool]:
    flags = BIASES.get(header.architecture, {})
    return {flag: f"blk.0.{linear}.bias" in header.tensors for flag, linear in flags.items()}


def _experts(header: Header, names: Collection[str]) -> dict[str, Any]:
    """Sizes of the experts, off their tensors: older files do not name them."""
    sizes = {"moe_intermediate_size": "ffn_gate_exps", "shared_expert_intermediate_size": "ffn_gate_shexp"}
    stored = {name: header.tensors.get(f"blk.0.{tensor}.weight") for name, tensor in sizes.items() if name in names}
    settings: dict[str, Any] = {name: tensor.shape[-2] for name, tensor in stored.items() if tensor}
    if header.architecture == "qwen3moe":
        settings["norm_topk_prob"] = True
    return settings


def _architecture(keys: Keys, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What only one architecture has."""
    arch, tensors = keys.header.architecture, keys.header.tensors
    n_heads = keys.take("attention.head_count")
    if arch == "falcon":
        if settings["num_kv_heads"] != 1:
            raise keys.refusal(
                "attention.head_count_kv", "is a layout of q, k, v that transformers does not read from a GGUF; only 1 is"
            )
        return {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}
    if arch == "stablelm":
        # The tensors decide: converters wrote the flag wrongly, and llama.cpp does not read it.
        keys.take("use_parallel_residual")
        return {"use_parallel_residual": not any(".ffn_norm." in name for name in tensors)}
    if arch in ("gpt2", "bloom") and keys.take("attention.head_count_kv", n_heads) != n_heads:
        raise keys.refusal("attention.head_count_kv", f"differs from {n_heads} heads, which a {arch} does not compute")
    if arch == "bloom":
        if keys.take("feed_forward_length", 4 * keys.take("embedding_length")) != 4 * keys.take("embedding_length"):
            raise keys.refusal("feed_forward_length", "is not four times the width, which a bloom's is")
        if keys.take("attention.max_alibi_bias", 8) != 8:
            raise keys.refusal("attention.max_alibi_bias", "is not 8, which a bloom's is")
    return {}


def _rotary(keys: Keys, head_dim: int, settings: dict[str, Any]) -> dict[str, Rope]:
    """Adds `rope_parameters` to the settings; returns the rotary embeddings that the model must have, none where it has positions."""
    arch, model_type = keys.header.architecture, settings["model_type"]
    rope = read_rope(keys, head_dim)
    if arch in ("gpt2", "bloom"):
        return {}
    parameters = rope_parameters(rope, model_type, head_dim)
    if rope.rotated != head_dim and model_type not in PARTIAL:
        raise keys.refusal(
            "rope.dimension_count", f"is a part of the head ({head_dim}), and transformers' {arch} rotates all of it"
        )
    if model_type == "phi3":
        settings["original_max_position_embeddings"] = rope.original
    local = float(keys.number("rope.freq_base_swa", 10_000.0 if arch == "gemma3" else rope.base, 1.01))
    if arch != "gemma3":
        if local != rope.base:
            raise keys.refusal("rope.freq_base_swa", f"differs from {rope.base}, and transformers' {arch} has one base")
        settings["rope_parameters"] = parameters
        return {"inv_freq": rope}
    sliding = plain_rope(local, head_dim)
    settings["rope_parameters"] = {
        "full_attention": parameters,
        "sliding_attention": rope_parameters(sliding, model_type, head_dim),
    }
    both = {"full_attention": rope, "sliding_attention": sliding}
    return {f"{kind}_inv_freq": both[kind] for kind in sorted(set(settings["layer_types"]))}


def _check_left(keys: Keys) -> None:
    for key, value in keys.left().items():
        if key not in HARMLESS and value not in NEUTRAL.get(key, ()):
            raise keys.refusal(
                key, "is not understood; without it the model might be another one. Give the model's folder with safetensors"
            )
