"""Weights that are kept as a product of two factors: as two dense products, or for few rows both in one call, `lowrank.cpp`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from methods.formats.format import Format
from methods.formats.numerics import decode
from profilers.kernels.build import Isa
from profilers.kernels.dense import Dense, DenseLinear, multiplied_in
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.native import FILES, NativeLinear, padded, refuses_build
from profilers.target import Target

MOST_ROWS = 16
"""Above it, dense products have the better loop."""

_TILE = 16


class LowRankLinear:
    """Two dense layers, one behind the other; what is between them has the compute dtype."""

    def __init__(self, fmt: Format, down: DenseLinear, up: DenseLinear) -> None:
        self.fmt, self.down, self.up = fmt, down, up

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        return self.up(self.down(x))

    def dequant(self) -> Tensor:
        """See `Prepared`: the product of the factors as they are packed."""
        return decode(self.fmt, {"down": self.down.dequant(), "up": self.up.dequant()})

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.down.size_bytes() + self.up.size_bytes()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.fmt, self.down.clone(), self.up.clone())


@dataclass(frozen=True)
class LowRank:
    """`low-rank`: x @ down^T, rounded to the compute dtype, @ up^T, by `dense-prepacked` each where that runs, by `dense` elsewhere."""

    name: str = "low-rank"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        whole = replace(fmt, rank=0)
        return _refuses_rank(fmt) or _dense(whole, target).supports(whole, n, k, m, target)

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> LowRankLinear:
        """See `LinearKernel`; raises ValueError for factors of another rank."""
        whole = replace(fmt, rank=0)
        down, up = _factors(fmt, payload)
        return LowRankLinear(
            fmt,
            _dense(whole, target).prepare(whole, {"weight": down}, target, m=m),
            _dense(whole, target).prepare(whole, {"weight": up}, target, bias, m=m),
        )


class Factors(ctypes.Structure):
    """`struct Factors` of lowrank.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k", "rank")),
        *((name, ctypes.c_int32) for name in ("narrow", "bf16", "threads")),
        *((name, ctypes.c_void_p) for name in ("down", "up", "bias")),
    )


class FusedLowRankLinear(NativeLinear):
    """Both factors in tiles, see `tiled`; the layer's rank is the format's, rounded up to whole tiles."""

    __slots__ = ("down", "fmt", "up")

    layer: Factors

    def __init__(self, fmt: Format, layer: Factors, down: Tensor, up: Tensor, bias: Tensor | None, isa: Isa = "native") -> None:
        super().__init__("isolatency_low_rank", layer, bias, isa)
        self.fmt, self.down, self.up = fmt, down, up
        layer.down, layer.up = down.data_ptr(), up.data_ptr()

    def dequant(self) -> Tensor:
        """See `Prepared`: the product of the factors as they are packed."""
        rank = self.fmt.rank
        down, up = untiled(self.down)[:rank, : self.layer.k], untiled(self.up)[: self._n, :rank]
        return decode(self.fmt, {"down": down, "up": up})

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return sum(part.numel() * part.element_size() for part in (self.down, self.up))

    def clone(self) -> Self:
        """See `Prepared`."""
        factors = self.down.clone(), self.up.clone()
        return type(self)(self.fmt, Factors.from_buffer_copy(self.layer), *factors, self.bias, self.isa)


@dataclass(frozen=True)
class LowRankFused:
    """`low-rank-fused`: both products in one call; what is between them is rounded to the dtype that the weights are multiplied in.

    isa: code path to compile, for tests; `native` takes the best of this CPU.
    """

    isa: Isa = "native"

    @property
    def name(self) -> str:
        """`low-rank-fused`, or with the forced path."""
        return "low-rank-fused" if self.isa == "native" else f"low-rank-fused-{self.isa}"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if m > MOST_ROWS:
            return f"m={m}: at most {MOST_ROWS} rows"
        if k % _TILE:
            return f"k={k} is not a multiple of {_TILE}"
        return _refuses_rank(fmt) or refuses_build(self.isa)

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> FusedLowRankLinear:
        """See `LinearKernel`; raises ValueError for factors of another rank."""
        dtype = multiplied_in(fmt, target)
        down, up = (tiled(factor.detach().to(dtype)) for factor in _factors(fmt, payload))
        layer = Factors(
            n=payload["up"].shape[0],
            k=payload["down"].shape[1],
            rank=fmt.rank + -fmt.rank % _TILE,
            narrow=dtype == torch.bfloat16,
            bf16=target.compute_dtype == "bf16",
            threads=target.threads,
        )
        return FusedLowRankLinear(fmt, layer, down, up, padded(bias), self.isa)


def tiled(factor: Tensor) -> Tensor:
    """(outputs, inputs) -> (tiles of 16 outputs, steps, 16, inputs of a step): a step is two inputs of bf16, one of fp32; zeros fill up."""
    n, k = factor.shape
    step = 4 // factor.element_size()
    whole = functional.pad(factor, (0, -k % _TILE, 0, -n % _TILE))
    return whole.view(-1, _TILE, whole.shape[1] // step, step).transpose(1, 2).contiguous()


def untiled(tiles: Tensor) -> Tensor:
    """Inverse of `tiled`, with the zeros."""
    n_tiles, steps, _, step = tiles.shape
    return tiles.transpose(1, 2).reshape(n_tiles * _TILE, steps * step)


def _refuses_rank(fmt: Format) -> str | None:
    return None if fmt.rank else "dense formats of low rank only"


def _factors(fmt: Format, payload: Payload) -> tuple[Tensor, Tensor]:
    """`down` (rank, k) and `up` (n, rank)."""
    down, up = payload["down"], payload["up"]
    if (down.shape[0], up.shape[1]) != (fmt.rank, fmt.rank):
        raise ValueError(f"{fmt.name}: the factors have ranks {down.shape[0]} and {up.shape[1]}; both have to be {fmt.rank}")
    return down, up


def _dense(fmt: Format, target: Target) -> Dense:
    """The packed kernel where it runs, whatever the shape."""
    packed = Dense(prepacked=True)
    return packed if packed.supports(fmt, 1, 1, 1, target) is None else Dense()


_HASH = hash_of(*FILES, __file__, str(Path(__file__).with_name("dense.py")))
