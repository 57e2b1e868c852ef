"""GGUF files of tiny models, as llama.cpp's converter lays them out: what tests read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from tests.tiny import tiny_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "falcon": "falcon",
    "gpt2": "gpt2",
    "bloom": "bloom",
}
"""`general.architecture` by transformers' `model_type`."""

INTERLEAVED = ("llama",)
"""Architectures whose rows of q and k are stored with the halves of every head interleaved."""

Kinds = Callable[[str], str]
"""The type of a weight matrix by its name in the file."""


def write_gguf(
    path: Path,
    model: Any,
    kinds: Kinds = lambda name: "F32",
    *,
    changed: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    without: Collection[str] = (),
    tokenizer: bool = True,
    pre: str | None = "smollm",
    name: str | None = None,
) -> Any:
    """Writes the model, whose weights become those that the file holds; returns it.

    changed: metadata by key, `{arch}` standing for the architecture; None takes a key away. tensors: further ones, or others in place of
    the model's, as floats. without: tensors left out. pre: the name of the pre-tokenizer.
    """
    arch = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    metadata = {"general.name": name or path.stem, **described(model.config, arch)}
    metadata |= {key.replace("{arch}", arch): value for key, value in (changed or {}).items()}
    for key, value in metadata.items():
        _add_value(writer, key, value)
    if tokenizer:
        add_tokenizer(writer, pre)
    for tensor, (value, kind) in _stored(model, arch, kinds, tensors or {}).items():
        if tensor not in without:
            writer.add_tensor(tensor, np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def described(config: Any, arch: str) -> dict[str, Any]:
    """The architecture's metadata that a converter writes for a configuration."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    base = rope.get("full_attention", rope).get("rope_theta")
    rotated = rope.get("partial_rotary_factor", 1.0) * head_dim
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 256),
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner or getattr(config, "n_inner", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": _n_kv_heads(config),
        "rope.freq_base": float(base) if base else None,
        "rope.dimension_count": int(rotated) if rope else None,
        "vocab_size": config.vocab_size,
        **_sizes_by_architecture(config, arch, head_dim),
        **_epsilon(config),
    }
    return {f"{arch}.{key}": value for key, value in values.items()}


def _n_kv_heads(config: Any) -> int:
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _epsilon(config: Any) -> dict[str, float]:
    if hasattr(config, "rms_norm_eps"):
        return {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    names = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
    return {"attention.layer_norm_epsilon": next(getattr(config, name) for name in names if hasattr(config, name))}


def _sizes_by_architecture(config: Any, arch: str, head_dim: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if arch.startswith(("qwen3", "gemma")) or head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch.startswith("gemma"):
        values |= {"attention.sliding_window": config.sliding_window}
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[key] = getattr(config, key)
    if arch == "phi3":
        values["attention.sliding_window"] = config.sliding_window
    if arch.endswith("moe"):
        values |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        values["expert_feed_forward_length"] = config.moe_intermediate_size
        values["expert_shared_feed_forward_length"] = getattr(config, "shared_expert_intermediate_size", None)
    if arch == "stablelm":
        values["use_parallel_residual"] = config.use_parallel_residual
    if arch == "falcon":
        values["tensor_data_layout"] = "jploski"
    return values


def _add_value(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def add_tokenizer(writer: Any, pre: str | None = "smollm") -> None:
    """The vocabulary of `tests.tiny.tiny_tokenizer`; pre: the name of its pre-tokenizer, if the file says one."""
    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in data["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)


def _stored(model: Any, arch: str, kinds: Kinds, others: Mapping[str, NDArray[Any]]) -> dict[str, tuple[NDArray[Any], Any]]:
    """Values and types by name in the file; the model's matrices become what their types make of them."""
    from methods.model.experts import stock_state_dict

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], model.config.num_hidden_layers)
    found: dict[str, tuple[NDArray[Any], Any]] = {}
    tied = model.config.tie_word_embeddings
    for parameter, tensor in stock_state_dict(model).items():
        if tied and parameter == "lm_head.weight":
            continue
        for name, part in _file_names(parameter, tensor, names):
            value = _turned(part, name, arch, model.config)
            kind = gguf.GGMLQuantizationType[kinds(name)] if value.ndim > 1 else None
            if kind is not None:
                rounded = gguf.quants.quantize(np.ascontiguousarray(value), kind)
                part.copy_(_turned_back(gguf.quants.dequantize(rounded, kind), name, arch, model.config))
                value = rounded
            found[name] = (value, kind)
    for name, value in others.items():
        kind = gguf.GGMLQuantizationType[kinds(name)] if value.ndim > 1 else None
        found[name] = (value if kind is None else gguf.quants.quantize(value, kind), kind)
    return found


def _file_names(parameter: str, tensor: torch.Tensor, names: Any) -> list[tuple[str, torch.Tensor]]:
    """A parameter's names in the file with the views that they hold; fused experts are two tensors there."""
    if parameter.endswith("experts.gate_up_proj"):
        block = parameter.split(".")[2]
        return [
            (f"blk.{block}.ffn_{part}_exps.weight", half) for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True)
        ]
    if parameter.endswith("experts.down_proj"):
        return [(f"blk.{parameter.split('.')[2]}.ffn_down_exps.weight", tensor)]
    base, _, leaf = parameter.rpartition(".")
    name = names.get_name(base) or names.get_name(base.removeprefix("transformer."))
    assert name, parameter
    return [(f"{name}.{leaf}", tensor)]


def _turned(tensor: torch.Tensor, name: str, arch: str, config: Any) -> NDArray[Any]:
    """What the file holds of a parameter."""
    value = tensor.numpy().copy()
    heads = _heads_of(name, arch, config)
    if heads:
        return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return value[0]
    if arch in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return value + 1
    if arch == "gpt2" and value.ndim == 2 and "blk" in name:
        return value.T.copy()
    if arch == "bloom" and "attn_qkv" in name:
        parts = value.reshape(config.n_head, 3, -1, *value.shape[1:])
        return parts.swapaxes(0, 1).reshape(value.shape)
    return value


def _turned_back(value: NDArray[Any], name: str, arch: str, config: Any) -> torch.Tensor:
    """Inverse of `_turned` for matrices."""
    heads = _heads_of(name, arch, config)
    if heads:
        value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    if arch == "gpt2" and "blk" in name:
        value = value.T
    if arch == "bloom" and "attn_qkv" in name:
        value = value.reshape(3, config.n_head, -1, value.shape[1]).swapaxes(0, 1).reshape(value.shape)
    return torch.from_numpy(value.copy())


def _heads_of(name: str, arch: str, config: Any) -> int | None:
    if arch not in INTERLEAVED:
        return None
    kind = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
