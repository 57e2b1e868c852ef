"""Dense weights of which nine in ten or more are zero, as compressed sparse rows: the project's own `csr.cpp`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from methods.formats.format import Format
from profilers.kernels.build import Isa
from profilers.kernels.dense import multiplied_in
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.native import FILES, NativeLinear, padded, refuses_build
from profilers.target import Target

LEAST_ZEROS = 90
"""Per cent; at 70, gathering takes longer than multiplying with the zeros nearly everywhere."""

_COLUMNS = 65536
_BEYOND = 16  # what the kernel may read behind the last value


class Sparse(ctypes.Structure):
    """`struct Sparse` of csr.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("narrow", "bf16", "threads")),
        *((name, ctypes.c_void_p) for name in ("starts", "columns", "values", "bias")),
    )


class CsrLinear(NativeLinear):
    """A weight (n, k): values (kept + 16,) bf16 or fp32 row after row, their columns int16 as unsigned, starts (n + 1,) int32."""

    __slots__ = ("columns", "starts", "values")

    layer: Sparse

    def __init__(
        self, layer: Sparse, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, isa: Isa = "native"
    ) -> None:
        super().__init__("isolatency_csr", layer, bias, isa)
        self.values, self.columns, self.starts = values, columns, starts
        layer.values, layer.columns, layer.starts = values.data_ptr(), columns.data_ptr(), starts.data_ptr()

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        rows = torch.repeat_interleave(torch.arange(self._n), self.starts.diff().long())
        weight = torch.zeros(self._n, int(self.layer.k))
        weight[rows, self.columns[:-_BEYOND].long() & (_COLUMNS - 1)] = self.values[:-_BEYOND].float()
        return weight

    def size_bytes(self) -> int:
        """See `Prepared`."""
        kept = self.values.numel() - _BEYOND
        return kept * (self.values.element_size() + 2) + 4 * self.starts.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        parts = self.values.clone(), self.columns.clone(), self.starts.clone()
        return type(self)(Sparse.from_buffer_copy(self.layer), *parts, self.bias, self.isa)


@dataclass(frozen=True)
class Csr:
    """`csr`: values in the dense dtype with 16-bit columns; sums in fp32. An input that no weight of an output reads does not show in it,
    not even where it is NaN.
    isa: code path to compile, for tests; `native` takes the best of this CPU.
    """

    isa: Isa = "native"

    @property
    def name(self) -> str:
        """`csr`, or with the forced path."""
        return "csr" if self.isa == "native" else f"csr-{self.isa}"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if fmt.zeros < LEAST_ZEROS or fmt.every:
            return f"dense formats of which {LEAST_ZEROS} per cent or more are zero"
        if k > _COLUMNS or k % 16:
            return f"k={k} is above {_COLUMNS} or not a multiple of 16"
        return refuses_build(self.isa)

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> CsrLinear:
        """See `LinearKernel`; raises ValueError for a weight with fewer zeros than the format says."""
        weight = payload["weight"].detach()
        n, k = weight.shape
        mask = weight != 0
        kept = int(mask.sum())
        if kept > fmt.kept(n, k):
            raise ValueError(
                f"csr: {kept} of {n * k} weights are not zero; {fmt.name} has at most {fmt.kept(n, k)}, prune the others"
            )
        values = weight[mask].to(multiplied_in(fmt, target))
        columns = mask.nonzero()[:, 1].to(torch.int32).to(torch.int16)
        starts = functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        layer = Sparse(
            n=n,
            k=k,
            narrow=values.dtype == torch.bfloat16,
            bf16=target.compute_dtype == "bf16",
            threads=target.threads,
        )
        values, columns = (functional.pad(part, (0, _BEYOND)) for part in (values, columns))
        return CsrLinear(layer, values, columns, starts, padded(bias), self.isa)


_HASH = hash_of(*FILES, __file__)
