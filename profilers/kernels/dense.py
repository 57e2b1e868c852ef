"""Dense kernels: torch's linear, and oneDNN's on a weight that was packed once instead of at every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from methods.formats.format import Format
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.target import Target, multiplies_bf16


class DenseLinear:
    """A dense weight; activations are converted to its dtype where they differ."""

    def __init__(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, packed: Tensor | None, m: int) -> None:
        self.weight, self.bias, self._out, self._packed, self._m = weight, bias, out_dtype, packed, m
        self._dtype = weight.dtype
        self._operator = None if packed is None else torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        if x.dtype is not self._dtype:
            x = x.to(self._dtype)
        if self._operator is None:
            y = functional.linear(x, self.weight, self.bias)
        else:
            y = self._operator(x, self._packed, self.bias, "none", [], "")
        return y if y.dtype is self._out else y.to(self._out)

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return (self.weight if self._packed is None else self._packed.to_dense()).float().cpu()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.weight.numel() * self.weight.element_size()

    def clone(self) -> Self:
        """See `Prepared`."""
        if self._packed is None:
            return type(self)(self.weight.clone(), self.bias, self._out, None, self._m)
        return type(self)(self.weight, self.bias, self._out, _reordered(self._packed.to_dense(), self._m), self._m)


def multiplied_in(fmt: Format, target: Target) -> torch.dtype:
    """The dtype that weights of a dense format are multiplied in: bf16 where they and the target are, fp32 otherwise."""
    return torch.bfloat16 if fmt.dense == "bf16" and target.compute_dtype == "bf16" else torch.float32


def _reordered(weight: Tensor, m: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    return packed


@dataclass(frozen=True)
class Dense:
    """Weights as stored: bf16 where the target multiplies in bf16, fp32 otherwise.

    prepacked: oneDNN's blocked layout, which eager torch would rebuild at every bf16 call.
    """

    prepacked: bool = False

    @property
    def name(self) -> str:
        """`dense` or `dense-prepacked`."""
        return "dense-prepacked" if self.prepacked else "dense"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if not fmt.dense or fmt.rank:
            return "dense formats only, of one matrix"
        if self.prepacked and target.device != "cpu":
            return f"runs on cpu, not on {target.device}"
        if self.prepacked and not torch._C._has_mkldnn:
            return "this torch was built without oneDNN"
        if self.prepacked and target.present and multiplied_in(fmt, target) == torch.bfloat16 and not multiplies_bf16():
            return "oneDNN packs no bf16 on this CPU"
        return None

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> DenseLinear:
        """See `LinearKernel`."""
        dtype = multiplied_in(fmt, target)
        weight = payload["weight"].detach().to(target.device, dtype).contiguous()
        packed = _reordered(weight, m) if self.prepacked else None
        # The packed copy is all that a call reads; of the plain one only the shape and dtype are kept.
        kept = weight if packed is None else torch.empty((), dtype=dtype).expand(weight.shape)
        return DenseLinear(kept, None if bias is None else bias.detach().to(target.device, dtype), target.dtype, packed, m)


_HASH = hash_of(__file__)
