"""The project's own kernel for codes that are places in a fixed table of at most 16 levels (NF4, FP4, …), `lookup.cpp`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.format import Format
from methods.formats.levels import table
from profilers.kernels.build import Isa
from profilers.kernels.grouped import PackedLinear, pack, refuses_shape
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.native import FILES
from profilers.target import Target


@dataclass(frozen=True)
class LookUp:
    """`look-up`: packed as `grouped` has it; levels are looked up in registers, never in memory.

    Inputs left alone are multiplied with levels in fp32, or as the sum of two bf16 numbers, 16 significant bits, where they are bf16.
    Rounded ones are multiplied with integers: exactly where all levels are small multiples of one number, otherwise as 16-bit
    fractions of the largest level.
    isa: code path to compile, for tests; `native` takes the best of this CPU.
    """

    isa: Isa = "native"

    @property
    def name(self) -> str:
        """`look-up`, or with the forced path."""
        return "look-up" if self.isa == "native" else f"look-up-{self.isa}"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if not fmt.looked_up:
            return "tables of at most 16 fixed levels with a bf16 scale a row or group, inputs left alone or rounded to int8 a token"
        return refuses_shape(fmt, k, self.isa)

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> PackedLinear:
        """See `LinearKernel`."""
        if isinstance(like, PackedLinear) and like.isa == self.isa:
            return like
        own = table(fmt.element, fmt.bits)
        levels = torch.nn.functional.pad(own, (0, 16 - len(own)))
        # Powers of two are bf16 numbers, so that nothing is rounded here.
        scale = scales.read(fmt, "scale", payload).to(torch.bfloat16)
        return pack(fmt, {**payload, "scale": scale}, target, bias, self.isa, levels)


_HASH = hash_of(*FILES, __file__)
