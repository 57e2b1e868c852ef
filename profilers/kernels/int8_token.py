"""`w8a8-token`: int8 by int8 with one scale a token and one a channel, on torch's integer matrix product."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.grouped import Layer, layer_of, refuses
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.native import FILES, bind, padded
from profilers.target import Target


class Int8TokenLinear:
    """Weights (n, k) int8; activations are rounded and sums rescaled by the project's C++."""

    def __init__(self, weight: Tensor, scale: Tensor, layer: Layer, bias: Tensor | None) -> None:
        self.weight, self.scale, self.layer, self.bias = weight, scale, layer, bias
        layer.bias = bias.data_ptr() if bias is not None else None
        self._address = ctypes.addressof(layer)
        self._quantize = bind("native", "isolatency_quantize", 4, 1)
        self._rescale = bind("native", "isolatency_rescale", 5, 1)
        self._n, self._k = weight.shape
        self._transposed = weight.t()
        self._dtype = torch.bfloat16 if layer.bf16 else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        x = x.to(self._dtype).contiguous()
        m = x.numel() // self._k
        q = torch.empty((m, self._k), dtype=torch.int8)
        rows = torch.empty(m, dtype=torch.float32)
        self._quantize(self._address, x.data_ptr(), q.data_ptr(), rows.data_ptr(), m)
        sums = torch._int_mm(q, self._transposed)
        y = x.new_empty(*x.shape[:-1], self._n)
        self._rescale(self._address, sums.data_ptr(), rows.data_ptr(), self.scale.data_ptr(), y.data_ptr(), m)
        return y

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return self.weight.float() * self.scale[:, None]

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.weight.numel() + 2 * self.scale.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.weight.clone(), self.scale.clone(), Layer.from_buffer_copy(self.layer), self.bias)


@functools.cache
def sums_exactly() -> bool:
    """Whether `torch._int_mm` gives the integers that it should.

    Below VNNI, and where `ONEDNN_MAX_CPU_ISA` says so, oneDNN adds products in pairs of 16 bits that saturate.
    """
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())


@dataclass(frozen=True)
class Int8Token:
    """`int8-mm`: fast for many rows where the CPU has int8 matrix instructions."""

    name: str = "int8-mm"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if not fmt.plain or (fmt.bits, fmt.group, fmt.symmetric, fmt.act_bits, fmt.act_group) != (8, -1, True, 8, -1):
            return "w8a8-token only"
        if not target.capabilities & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"}:
            return "torch multiplies int8 with a plain loop on this CPU"
        if target.present and not sums_exactly():
            return "torch's sums of int8 products are not exact on this CPU"
        return refuses(fmt, k, "native")

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Int8TokenLinear:
        """See `LinearKernel`."""
        weight = (payload["codes"].to(torch.int16) - 128).to(torch.int8).contiguous()
        n, k = weight.shape
        layer = layer_of(fmt, n, k, target)
        return Int8TokenLinear(weight, payload["scale"].float().reshape(-1).contiguous(), layer, padded(bias))


_HASH = hash_of(*FILES, __file__)
