"""Many rows at once: decode the packed weight to a scratch matrix and multiply that densely, so that no format is slow at prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.build import Isa
from profilers.kernels.grouped import Grouped, PackedLinear
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.lookup import LookUp
from profilers.kernels.native import FILES, PANEL, bind
from profilers.target import Target

MIN_ROWS = 16
"""Below it, decoding the whole weight costs more than it can save."""

_scratch: dict[torch.dtype, Tensor] = {}


def scratch(n_elements: int, dtype: torch.dtype) -> Tensor:
    """Memory that every decoded layer uses in turn; one thread computes at a time."""
    have = _scratch.get(dtype)
    if have is None or have.numel() < n_elements:
        have = _scratch[dtype] = torch.empty(n_elements, dtype=dtype)
    return have


class DecodedLinear:
    """A packed weight that is decoded at every call."""

    def __init__(self, packed: PackedLinear) -> None:
        self.packed = packed
        layer = packed.layer
        self._dtype = torch.bfloat16 if layer.bf16 else torch.float32
        self._k, self._width = int(layer.k), -(-int(layer.n) // PANEL) * PANEL
        self._rounds = layer.act_bits == 8
        self._bias = None if packed.bias is None else packed.bias[: layer.n].to(self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        x = x.to(self._dtype).contiguous()
        if self._rounds:
            rounded = torch.empty_like(x)
            bind(self.packed.isa, "isolatency_round", 3, 1)(
                self.packed.address, x.data_ptr(), rounded.data_ptr(), x.numel() // self._k
            )
            x = rounded
        weight = self.packed.decoded(self._dtype, scratch(self._k * self._width, self._dtype))
        y = x @ weight
        return y if self._bias is None else y + self._bias

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return self.packed.dequant()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.packed.size_bytes()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.packed.clone())


@dataclass(frozen=True)
class Decoded:
    """`decoded`: shares its packed weight with `grouped`, and of looked-up formats with `look-up`."""

    isa: Isa = "native"

    @property
    def name(self) -> str:
        """`decoded`, or with the forced path."""
        return "decoded" if self.isa == "native" else f"decoded-{self.isa}"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if m < MIN_ROWS:
            return f"m={m}: decoding pays from {MIN_ROWS} rows"
        return self._packing(fmt).supports(fmt, n, k, m, target)

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> DecodedLinear:
        """See `LinearKernel`."""
        return DecodedLinear(self._packing(fmt).prepare(fmt, payload, target, bias, m=m, like=like))

    def _packing(self, fmt: Format) -> Grouped | LookUp:
        return LookUp(self.isa) if fmt.looked_up else Grouped(self.isa)


_HASH = hash_of(*FILES, __file__)
