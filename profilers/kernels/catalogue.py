"""Every kernel, and which of them may compete for a format."""

from __future__ import annotations

from methods.formats.format import Format
from profilers.kernels.aten_packed import Int4Pack, Int8Pack
from profilers.kernels.decoded import Decoded
from profilers.kernels.dense import Dense
from profilers.kernels.grouped import Grouped
from profilers.kernels.int8_token import Int8Token
from profilers.kernels.kernel import LinearKernel
from profilers.target import Target

KERNELS: tuple[LinearKernel, ...] = (
    Dense(prepacked=True),
    Dense(),
    Grouped(),
    Decoded(),
    Int8Token(),
    Int8Pack(),
    Int4Pack(),
)
"""In order of preference where nothing was measured."""


def kernel(name: str) -> LinearKernel:
    """The kernel of a name; raises KeyError with those there are."""
    for entry in KERNELS:
        if entry.name == name:
            return entry
    raise KeyError(f"no kernel {name!r}; there are {', '.join(k.name for k in KERNELS)}")


def supported(fmt: Format, n: int, k: int, m: int, target: Target) -> list[LinearKernel]:
    """The kernels that obey a format at a shape, in order of preference."""
    return [entry for entry in KERNELS if entry.supports(fmt, n, k, m, target) is None]


def refusals(fmt: Format, n: int, k: int, m: int, target: Target) -> dict[str, str]:
    """Why each of the other kernels is not among them."""
    reasons = {entry.name: entry.supports(fmt, n, k, m, target) for entry in KERNELS}
    return {name: reason for name, reason in reasons.items() if reason is not None}
