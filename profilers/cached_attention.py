"""Attention over a key/value cache as a cell of the table: new keys and values stored, old ones read in the cache's format, attended to.

Caches are those of `profilers.kv_cache` and `methods.kv.cache`, without the model and transformers around them. A repeated step leaves
the cache alone: it writes to the same place again, or drops the stores that it made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from methods.formats.numerics import DTYPES
from methods.kv import cache as packed
from methods.kv import codecs, format, layers, packing, store
from methods.kv.format import CacheFormat, parse_cache_format
from methods.kv.store import Store
from methods.model.structure import Structure
from profilers import attention, kv_cache
from profilers.attention import HEAD_DIMS
from profilers.kernels.build import SOURCES, NoCompiler, library
from profilers.kernels.gate import poisoned
from profilers.kernels.kernel import hash_of
from profilers.target import Target

if TYPE_CHECKING:
    from profilers.table import KernelKey

_KERNELS = ("attention", "prompt", "vectors")
_OUTPUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
_EDGE_QUERIES = 4
_BYTES_PER_ELEMENT = 40
"""Memory for a key or value element while a shape is measured: four formats with four copies each, and one decoded."""


class Operation(Protocol):
    """An operator on the data of a cell, ready to run."""

    def __call__(self) -> Tensor:
        """Computes, always the same."""
        ...

    def problem(self) -> str | None:
        """Why what it computes is wrong, by a plain reference in float64, or None: the gate before it is timed."""
        ...

    def size_bytes(self) -> int:
        """Bytes that a call reads and writes."""
        ...

    def clone(self) -> Self:
        """The same work on other memory, for timing with a cold cache."""
        ...


class Heads(NamedTuple):
    """Query heads, key/value heads and channels of each."""

    heads: int
    kv_heads: int
    dim: int

    def op(self, kind: str = "attention") -> str:
        """`attention-9x3x64`; `heads_of` reads it back."""
        return f"{kind}-{self.heads}x{self.kv_heads}x{self.dim}"

    def layer(self, dtype: str) -> Structure:
        """A model of one such attention and nothing else: what a cache format is asked about."""
        h, kv, d = self
        return Structure("", ("",), (), "", "", False, h * d, 0, h, kv, d, dtype, 0)


def heads_of(op: str) -> Heads:
    """The heads that the op of a cell ends with."""
    return Heads(*map(int, op.rpartition("-")[2].split("x")))


def footprint(key: KernelKey) -> int:
    """Bytes of memory that measuring a cell may take."""
    h = heads_of(key.op)
    return _BYTES_PER_ELEMENT * key.m * h.dim * (2 * h.kv_heads * (key.k + key.n) + 2 * h.heads * key.n)


@dataclass(frozen=True)
class Attend:
    """The project's kernel for one query of a head: what models decode with on a CPU."""

    name: str = "attend"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Refuses many queries, and heads that the kernel was not compiled for."""
        dim = heads_of(key.op).dim
        if target.device != "cpu" or key.n != 1 or dim not in HEAD_DIMS:
            return f"one query on a CPU, with heads of one of {HEAD_DIMS} channels"
        try:
            library()
        except NoCompiler as error:
            return str(error)
        return _refuses(key)

    def prepare(self, key: KernelKey, target: Target) -> Attended:
        """A cache of m sequences with k random tokens each, and a new token."""
        scale, threads = heads_of(key.op).dim ** -0.5, target.threads
        return _prepared(key, target, lambda q, keys, values: attention.attend(q, keys, values, scale, threads))


@dataclass(frozen=True)
class AttendPrompt:
    """The project's attention of a whole prompt, where models prefill with it."""

    name: str = "attend-prompt"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Refuses one query, queries behind a context, and CPUs that `profilers.attention` leaves to torch."""
        if key.n == 1 or key.k or heads_of(key.op).dim not in HEAD_DIMS:
            return f"whole prompts with nothing before them, with heads of one of {HEAD_DIMS} channels"
        try:
            if not attention.prompt_kernel(target):
                return "bf16 on CPUs without tiles for it"
        except NoCompiler as error:
            return str(error)
        return _refuses(key)

    def prepare(self, key: KernelKey, target: Target) -> Attended:
        """An empty cache and m prompts of n tokens."""
        scale, threads = heads_of(key.op).dim ** -0.5, target.threads
        return _prepared(key, target, lambda q, keys, values: attention.attend_prompt(q, keys, values, scale, threads))


@dataclass(frozen=True)
class Sdpa:
    """torch's attention, where a model runs none of the project's; it decodes on CUDA under the mask of a cache of fixed length."""

    name: str = "sdpa"

    @property
    def source_hash(self) -> str:
        return _hash()

    def supports(self, key: KernelKey, target: Target) -> str | None:
        """Refuses what a model leaves to the others."""
        for other in (Attend(), AttendPrompt()):
            if other.supports(key, target) is None:
                return f"models run {other.name} here"
        if key.n > 1 and key.k:
            return "queries behind a context; use n=1 (decode) or k=0 (prefill)"
        return _refuses(key)

    def prepare(self, key: KernelKey, target: Target) -> Attended:
        """A cache of m sequences with k random tokens each, and n new ones."""
        heads = heads_of(key.op)
        dense = parse_cache_format(key.format).kind == "dense"
        if key.n == 1 and dense and target.device == "cuda":
            return _prepared(key, target, _masked(heads, key.k, target))

        def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            y = functional.scaled_dot_product_attention(
                q, keys, values, is_causal=q.shape[2] > 1, enable_gqa=heads.heads != heads.kv_heads
            )
            return y.transpose(1, 2)

        return _prepared(key, target, run)


def _masked(heads: Heads, context: int, target: Target) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One query as transformers asks on a cache of fixed length: heads that share keys become queries of one head, all under a mask."""
    mask = torch.ones(1, 1, 1, context + 1, dtype=torch.bool, device=target.device)

    def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch = q.shape[0]
        grouped = q.reshape(batch, heads.kv_heads, heads.heads // heads.kv_heads, heads.dim)
        y = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return y.reshape(batch, 1, heads.heads, heads.dim)

    return run


class Cache(Protocol):
    """One layer's keys or values of the past."""

    def seen(self, new: Tensor) -> Tensor:
        """All tokens that attention sees, `new` (b, h, t, d) among them and stored; the past stays what it is."""
        ...

    def tensors(self) -> list[Tensor]:
        """What is stored of the past."""
        ...

    def clone(self) -> Cache:
        """The same in other memory."""
        ...


@dataclass(frozen=True)
class Grown:
    """The model's own dtype, in a buffer with room behind (`profilers.kv_cache`)."""

    past: SimpleNamespace

    @classmethod
    def of(cls, past: Tensor) -> Grown:
        """With past tokens (b, h, t, d)."""
        layer = SimpleNamespace(keys=past[:, :, :0])
        layer.keys = kv_cache.extended(layer, "keys", past)
        return cls(layer)

    def seen(self, new: Tensor) -> Tensor:
        """As `Cache` says; a prefill takes a new buffer each time, as a new cache does."""
        if self.past.keys.shape[2]:
            return kv_cache.extended(self.past, "keys", new)
        return kv_cache.extended(SimpleNamespace(keys=new[:, :, :0]), "keys", new)

    def tensors(self) -> list[Tensor]:
        """The tokens without the room behind them."""
        return [self.past.keys]

    def clone(self) -> Grown:
        """With a buffer of its own."""
        return Grown.of(self.past.keys)


@dataclass(frozen=True)
class Packed:
    """Any other format, decoded at every step (`methods.kv.layers`)."""

    past: Store

    def seen(self, new: Tensor) -> Tensor:
        """As `Cache` says."""
        tokens = layers.behind(self.past, new)
        self.past.append(new)
        return tokens

    def tensors(self) -> list[Tensor]:
        """Codes, scales and what is not packed."""
        return list(self.past.tensors())

    def clone(self) -> Packed:
        """With tensors of its own."""
        return Packed(self.past.each(torch.clone))


@dataclass(frozen=True)
class Attended:
    """n new tokens of m sequences: q (m, heads, n, dim), k and v (m, kv_heads, n, dim), behind two caches.

    past: what they were filled with, the original keys and values (m, kv_heads, context, dim); given to the gate alone.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    fmt: CacheFormat
    q: Tensor
    k: Tensor
    v: Tensor
    keys: Cache
    values: Cache
    past: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> Tensor:
        """-> (m, n, heads, dim)."""
        return self.run(self.q, self.keys.seen(self.k), self.values.seen(self.v))

    def problem(self) -> str | None:
        """What is read back is what was stored, within the format's rounding, and attention to it is that of float64."""
        assert self.past is not None
        tokens = [self.keys.seen(self.k), self.values.seen(self.v)]
        for got, past, new in zip(tokens, self.past, (self.k, self.v), strict=True):
            wrong = _misread(self.fmt, got, past, new)
            if wrong is not None:
                return wrong
        with poisoned():
            y = self()
        limit = _OUTPUT_ERROR[y.dtype]
        for at in {0, len(self.q) - 1}:
            rows, expected = _expected(self.q[at], tokens[0][at], tokens[1][at])
            error = float((y[at, rows].double() - expected).norm() / expected.norm())
            if not error <= limit:
                return f"relative error {error:.1e} is above {limit:.0e}"
        return None

    def size_bytes(self) -> int:
        """What is stored of the past, and what comes in and goes out."""
        return sum(tensor.nbytes for cache in (self.keys, self.values) for tensor in cache.tensors()) + (
            2 * self.q.nbytes + self.k.nbytes + self.v.nbytes
        )

    def clone(self) -> Self:
        """The same with caches of its own; the new tokens are in the processor's cache in a model too."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone(), past=None)


def _prepared(key: KernelKey, target: Target, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attended:
    heads, fmt = heads_of(key.op), parse_cache_format(key.format)
    generator = torch.Generator(target.device).manual_seed(key.m * 31 + key.k)

    def random(count: int, tokens: int) -> Tensor:
        return torch.randn(key.m, count, tokens, heads.dim, generator=generator, device=target.device, dtype=target.dtype)

    q, k, v = (random(count, key.n) for count in (heads.heads, heads.kv_heads, heads.kv_heads))
    past = random(heads.kv_heads, key.k), random(heads.kv_heads, key.k)
    if fmt.kind == "dense" and DTYPES[fmt.dense] is target.dtype:
        return Attended(run, fmt, q, k, v, Grown.of(past[0]), Grown.of(past[1]), past)
    keys, values = (
        Packed(each.append(own)) if key.k else Packed(each) for each, own in zip(packed.stores(fmt, {}), past, strict=True)
    )
    return Attended(run, fmt, q, k, v, keys, values, past)


def _refuses(key: KernelKey) -> str | None:
    fmt = parse_cache_format(key.format)
    if fmt.calibrated:
        return f"{fmt.name} has constants that are calibrated on a model"
    return fmt.refuses(heads_of(key.op).layer("bf16"))


def _misread(fmt: CacheFormat, got: Tensor, past: Tensor, new: Tensor) -> str | None:
    """Why what a cache gives back is not what it was given, or None."""
    if got.shape[2] != past.shape[2] + new.shape[2] or not torch.equal(got[:, :, past.shape[2] :], new):
        return "the cache does not give back the new tokens"
    if not past.numel():
        return None
    ends = sorted({0, len(past) - 1})
    expected = past[ends].double()
    error = float((got[ends, :, : past.shape[2]].double() - expected).norm() / expected.norm())
    limit = _rounding(fmt)
    return (
        None if error <= limit else f"the cache gives back its tokens with a relative error of {error:.1e}, above {limit:.0e}"
    )


def _rounding(fmt: CacheFormat) -> float:
    """The relative error of storing normally distributed keys that no format exceeds which does what it says."""
    if fmt.kind == "dense":
        return 0.0 if fmt.dense == "fp32" else 5e-3
    return max(0.04, 2.56 * 0.5 ** min(fmt.key_bits, fmt.value_bits))


def _expected(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The first and last queries of one sequence, by number, and attention for them in float64.

    q (heads, n, dim), keys and values (kv_heads, t, dim) -> (rows,), (rows, heads, dim).
    """
    heads, n, dim = q.shape
    rows = torch.tensor(sorted({*range(min(n, _EDGE_QUERIES)), *range(max(0, n - _EDGE_QUERIES), n)}), device=q.device)
    kv_heads, length = keys.shape[:2]
    grouped = q[:, rows].double().view(kv_heads, heads // kv_heads, len(rows), dim)
    scores = torch.einsum("hgrd,htd->hgrt", grouped, keys.double()) * dim**-0.5
    future = torch.arange(length, device=q.device) > (length - n + rows)[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    y = torch.einsum("hgrt,htd->rhgd", weights, values.double())
    return rows, y.reshape(len(rows), heads, dim)


@functools.cache
def _hash() -> str:
    modules = (attention, kv_cache, packed, codecs, format, layers, packing, store)
    kernels = [source for source in SOURCES if source.stem in _KERNELS]
    return hash_of(__file__, *(str(module.__file__) for module in modules), *map(str, kernels))
