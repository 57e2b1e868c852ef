"""torch's own weight-only kernels: int8 by channel and int4 by group, activations in bf16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.target import Target

INT4_GROUPS = (32, 64, 128, 256)
"""Groups that torch's int4 kernels have on every device."""


class Int8PackLinear:
    """Weights (n, k) int8 and a bf16 scale a channel."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias
        self._run = torch.ops.aten._weight_int8pack_mm.default
        self._n, self._k = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        y: Tensor = self._run(x.reshape(-1, self._k), self.weight, self.scale).view(*x.shape[:-1], self._n)
        return y if self.bias is None else y + self.bias

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return (self.weight.float() * self.scale.float()[:, None]).cpu()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.weight.numel() + 2 * self.scale.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.weight.clone(), self.scale.clone(), self.bias)


@dataclass(frozen=True)
class Int8Pack:
    """`int8pack`: `w8a16`."""

    name: str = "int8pack"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if not fmt.plain or (fmt.bits, fmt.group, fmt.symmetric, fmt.act_bits) != (8, -1, True, 16):
            return "w8a16 only"
        return None if target.compute_dtype == "bf16" else "a scalar loop where activations are fp32"

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Int8PackLinear:
        """See `LinearKernel`."""
        weight = (payload["codes"].to(torch.int16) - 128).to(torch.int8).to(target.device).contiguous()
        scale = payload["scale"].reshape(-1).to(target.device).contiguous()
        return Int8PackLinear(weight, scale, None if bias is None else bias.detach().bfloat16().to(target.device))


class Int4PackLinear:
    """torch's packed int4 layout, of the CPU or of CUDA, with (scale, zero) pairs (k / group, n, 2) bf16."""

    def __init__(self, weight: Tensor, scales: Tensor, group: int, bias: Tensor | None, shape: tuple[int, int]) -> None:
        self.weight, self.scales, self.group, self.bias = weight, scales, group, bias
        self._n, self._k = shape
        operators = torch.ops.aten
        self._run = (operators._weight_int4pack_mm if weight.is_cuda else operators._weight_int4pack_mm_for_cpu).default

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        y: Tensor = self._run(x.reshape(-1, self._k).contiguous(), self.weight, self.group, self.scales).view(
            *x.shape[:-1], self._n
        )
        return y if self.bias is None else y + self.bias

    def dequant(self) -> Tensor:
        """See `Prepared`. torch has no inverse of its layout: codes come back by multiplying unit rows, exact with unit scales."""
        device = self.scales.device
        unit = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device=device).expand_as(self.scales).contiguous()
        eye = torch.eye(self._k, dtype=torch.bfloat16, device=device)
        codes = self._run(eye, self.weight, self.group, unit).T.float().cpu()
        grid = (codes - 8).view(self._n, -1, self.group)
        scale, zero = (self.scales[..., i].T.float().cpu()[..., None] for i in (0, 1))
        weight: Tensor = (grid * scale + zero).view(self._n, self._k)
        return weight

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.weight.numel() * self.weight.element_size() + 2 * self.scales.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.weight.clone(), self.scales.clone(), self.group, self.bias, (self._n, self._k))


def refuses_int4(fmt: Format, n: int, k: int, multiple: int) -> str | None:
    """Why torch's int4 layout, whose outputs come in a multiple of so many, does not hold (n, k) weights of a format, or None."""
    if not fmt.plain or (fmt.bits, fmt.act_bits, fmt.symmetric) != (4, 16, True) or fmt.group not in INT4_GROUPS:
        return f"w4a16 with groups of {INT4_GROUPS}, symmetric"
    if n % multiple or k % fmt.group:
        return f"n={n} must be a multiple of {multiple} and k={k} of the group {fmt.group}"
    return None


@dataclass(frozen=True)
class Int4Pack:
    """`int4pack`: `w4a16-g{32,64,128,256}`, symmetric.

    torch stores `offset + 8 * scale` in bf16, which an asymmetric payload's sum does not fit in general.
    """

    name: str = "int4pack"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        reason = refuses_int4(fmt, n, k, 16)
        return reason or (None if target.compute_dtype == "bf16" else "a scalar loop where activations are fp32")

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Int4PackLinear:
        """See `LinearKernel`."""
        codes, scale = payload["codes"], payload["scale"]
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 1)
        pairs = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).contiguous()
        rounded = None if bias is None else bias.detach().bfloat16()
        return Int4PackLinear(weight, pairs, fmt.group, rounded, (codes.shape[0], codes.shape[1]))


_HASH = hash_of(__file__)
