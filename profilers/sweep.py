"""Measures the cells of a latency table that are missing; `python -m profilers.sweep` measures a device's whole table."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from methods.formats.format import parse_format
from profilers import cuda_timer
from profilers.cached_attention import Operation
from profilers.implementation import implementation, refusal
from profilers.kernels import gate
from profilers.kernels.catalogue import kernels
from profilers.kernels.device import failures
from profilers.kernels.kernel import LinearKernel, Payload, Prepared
from profilers.kernels.payloads import random_payload
from profilers.operators import OPERATORS, Operator, kind_of
from profilers.pace import pace_of
from profilers.table import KernelKey, LatencyTable, Row
from profilers.target import Target
from profilers.timer import Call, Clock, Samples, exclusive, interleave

COLD_ROWS = 64
"""Up to so many rows a weight is read from memory at every step of a model; above, arithmetic hides where it comes from."""

_MOST_COPIES = 512
_MOST_OPERATIONS = 256  # of operators in a CUDA graph: reading a packed cache is dozens of kernels
_CELL_S = 0.25
_PATIENCE = 6.0
"""How much longer than a cell's measurement is waited for a machine that is not at its full pace."""


@dataclass(frozen=True)
class _Candidate:
    """What takes turns: a kernel with a weight and the input of all its calls, or an operator, which brings its own."""

    kernel: LinearKernel | Operator
    key: KernelKey
    prepared: Prepared | Operation
    inputs: tuple[Tensor, ...] = ()
    implementation: str = ""

    @property
    def few(self) -> bool:
        """Whether it has few rows: of a weight, or queries."""
        rows = self.key.m * self.key.n if kind_of(self.key.op) == "attention" else self.key.m
        return rows <= COLD_ROWS

    @property
    def hot(self) -> bool:
        """Whether a model finds it in a cache: norms, logits and the like are of what was just written."""
        return kind_of(self.key.op) in ("norm", "sampling", "elementwise")

    def calls(self, copies: int) -> list[Call]:
        """On so many copies."""
        others = (self.prepared.clone() for _ in range(copies - 1))
        return [partial(prepared, *self.inputs) for prepared in (self.prepared, *others)]


def measure(
    target: Target,
    keys: Iterable[KernelKey],
    table: LatencyTable,
    progress: Callable[[int, int], None] | None = None,
    *,
    notify: Callable[[str], None] | None = None,
    lock_folder: Path | None = None,
    budget_s: float = math.inf,
    clock: Clock | None = None,
) -> list[KernelKey]:
    """Times what the table misses; returns the keys that `budget_s` left unmeasured.

    Formats of one shape take turns on cold weights and are written as soon as the shape is done. progress: (cells done, of);
    notify: told when another run holds the timing lock, which lies in `lock_folder` (the table's own by default).
    """
    if not target.present:
        raise ValueError(f"target {target.name} is not here; its table can be read but not extended")
    keys = table.missing(keys)
    if not keys:
        return []
    folder = lock_folder or table.folder
    start = time.monotonic()
    done = 0
    with exclusive(folder, notify), torch_threads(target.threads), torch.inference_mode():
        table.refresh()  # another run may have measured the same while this one waited
        todo = table.missing(keys)
        for _, group in itertools.groupby(sorted(todo, key=_shape), key=_shape):
            shape_keys = list(group)
            if time.monotonic() - start > budget_s:
                break
            table.add(_measure_shape(target, shape_keys, table, clock))
            done += len(shape_keys)
            if progress:
                progress(done, len(todo))
    return table.missing(todo)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's intra-operation threads inside, as they were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shape(key: KernelKey) -> tuple[str, int, int, int]:
    return key.op, key.m, key.n, key.k


def _measure_shape(target: Target, keys: Sequence[KernelKey], table: LatencyTable, clock: Clock | None) -> list[Row]:
    able, rows = (_operations if kind_of(keys[0].op) in OPERATORS else _linears)(target, keys, table)
    ready, refused = _identified(target, able)
    return rows + refused + _timed(target, ready, clock)


def _operations(target: Target, keys: Sequence[KernelKey], table: LatencyTable) -> tuple[list[_Candidate], list[Row]]:
    ready: list[_Candidate] = []
    rows: list[Row] = []
    for key, operator in itertools.product(keys, OPERATORS[kind_of(keys[0].op)]):
        if not table.lacks(operator.name, operator.source_hash, key):
            continue
        reason = operator.supports(key, target)
        if reason is not None:
            rows.append(Row(operator.name, key, "unsupported", operator.source_hash, reason, load=load_average()))
            continue
        made = _checked(operator, key, target)
        if isinstance(made, str):
            rows.append(Row(operator.name, key, "failed", operator.source_hash, made, load=load_average()))
        else:
            ready.append(_Candidate(operator, key, made))
    return ready, rows


def _checked(operator: Operator, key: KernelKey, target: Target) -> Operation | str:
    """An operator on a cell's data, or why it is wrong."""
    try:
        made = operator.prepare(key, target)
        problem = made.problem()
    except failures() as error:
        problem = str(error).strip().splitlines()[0]
    return problem or made


def _linears(target: Target, keys: Sequence[KernelKey], table: LatencyTable) -> tuple[list[_Candidate], list[Row]]:
    _, m, n, k = _shape(keys[0])
    generator = torch.Generator().manual_seed(m * 31 + n * 7 + k)
    x = torch.randn(m, k, generator=generator).to(target.device, target.dtype)
    rows: list[Row] = []
    ready: list[_Candidate] = []
    for key in keys:
        fmt = parse_format(key.format)
        able = []
        for kernel in kernels(target):
            if not table.lacks(kernel.name, kernel.source_hash, key):
                continue
            reason = kernel.supports(fmt, n, k, m, target)
            if reason is None:
                able.append(kernel)
            else:
                rows.append(Row(kernel.name, key, "unsupported", kernel.source_hash, reason, load=load_average()))
        if able:
            good, bad = _gated(target, key, random_payload(fmt, n, k, generator), x, able)
            ready += good
            rows += bad
    return ready, rows


def _gated(
    target: Target, key: KernelKey, payload: Payload, x: Tensor, kernels: Sequence[LinearKernel]
) -> tuple[list[_Candidate], list[Row]]:
    ready, failed = [], []
    fmt = parse_format(key.format)
    like = None
    for kernel in kernels:
        try:
            like = kernel.prepare(fmt, payload, target, m=key.m, like=like)
            problem = gate.check(like, fmt, payload, x)
        except failures() as error:  # torch's operators say so where a build lacks them
            problem = str(error).strip().splitlines()[0]
        if problem is None and like is not None:
            ready.append(_Candidate(kernel, key, like, (x,)))
        else:
            failed.append(Row(kernel.name, key, "failed", kernel.source_hash, problem or "", load=load_average()))
    return ready, failed


def _identified(target: Target, able: Sequence[_Candidate]) -> tuple[list[_Candidate], list[Row]]:
    """Those to time, with what they really run, by a call of its own; not those that fall back to a reference."""
    found = [replace(c, implementation=implementation(c.prepared, c.inputs, target)) for c in able]
    refused = [
        Row(
            c.kernel.name, c.key, "unsupported", c.kernel.source_hash, why, load=load_average(), implementation=c.implementation
        )
        for c in found
        if (why := refusal(c.implementation))
    ]
    return [c for c in found if refusal(c.implementation) is None], refused


def _timed(target: Target, ready: Sequence[_Candidate], clock: Clock | None) -> list[Row]:
    if not ready:
        return []
    if target.device == "cuda":
        return _timed_on_cuda(target, ready, cuda_timer.CudaDevice(target))
    copies = _copies(target, sum(c.prepared.size_bytes() for c in ready)) if ready[0].few else 2
    samples = interleave(
        {str(index): candidate.calls(copies) for index, candidate in enumerate(ready)},
        rounds=max(6, min(40, 400 // copies)),
        min_rounds=4,
        budget_s=_CELL_S * len(ready),
        clock=clock,
        pace=None if clock else pace_of(target).full,
        patience_s=_PATIENCE * _CELL_S * len(ready),
    )
    return [_measured(c, samples[str(index)], c.few and not c.hot) for index, c in enumerate(ready)]


def _timed_on_cuda(target: Target, ready: Sequence[_Candidate], device: cuda_timer.Device) -> list[Row]:
    """Graphs over cold copies for few rows, events for many; one shape's copies of one kernel at a time would not interleave."""
    few = ready[0].few
    most = _MOST_OPERATIONS if kind_of(ready[0].key.op) in OPERATORS else cuda_timer.MOST_COPIES
    counts = [min(most, cuda_timer.copies(target, c.prepared.size_bytes())) if few else 2 for c in ready]
    calls = {str(index): c.calls(count) for index, (c, count) in enumerate(zip(ready, counts, strict=True))}
    samples = (cuda_timer.decode if few else cuda_timer.prefill)(calls, device)
    cold = [cuda_timer.is_cold(target, c.prepared.size_bytes(), count) for c, count in zip(ready, counts, strict=True)]
    return [_measured(c, samples[str(index)], cold[index] and not c.hot) for index, c in enumerate(ready)]


def _copies(target: Target, total_bytes: int) -> int:
    """Copies of each weight, so that between two uses of one more bytes pass than any cache holds.

    All candidates take turns, so their bytes count together: four last-level caches, at least 64 MiB, at most 200 MiB or an
    eighth of the memory.
    """
    rotation = min(200 << 20, max(4 * target.cache_bytes, 64 << 20), target.memory_bytes // 8)
    return max(4, min(_MOST_COPIES, math.ceil(rotation / max(1, total_bytes))))


def _measured(candidate: _Candidate, samples: Samples, cold: bool) -> Row:
    return Row(
        kernel=candidate.kernel.name,
        key=candidate.key,
        status="ok",
        source=candidate.kernel.source_hash,
        timing=samples.timing(),
        size_bytes=candidate.prepared.size_bytes(),
        cpu_ms=1e3 * sum(sample.cpu for sample in samples.all) / len(samples.all),
        load=load_average(),
        cold=cold,
        implementation=candidate.implementation,
    )


def load_average() -> float:
    """Processes that ran or wanted to, averaged over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


if __name__ == "__main__":
    from profilers.campaign import main

    sys.exit(main())
