"""Scaled rotary embeddings in a GGUF: metadata for linear scaling and YaRN, a tensor of divisors for Llama 3's rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from methods.model.gguf_rope import AS_BUILT, Rope, plain_frequencies, plain_rope, yarn_rope

TENSOR = "rope_freqs.weight"
"""Where llama.cpp looks for divisors of the frequencies, (head_dim / 2,) fp32."""

WITH_DIVISORS = ("llama",)
"""Architectures for which it looks for them; the others' files would not load with such a tensor."""

BETAS = (32.0, 1.0)
"""Rotations between which llama.cpp lets YaRN's ramp lie, whatever a file of these architectures says; transformers' default, too."""


def kind_of(config: Any) -> str:
    """transformers' name of the rule, `default` for none."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def unlike(config: Any, head_dim: int, architecture: str) -> str | None:
    """What of the rotary embedding the file could not describe, or None; architecture: llama.cpp's name."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind = kind_of(config)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return (
            f"rotates {parameters['partial_rotary_factor']:g} of each head, where llama.cpp's {architecture} rotates all of it"
        )
    if kind == "llama3" and architecture not in WITH_DIVISORS:
        return f"scales its rotary embedding by the rule llama3, which llama.cpp does not read for {architecture}"
    if kind not in ("default", "linear", "yarn", "llama3"):
        return f"scales its rotary embedding by the rule {kind}, which the file does not describe"
    if kind == "yarn" and not _same(_yarn(config, head_dim), config):
        return f"has a YaRN of its own ({dict(parameters)}), which llama.cpp computes otherwise"
    return None


def divisors(config: Any, head_dim: int) -> NDArray[np.float32] | None:
    """What the frequencies are divided by (head_dim / 2,), where the file holds it as a tensor; None where it does not."""
    if kind_of(config) != "llama3":
        return None
    plain = plain_frequencies(float(config.rope_parameters["rope_theta"]), head_dim)
    found: NDArray[np.float32] = (plain / _computed(config)[0].double()).float().numpy()
    return found


def add_rope(writer: Any, config: Any, head_dim: int) -> None:
    """Adds the metadata; writer: a `gguf.GGUFWriter`."""
    from gguf import RopeScalingType

    parameters, kind = config.rope_parameters, kind_of(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "yarn":
        factor, original, scale = _yarn_parameters(config)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(scale)


def _computed(config: Any) -> tuple[torch.Tensor, float]:
    """transformers' frequencies (head_dim / 2,), radians a token, and the factor of its cosines and sines."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind_of(config)](config, torch.device("cpu"))
    return frequencies, float(scale)


def _yarn_parameters(config: Any) -> tuple[float, int, float]:
    """Factor, original positions, and what cosines and sines are multiplied by beside YaRN's own factor."""
    parameters = config.rope_parameters
    original = int(parameters["original_max_position_embeddings"])
    factor = float(parameters.get("factor") or config.max_position_embeddings / original)
    return factor, original, _computed(config)[1] / (1 + 0.1 * float(np.log(max(factor, 1.0))))


def _yarn(config: Any, head_dim: int) -> Rope:
    """As llama.cpp computes it from what is written."""
    factor, original, scale = _yarn_parameters(config)
    plain = plain_rope(float(config.rope_parameters["rope_theta"]), head_dim)
    return yarn_rope(plain, factor, original, *BETAS, scale)


def _same(rope: Rope, config: Any) -> bool:
    frequencies, scale = _computed(config)
    near = torch.allclose(frequencies.double(), rope.frequencies(), rtol=AS_BUILT, atol=0)
    return near and abs(scale - rope.scale) <= AS_BUILT
