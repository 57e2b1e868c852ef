"""What a step computes outside of its linears, a cell each: attention, norms, the embedding, picking the token, and what is between."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from profilers import cached_attention, norms
from profilers.cached_attention import Attend, AttendPrompt, Heads, Operation, Sdpa, heads_of
from profilers.kernels.build import SOURCES, NoCompiler, library
from profilers.kernels.catalogue import CUDA_KERNELS, KERNELS
from profilers.kernels.gate import poisoned
from profilers.kernels.kernel import LinearKernel, hash_of
from profilers.norms import KernelNorm, TorchNorm
from profilers.target import Target

if TYPE_CHECKING:
    from profilers.table import KernelKey

_EPS = 1e-5
_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


class Operator(Protocol):
    """One way to compute a kind of operator. Cells: see `profilers.cells.operator_cells`."""

    @property
    def name(self) -> str: ...

    @property
    def source_hash(self) -> str:
        """Changes with the code, as a kernel's does."""
        ...

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Why a model on the target does not compute the cell this way, or None. Raises ValueError for a format that there is not."""
        ...

    def prepare(self, key: KernelKey, target: Target) -> Operation:
        """The cell's random inputs; deterministic."""
        ...


@dataclass(frozen=True)
class Norms:
    """Root-mean-square norms of m rows of n channels, on the kernel that `profilers.norms` installs."""

    name: str = "rms-norm"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Refuses what `profilers.norms.install` leaves to the model's own code."""
        if key.n % 16:
            return f"n={key.n} is not a multiple of 16"
        if target.device == "cpu":
            try:
                library()
            except NoCompiler as error:
                return str(error)
        return None

    def prepare(self, key: KernelKey, target: Target) -> Normed:
        """Rows as the block before left them, in a cache; the gains rotate."""
        generator = torch.Generator(target.device).manual_seed(key.m + key.n)
        x = torch.randn(key.m, key.n, generator=generator, device=target.device, dtype=target.dtype)
        gain = 1 + 0.1 * torch.randn(key.n, generator=generator, device=target.device)
        return Normed((KernelNorm if target.device == "cpu" else TorchNorm)(gain, _EPS, target.dtype), x)


@dataclass(frozen=True)
class Normed:
    """Rows x (m, n) and their norm."""

    norm: KernelNorm | TorchNorm
    x: Tensor

    def __call__(self) -> Tensor:
        """-> (m, n)."""
        y: Tensor = self.norm(self.x)
        return y

    def problem(self) -> str | None:
        """Against the formula in float64."""
        with poisoned():
            got = self().double()
        x = self.x.double()
        expected = x * (x.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt() * self.norm.gain.double()
        error = float((got - expected).norm() / expected.norm())
        limit = _ERROR[self.x.dtype]
        return None if error <= limit else f"relative error {error:.1e} is above {limit:.0e}"

    def size_bytes(self) -> int:
        """Read and written."""
        return 2 * self.x.nbytes + self.norm.gain.nbytes

    def clone(self) -> Self:
        """The same with other gains' memory."""
        return type(self)(type(self.norm)(self.norm.gain.clone(), self.norm.eps, self.x.dtype), self.x)


@dataclass(frozen=True)
class Embedding:
    """Rows of a table (k tokens of n channels) for m tokens."""

    name: str = "torch"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Runs everywhere."""
        return None

    def prepare(self, key: KernelKey, target: Target) -> Embedded:
        """Random tokens of a random table."""
        generator = torch.Generator(target.device).manual_seed(key.m + key.n)
        table = torch.empty(key.k, key.n, device=target.device, dtype=target.dtype).uniform_(-1, 1, generator=generator)
        return Embedded(table, torch.randint(0, key.k, (key.m,), generator=generator, device=target.device))


@dataclass(frozen=True)
class Embedded:
    """A table (k, n) and tokens (m,)."""

    table: Tensor
    ids: Tensor

    def __call__(self) -> Tensor:
        """-> (m, n)."""
        return functional.embedding(self.ids, self.table)

    def problem(self) -> str | None:
        """Rows are copied bit for bit."""
        with poisoned():
            got = self().cpu()
        expected = torch.stack([self.table[i] for i in self.ids.tolist()]).cpu()
        return None if torch.equal(got, expected) else "returned other rows than the table's"

    def size_bytes(self) -> int:
        """Read and written; the rest of the table is left alone."""
        return (2 * self.table.shape[1] * self.table.element_size() + self.ids.element_size()) * len(self.ids)

    def clone(self) -> Self:
        """Other tokens of the same table, which no cache holds either."""
        return type(self)(self.table, (self.ids + max(1, len(self.table) * 3 // 7)) % len(self.table))


@dataclass(frozen=True)
class Sampling:
    """The most likely of n tokens for each of m sequences."""

    name: str = "torch"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Runs everywhere."""
        return None

    def prepare(self, key: KernelKey, target: Target) -> Picked:
        """Random logits."""
        generator = torch.Generator(target.device).manual_seed(key.m + key.n)
        return Picked(torch.randn(key.m, key.n, generator=generator, device=target.device, dtype=target.dtype))


@dataclass(frozen=True)
class Picked:
    """Logits (m, n), as the head left them in a cache."""

    logits: Tensor

    def __call__(self) -> Tensor:
        """-> (m,)."""
        return self.logits.argmax(-1)

    def problem(self) -> str | None:
        """No token is more likely than the one picked."""
        got, exact = self(), self.logits.double()
        best = torch.equal(exact.gather(-1, got[:, None])[:, 0], exact.amax(-1))
        return None if best else "picked a token that is not the most likely"

    def size_bytes(self) -> int:
        """Read."""
        return self.logits.nbytes

    def clone(self) -> Self:
        """Itself: logits are never read from memory."""
        return self


@dataclass(frozen=True)
class Elementwise:
    """What a block does between its other cells for m tokens, n channels and k inner ones, as Llama does it: see `Between`."""

    name: str = "torch"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Runs everywhere."""
        return None

    def prepare(self, key: KernelKey, target: Target) -> Between:
        """Random outputs of the linears before it."""
        heads, generator = heads_of(key.op), torch.Generator(target.device).manual_seed(key.m + key.n)

        def random(width: int) -> Tensor:
            return torch.randn(key.m, width, generator=generator, device=target.device, dtype=target.dtype)

        qkv = random((heads.heads + 2 * heads.kv_heads) * heads.dim)
        return Between(heads, qkv, random(heads.dim), random(heads.dim), random(2 * key.k), random(key.n), random(key.n))


@dataclass(frozen=True)
class Between:
    """Rotary embedding of queries and keys, the gated activation, and two additions to the stream, all of what was just written.

    qkv (m, (heads + 2 kv_heads) dim); cos, sin (m, dim); gate_up (m, 2 k), k = 0 for a model without gates; stream, branch (m, n).
    """

    heads: Heads
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    gate_up: Tensor
    stream: Tensor
    branch: Tensor

    def __call__(self) -> Tensor:
        """-> (m, n), the stream."""
        return self.parts()[-1]

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys (heads, m, dim), inner channels (m, k) and stream (m, n)."""
        h, kv, d = self.heads
        q, k, _ = torch.split(self.qkv, [h * d, kv * d, kv * d], -1)
        turned = [self._turned(x.view(-1, count, d).transpose(0, 1)) for x, count in ((q, h), (k, kv))]
        gate, up = self.gate_up.chunk(2, -1)
        inner = functional.silu(gate) * up
        return turned[0], turned[1], inner, (self.stream + self.branch) + self.branch

    def _turned(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat((-right, left), -1) * self.sin

    def problem(self) -> str | None:
        """Against the same formulas in float64."""
        tensors = (self.qkv, self.cos, self.sin, self.gate_up, self.stream, self.branch)
        with poisoned():
            got = self.parts()
        limit = _ERROR[self.qkv.dtype]
        for ours, expected in zip(got, Between(self.heads, *(x.double() for x in tensors)).parts(), strict=True):
            error = float((ours.double() - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= limit:
                return f"relative error {error:.1e} is above {limit:.0e}"
        return None

    def size_bytes(self) -> int:
        """Read and written, were each formula one kernel."""
        q, k, inner, stream = self.heads.heads, self.heads.kv_heads, self.gate_up.nbytes, self.stream.nbytes
        return 2 * (q + k) * self.cos.nbytes + 2 * self.cos.nbytes + inner * 3 // 2 + 6 * stream

    def clone(self) -> Self:
        """Itself: nothing of it is read from memory."""
        return self


OPERATORS: Mapping[str, tuple[Operator, ...]] = MappingProxyType(
    {
        "attention": (Attend(), AttendPrompt(), Sdpa()),
        "norm": (Norms(),),
        "embedding": (Embedding(),),
        "sampling": (Sampling(),),
        "elementwise": (Elementwise(),),
    }
)
"""By the kind of cell; of those of one kind, a model runs the one that supports its cell."""


def kind_of(op: str) -> str:
    """The entry of `OPERATORS` that an op such as `attention-9x3x64` belongs to, or the op itself."""
    return op.partition("-")[0]


def contenders(op: str, device: str) -> Sequence[Operator | LinearKernel]:
    """Everything that a cell of an op is tried with on a kind of device."""
    return OPERATORS.get(kind_of(op)) or (CUDA_KERNELS if device == "cuda" else KERNELS)


def footprint(key: KernelKey) -> int:
    """Bytes of memory that measuring a cell may take, without the copies that are made of what is small."""
    if kind_of(key.op) == "attention":
        return cached_attention.footprint(key)
    if kind_of(key.op) == "embedding":
        return 4 * key.n * key.k
    if kind_of(key.op) == "elementwise":
        h, kv, d = heads_of(key.op)
        return 16 * key.m * (key.n + 2 * key.k + (h + 2 * kv) * d)
    return 16 * key.m * key.n


@functools.cache
def _hash() -> str:
    kernels = [str(source) for source in SOURCES if source.stem in ("norm", "vectors")]
    return hash_of(__file__, str(norms.__file__), *kernels)
