"""Every kernel, and which of them may compete for a format."""

from __future__ import annotations

from methods.formats.format import Format
from profilers.kernels.aten_packed import Int4Pack, Int8Pack
from profilers.kernels.bitsandbytes_nf4 import BitsAndBytes
from profilers.kernels.csr import Csr
from profilers.kernels.decoded import Decoded
from profilers.kernels.dense import Dense
from profilers.kernels.fp8 import Fp8
from profilers.kernels.gemlite_grouped import GemLite
from profilers.kernels.grouped import Grouped
from profilers.kernels.int8_token import Int8Token
from profilers.kernels.kernel import LinearKernel
from profilers.kernels.lookup import LookUp
from profilers.kernels.low_rank import LowRank, LowRankFused
from profilers.kernels.native import refuses_build
from profilers.kernels.sparse24 import Sparse24
from profilers.kernels.tinygemm import Tinygemm
from profilers.kernels.triton_grouped import TritonGrouped
from profilers.kernels.triton_int8 import TritonInt8
from profilers.target import Target

KERNELS: tuple[LinearKernel, ...] = (
    Dense(prepacked=True),
    Dense(),
    Grouped(),
    LookUp(),
    Decoded(),
    Int8Token(),
    Int8Pack(),
    Int4Pack(),
    Csr(),
    LowRank(),
    LowRankFused(),
    BitsAndBytes(),
)
"""Those of CPUs, in order of preference where nothing was measured."""

CUDA_KERNELS: tuple[LinearKernel, ...] = (
    Dense(),
    TritonGrouped("few"),
    TritonInt8(),
    TritonGrouped("many"),
    Fp8(),
    Tinygemm(),
    Int8Pack(),
    Sparse24(),
    LowRank(),
    GemLite(),
    BitsAndBytes(),
)
"""Those of CUDA devices, in the same order."""


def kernels(target: Target) -> tuple[LinearKernel, ...]:
    """The kernels of a target's kind of device."""
    return CUDA_KERNELS if target.device == "cuda" else KERNELS


def kernel(name: str) -> LinearKernel:
    """The kernel of a name; raises KeyError with those there are."""
    known = {entry.name: entry for entry in (*KERNELS, *CUDA_KERNELS)}
    if name not in known:
        raise KeyError(f"no kernel {name!r}; there are {', '.join(known)}")
    return known[name]


def supported(fmt: Format, n: int, k: int, m: int, target: Target) -> list[LinearKernel]:
    """The kernels that obey a format at a shape, in order of preference."""
    return [entry for entry in kernels(target) if entry.supports(fmt, n, k, m, target) is None]


def refusals(fmt: Format, n: int, k: int, m: int, target: Target) -> dict[str, str]:
    """Why each of the other kernels is not among them."""
    reasons = {entry.name: entry.supports(fmt, n, k, m, target) for entry in kernels(target)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def why_none(fmt: Format, n: int, k: int, m: int, target: Target) -> str:
    """Why no kernel obeys a format at a shape: that the project's own cannot be compiled, where that is all, else two kernels' reasons."""
    reasons = refusals(fmt, n, k, m, target)
    build = refuses_build() if target.device == "cpu" else None
    if build is not None and build in reasons.values():
        return build
    told = [f"{name}: {why}" for name, why in reasons.items() if fmt.dense or not isinstance(kernel(name), Dense)]
    return "; ".join(told[:2])
