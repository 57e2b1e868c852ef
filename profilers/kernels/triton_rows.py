"""Rounds activations on a CUDA device in one launch: a scale for every token, or for every group of a token's inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from profilers.kernels.launch import next_power

SOURCES = tuple(str(Path(__file__).with_name(f"{name}.py")) for name in ("triton_code", "triton_rows", "launch", "words"))
"""What every Triton kernel is made of, for `hash_of`."""

_BLOCK = 1024


REACH = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude of the codes."""


def quantized(x: Tensor, group: int, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes of x's shape and the scales (tokens, groups) fp32 by which they are multiplied.

    x: (..., k), contiguous, k a multiple of the group; dtype: of `REACH`. Scales are max|x| / reach, 1 for zeros and NaN where a
    value is not finite, so that nothing hides it.
    """
    from profilers.kernels import triton_code

    k = x.shape[-1]
    m = x.numel() // k
    codes = torch.empty_like(x, dtype=dtype)
    scales = torch.empty((m, k // group), dtype=torch.float32, device=x.device)
    block = min(_BLOCK, next_power(group))
    together = min(_BLOCK // block, next_power(k // group))
    triton_code.quantize_rows[(m, -(-k // group // together))](
        x, codes, scales, k, group, REACH[dtype], GROUPS=together, BLOCK=block, INTEGER=dtype is torch.int8, num_warps=4
    )
    return codes, scales
