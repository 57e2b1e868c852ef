"""`w8a8-token` on CUDA: one kernel rounds a token to int8, another multiplies, rescales and adds the bias; any number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format, parse_format
from profilers.kernels.device import Device, processors, refuses_target
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.launch import Launch, Meeting, for_matrices
from profilers.kernels.triton_rows import SOURCES, quantized
from profilers.target import Target

_INT32_SAFE_INPUTS = 131072
_FORMAT = parse_format("w8a8-token")


class TritonInt8Linear:
    """Weights (n, k) int8 and a scale (n,) fp32 an output; one call at a time."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, kernel: TritonInt8) -> None:
        self.weight, self.scale, self.bias, self.kernel = weight, scale, bias, kernel
        self._dtype = dtype
        self._meeting = Meeting()

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        n, k = self.weight.shape
        x = x.to(self._dtype).contiguous()
        out = torch.empty((*x.shape[:-1], n), dtype=self._dtype, device=x.device)
        if x.numel():
            self._run(x, out, x.numel() // k)
        return out

    def _run(self, x: Tensor, out: Tensor, m: int) -> None:
        from profilers.kernels import triton_code

        n, k = self.weight.shape
        found = self.kernel.launch(m, n, k)
        room, arrived = self._meeting.memory(found, out, m)
        codes, token_scale = quantized(x, k)
        triton_code.int8_rows[(*found.tiles(m, n), found.parts)](
            codes, self.weight, self.scale, token_scale, self.scale if self.bias is None else self.bias, out, room, arrived, m, n, k,
            BIAS=self.bias is not None, SPLIT=found.parts > 1, BLOCK_M=found.rows, BLOCK_N=found.cols, BLOCK_K=found.depth,
            num_warps=found.warps, num_stages=found.stages,
        )  # fmt: skip

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return (self.weight.float() * self.scale[:, None]).cpu()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.weight.numel() + 4 * self.scale.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.weight.clone(), self.scale.clone(), self.bias, self._dtype, self.kernel)


@dataclass(frozen=True)
class TritonInt8:
    """`triton-int8`. device, parts: for tests, as in `TritonGrouped`."""

    device: Device = "cuda"
    parts: int | None = None

    @property
    def name(self) -> str:
        """`triton-int8`, with `-cpu` behind it where it is interpreted."""
        return "triton-int8" + ("" if self.device == "cuda" else "-cpu")

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def launch(self, m: int, n: int, k: int) -> Launch:
        """How a product of m tokens is divided."""
        found = for_matrices(m, n, k, processors(self.device), depth=128 if m <= 32 else 64, cols=128)
        return found if self.parts is None else replace(found, parts=self.parts)

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if fmt != _FORMAT:
            return f"{_FORMAT.name} only"
        if k > _INT32_SAFE_INPUTS:
            return f"k={k} is above {_INT32_SAFE_INPUTS}, where int32 sums may overflow"
        return refuses_target(target, self.device, "sm80", "triton")

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> TritonInt8Linear:
        """See `LinearKernel`."""
        weight = (payload["codes"].to(torch.int16) - 128).to(torch.int8).to(self.device).contiguous()
        scale = payload["scale"].float().reshape(-1).to(self.device).contiguous()
        kept = None if bias is None else bias.detach().float().to(self.device).contiguous()
        return TritonInt8Linear(weight, scale, kept, target.dtype, self)


_HASH = hash_of(*SOURCES, __file__)
