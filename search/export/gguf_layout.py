"""Where a model's parameters lie in a GGUF: its architecture, their names there and the order of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from methods.model.structure import Structure
from search.export.gguf_rope import unlike

MODEL = "model.gguf"
"""The file in an exported folder."""


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a class of models.

    name: `general.architecture`; turned: the rows of q and k are stored with the halves of every head interleaved, because this
    architecture rotates neighbours where transformers rotates halves.
    """

    name: str
    turned: bool


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family("llama", True),
        "MistralForCausalLM": Family("llama", True),
        "Qwen2ForCausalLM": Family("qwen2", False),
        "Qwen3ForCausalLM": Family("qwen3", False),
    }
)
"""By transformers' class: those whose files were loaded into llama.cpp and transformers and compared (`spaces.runtimes`)."""


def family(structure: Structure, config: Any) -> Family:
    """The model's family; raises ValueError, with the reason, for a model that the file could not describe."""
    found = FAMILIES.get(structure.architecture)
    if found is None:
        raise ValueError(f"{structure.architecture} is not written to GGUF; only {', '.join(FAMILIES)} are")
    reason = _unlike(found, structure, config)
    if reason:
        raise ValueError(f"{structure.architecture} {reason}; it is not written to GGUF")
    return found


def _unlike(found: Family, structure: Structure, config: Any) -> str | None:
    """What of the model is not as llama.cpp's architecture computes or as transformers reads it from a file, or None."""
    rotary = unlike(config, structure.head_dim, found.name)
    if rotary:
        return rotary
    if config.hidden_act != "silu":
        return f"has the activation {config.hidden_act}, where llama.cpp computes silu"
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return f"attends through a window of {window} tokens, which the architecture {found.name} has not"
    default = {"qwen2": structure.d_model // structure.n_heads, "qwen3": 128}.get(found.name, structure.head_dim)
    if structure.head_dim != default:
        return f"has heads of {structure.head_dim}, where transformers takes {default} without reading it from the file"
    has_bias = ("q", "k", "v") if found.name == "qwen2" else ()
    biased = [layer.name for _, layer in structure.layers() if layer.bias and layer.kind not in has_bias]
    return f"has a bias at {biased[0]}, which transformers does not read from the file" if biased else None


def names(parameters: Iterable[str], structure: Structure, kind: Family) -> dict[str, str]:
    """The names in the file, by parameter; raises ValueError for one that the architecture has no place for."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH[kind.name.upper()], len(structure.blocks))
    found = {}
    for parameter in parameters:
        base, _, leaf = parameter.rpartition(".")
        name = known.get_name(base)
        if name is None or leaf not in ("weight", "bias"):
            raise ValueError(f"{parameter} has no place in a GGUF of the architecture {kind.name}")
        found[parameter] = f"{name}.{leaf}"
    return found


def row_order(name: str, structure: Structure, kind: Family) -> NDArray[np.int64] | None:
    """The parameter's rows in the order of the file, None where it is the model's own."""
    heads = {"q_proj": structure.n_heads, "k_proj": structure.n_kv_heads}.get(name.split(".")[-2]) if kind.turned else None
    if heads is None:
        return None
    return np.arange(heads * structure.head_dim).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
