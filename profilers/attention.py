"""Attention on the project's code, plugged into transformers where its own is `sdpa`: one kernel for a new token, one for a prompt."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from profilers.kernels.build import NoCompiler, library
from profilers.target import Target

NAME = "isolatency"
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)

_POINTERS = ("q", "k", "v", "out")
_SIZES = ("batch", "heads", "kv_heads", "length", "dim", "bf16", "threads")
_STRIDES = ("q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token")
_PLAIN = frozenset({"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"})
"""Options that change nothing for one query without a mask; any other that is set goes to torch."""


class Attention(ctypes.Structure):
    """`struct Attention` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_SIZES, *_STRIDES)),
        ("scale", ctypes.c_double),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, threads: int = 1) -> Tensor:
    """Attention of one query a head: q (b, h, 1, d), k and v (b, h_kv, t, d), all bf16 or all fp32 -> (b, 1, h, d).

    d is one of `HEAD_DIMS` and contiguous. Raises NoCompiler where the kernel cannot be built.
    """
    batch, heads, _, dim = q.shape
    out = q.new_empty((batch, 1, heads, dim))
    library().isolatency_attention(ctypes.byref(_arguments(q, k, v, out, scale, threads)))
    return out


def prompt_kernel(target: Target) -> bool:
    """Whether `attend_prompt` runs on the target's CPU and is for it: with tiles (AMX) torch multiplies bf16 at full speed itself.

    Raises NoCompiler where the kernels cannot be built.
    """
    wanted = target.device == "cpu" and target.compute_dtype == "bf16" and "amx_bf16" not in target.capabilities
    return wanted and bool(library().isolatency_prompt_bytes() == ctypes.sizeof(Attention))


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, scale: float, threads: int = 1) -> Tensor:
    """Causal attention of whole prompts: q (b, h, t, d), k and v (b, h_kv, t, d), all bf16 -> (b, t, h, d).

    Sums in fp32, probabilities in bf16. d is one of `HEAD_DIMS` and contiguous, scale positive; only where `prompt_kernel` says so.
    """
    batch, heads, length, dim = q.shape
    out = q.new_empty((batch, length, heads, dim))
    library().isolatency_prompt(ctypes.byref(_arguments(q, k, v, out, scale, threads)))
    return out


def _arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, threads: int) -> Attention:
    batch, heads, _, dim = q.shape
    return Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        batch, heads, k.shape[1], k.shape[2], dim, q.dtype is torch.bfloat16, threads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale,
    )  # fmt: skip


def fits_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether `attend_prompt` computes exactly this attention: of a whole prompt, each token seeing those before it."""
    return (
        mask is None
        and options.get("is_causal") in (None, True)
        and 1 < q.shape[2] == k.shape[2]
        and q.shape[3] == k.shape[3] == v.shape[3]
        and q.shape[3] in HEAD_DIMS
        and q.dtype is k.dtype is v.dtype is torch.bfloat16
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and _plain(options)
    )


def _plain(options: dict[str, Any]) -> bool:
    return (
        not options.get("dropout")
        and not options.get("output_attentions")
        and all(value is None for name, value in options.items() if name not in _PLAIN)
    )


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether the kernel computes exactly this attention."""
    return (
        mask is None
        and q.shape[2] == 1
        and q.shape[3] == k.shape[3] == v.shape[3]
        and q.shape[3] in HEAD_DIMS
        and q.dtype is k.dtype is v.dtype
        and q.dtype in (torch.bfloat16, torch.float32)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and _plain(options)
    )


def install(model: Any, target: Target) -> bool:
    """Lets a transformers model decode with the kernel; False where its attention is not `sdpa` or the kernel cannot be built.

    On CUDA torch's own attention is one kernel already and stays.
    """
    config = model.config
    if (
        target.device != "cpu"
        or getattr(config, "_attn_implementation", None) != "sdpa"
        or not model._can_set_attn_implementation()
    ):
        return False
    try:
        prompts = prompt_kernel(target)
    except NoCompiler:
        return False
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def forward(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if fits(query, key, value, attention_mask, options):
            return attend(query, key, value, scale, torch.get_num_threads()), None
        if prompts and getattr(module, "is_causal", True) and fits_prompt(query, key, value, attention_mask, options):
            return attend_prompt(query, key, value, scale, torch.get_num_threads()), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
