"""The contract of a linear kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.code import code_of
from profilers.target import Target

Payload = Mapping[str, Tensor]


class Prepared(Protocol):
    """A weight in a kernel's own layout, ready to multiply."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., k) on the target's device and in its compute dtype -> (..., n) alike, the format's rounding of x included."""
        ...

    def dequant(self) -> Tensor:
        """(n, k) fp32 on the CPU: what the packed weight stands for, read back from the packed form."""
        ...

    def size_bytes(self) -> int:
        """Bytes of weight memory that a call reads."""
        ...

    def clone(self) -> Self:
        """The same weight in other memory, for timing with a cold cache."""
        ...


class LinearKernel(Protocol):
    """One way to compute `y = x @ W^T + bias` for some formats on some machines."""

    @property
    def name(self) -> str: ...

    @property
    def source_hash(self) -> str:
        """Changes with the kernel's code: a timing of other code is not a timing of this."""
        ...

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """Why the kernel cannot run this, or None."""
        ...

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Prepared:
        """Packs a payload (`methods.formats.numerics.Compressed`), for about `m` rows.

        like: the same weight prepared by another kernel, whose memory is shared where the layouts agree.
        """
        ...


def hash_of(*files: str, versions: Sequence[str] = ()) -> str:
    """16 hex digits of the SHA-256 of what source files compute (`code_of`), and of the versions of packages whose code they run."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(code_of(file).encode())
    for version in versions:
        digest.update(f"\n{version}".encode())
    return digest.hexdigest()[:16]
