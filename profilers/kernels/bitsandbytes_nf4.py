"""bitsandbytes' product with NF4 weights, which it brings for CUDA devices and for CPUs with BF16 dot products. The package is optional."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.format import Format
from methods.formats.levels import table
from methods.formats.numerics import decode_grid
from profilers.kernels.device import refuses_target, version_of
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.tinygemm import nibbles
from profilers.target import Target

PACKAGE = "bitsandbytes"
LEAST = (0, 50)
"""The version whose layouts are written here."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Inputs that share a scale; blocks follow each other along the rows."""

PANEL = 32
"""Outputs that the CPU's layout interleaves."""


class Nf4Linear:
    """Codes in nibbles and a scale a block.

    threads: of a CPU, whose codes (n, k / 2) are as `panel_nibbles` has them, with scales (blocks, n) bf16; None as for CUDA devices,
    codes (n k / 2, 1) as `row_nibbles` has them, scales (n, blocks) fp32. format: with these scales.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, fmt: Format, shape: tuple[int, int], bias: Tensor | None, threads: int | None
    ) -> None:
        bitsandbytes: Any = importlib.import_module(PACKAGE)
        self.codes, self.scale, self.format, self.shape, self.bias = codes, scale, fmt, shape, bias
        self.threads = threads
        functions = bitsandbytes.functional
        levels, block = table(fmt.element, fmt.bits).to(codes.device), fmt.group_size(shape[1])
        absmax = scale.view(-1) if threads is None else scale
        self._state = functions.QuantState(absmax, torch.Size(shape), levels, block, "nf4", torch.bfloat16)
        self._few, self._any = functions.gemv_4bit, bitsandbytes.matmul_4bit
        # The library may be linked to another OpenMP than torch, which would take every core: asked of it, the symbol is its own.
        self._set_threads = functions.lib.omp_set_num_threads

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        x = x.to(torch.bfloat16).contiguous()
        y: Tensor
        if self.threads is None:
            y = self._any(x, self.codes.t(), self._state, bias=self.bias)
            return y
        # Named for vectors, but on CPUs it multiplies any number of rows; `matmul_4bit` expects the other layout.
        self._set_threads(self.threads)
        y = self._few(x, self.codes, state=self._state)
        return y if self.bias is None else y + self.bias

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        codes, scale = self.codes.cpu(), self.scale.cpu()
        if self.threads is None:
            return decode_grid(self.format, {"codes": from_rows(codes, self.shape), "scale": scale})
        return decode_grid(self.format, {"codes": from_panels(codes), "scale": scale.T.contiguous()})

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.codes.nbytes + self.scale.nbytes

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.codes.clone(), self.scale.clone(), self.format, self.shape, self.bias, self.threads)


@dataclass(frozen=True)
class BitsAndBytes:
    """`bitsandbytes`: `nf4a16-g64` and `nf4`, with groups of 32 to 4096; on CPUs scales are bf16 numbers. Not run on a GPU yet."""

    name: str = PACKAGE

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`. Of bitsandbytes' CPU kernel another package brings a variant."""
        return _hash()

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        reason = refuses_target(target, target.device, "sm80", PACKAGE, LEAST)
        if reason or target.compute_dtype != "bf16":
            return reason or "takes activations in bf16"
        if fmt.dense or (fmt.element, fmt.bits, fmt.rows, fmt.act_bits) != ("nf", 4, 1, 16):
            return "NF4 by row, inputs left alone"
        if not fmt.divides(k) or fmt.group_size(k) not in BLOCKS:
            return f"a group of {fmt.group} of k={k} inputs is none of the blocks {BLOCKS}, or does not divide them"
        return _refuses_cpu(fmt, n, target) if target.device == "cpu" else None

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Nf4Linear:
        """See `LinearKernel`."""
        codes, scale = payload["codes"], scales.read(fmt, "scale", payload)
        shape = codes.shape[0], codes.shape[1]
        kept = None if bias is None else bias.detach().bfloat16().to(target.device)
        if target.device == "cpu":
            return Nf4Linear(panel_nibbles(codes), scale.T.contiguous(), fmt, shape, kept, target.threads)
        packed, floats = row_nibbles(codes).to(target.device), scale.float().contiguous().to(target.device)
        return Nf4Linear(packed, floats, replace(fmt, codec="fp32"), shape, kept, None)


def _refuses_cpu(fmt: Format, n: int, target: Target) -> str | None:
    if "avx512_bf16" not in target.capabilities:
        return "needs avx512_bf16, without which it unpacks the weight at every call"
    if fmt.codec != "bf16":
        return "rounds scales to bf16 on CPUs"
    return f"n={n} is not a multiple of {PANEL}" if n % PANEL else None


def row_nibbles(codes: Tensor) -> Tensor:
    """Codes (n, k) below 16 -> (n k / 2, 1) uint8, row by row, the even input in the upper half."""
    return nibbles(codes).view(-1, 1)


def from_rows(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `row_nibbles`: codes of a shape."""
    return torch.stack((packed >> 4, packed & 15), -1).view(shape)


def panel_nibbles(codes: Tensor) -> Tensor:
    """Codes (n, k) below 16 -> (n, k / 2) uint8: 32 outputs of two inputs after those of the two before, the first 16 in the lower half."""
    n, k = codes.shape
    low, high = codes.view(n // PANEL, 2, PANEL // 2, k // 2, 2).permute(1, 0, 3, 2, 4)
    packed: Tensor = low | high << 4
    return packed.reshape(n, k // 2)


def from_panels(packed: Tensor) -> Tensor:
    """Inverse of `panel_nibbles`: codes (n, k)."""
    n, half = packed.shape
    pairs = packed.view(n // PANEL, half, PANEL // 2, 2)
    return torch.stack((pairs & 15, pairs >> 4)).permute(1, 0, 3, 2, 4).reshape(n, 2 * half)


@functools.cache
def _hash() -> str:
    return hash_of(__file__, versions=(version_of(PACKAGE), version_of("kernels")))
