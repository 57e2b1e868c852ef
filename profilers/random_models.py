"""Whole random models in a sweep: dense and in uniform formats, and what a block of theirs takes by the difference of two depths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from methods.formats.format import Format, parse_format
from profilers import clocks, cuda_timer, decoder
from profilers.cells import operator_cells
from profilers.decoder import Block, Decoder, norm_of
from profilers.end_to_end import Limits, Measurement, time_steps
from profilers.kernels.device import failures
from profilers.kernels.kernel import Prepared, hash_of
from profilers.kernels.payloads import random_payload
from profilers.operators import OPERATORS, contenders
from profilers.plan import Sizes
from profilers.runtime import Chooser, RuntimeRefusal
from profilers.sweep import load_average, torch_threads
from profilers.table import Check, KernelKey, LatencyTable, Row
from profilers.target import Target, digest_of
from profilers.timer import Clock, exclusive
from profilers.workload import Workload

KERNEL = "random-model"
"""What the table calls them in place of a kernel."""

WORKLOADS = (Workload("decode", context=512), Workload("prefill", prompt=512))

LIMITS = Limits(rounds=12, min_rounds=3, budget_s=30.0)

_MOST_BLOCKS = 16
_COPIES = 3
"""Dense models' worth of memory that making and timing all formats of one takes, or less."""


@dataclass(frozen=True)
class RandomModel:
    """What is timed together: a model's sizes in a workload, in several formats (the dense one first), at two depths."""

    sizes: Sizes
    workload: Workload
    formats: tuple[str, ...]
    n_blocks: int

    def key(self, fmt: str, n_blocks: int) -> KernelKey:
        """The cell of a step of it, in the form of `profilers.cells.model_key` but with its sizes written out."""
        load, s = self.workload, self.sizes
        widths = "x".join(map(str, (s.hidden, s.inner, s.heads, s.kv_heads, s.head_dim, s.vocabulary)))
        length = load.context if load.phase == "decode" else load.prompt
        return KernelKey(f"random-{load.phase}-{widths}", fmt, load.batch, length, n_blocks)

    @property
    def depths(self) -> tuple[int, int]:
        """All blocks and half of them."""
        return self.n_blocks, self.n_blocks // 2

    def cells(self) -> list[KernelKey]:
        """Every cell of it."""
        return [self.key(fmt, depth) for fmt in self.formats for depth in self.depths]

    def missing(self, table: LatencyTable, target: Target) -> list[KernelKey]:
        """The cells that a table has not, or of other code."""
        source = source_hash(target)
        return [key for key in self.cells() if table.lacks(KERNEL, source, key)]

    def fits(self, target: Target) -> bool:
        """Whether it leaves most of the memory to others."""
        weights = (
            sum(n * k for n, k in self.sizes.shapes()[:-1]) * self.n_blocks + 2 * self.sizes.vocabulary * self.sizes.hidden
        )
        return _COPIES * weights * target.dtype.itemsize <= target.memory_bytes // 2


def planned(sizes: Sequence[Sizes], formats: Sequence[str]) -> list[RandomModel]:
    """Each in both `WORKLOADS`, in the first dense format and the first of 8, 4 and 2 bits that divides all of its inputs."""
    return [
        RandomModel(each, workload, uniform_formats(each, formats), depth_of(each))
        for each in sizes
        for workload in WORKLOADS
        if uniform_formats(each, formats)
    ]


def uniform_formats(sizes: Sizes, formats: Sequence[str]) -> tuple[str, ...]:
    """See `planned`; empty without a dense one, which gives the head."""
    parsed = [parse_format(name) for name in formats]
    inputs = [k for _, k in sizes.shapes()[:-1]]
    wanted: tuple[Callable[[Format], bool], ...] = (
        lambda fmt: bool(fmt.dense),
        *(lambda fmt, bits=bits: not fmt.dense and fmt.bits == bits for bits in (8, 4, 2)),
    )
    fitting = [fmt for fmt in parsed if all(fmt.divides(k) for k in inputs)]
    found = [next((fmt.name for fmt in fitting if wants(fmt)), "") for wants in wanted]
    return tuple(filter(None, found)) if found[0] else ()


def depth_of(sizes: Sizes) -> int:
    """Blocks to time: twice as many, from 4 on, until they weigh as much as the head, whose time the difference has to get rid of."""
    *linears, (vocabulary, hidden) = sizes.shapes()
    n_blocks = 4
    while n_blocks < _MOST_BLOCKS and n_blocks * sum(n * k for n, k in linears) < vocabulary * hidden:
        n_blocks *= 2
    return n_blocks


def source_hash(target: Target) -> str:
    """Changes with the decoder's code and with that of every kernel and operator it may take."""
    here = hash_of(__file__, str(decoder.__file__), str(Path(__file__).with_name("end_to_end.py")))
    others = [entry.source_hash for op in ("linear", *OPERATORS) for entry in contenders(op, target.device)]
    return digest_of([here, others])


class RandomStep:
    """A step of a decoder on random tokens: at one place of its cache again and again, so nothing has to be undone."""

    def __init__(self, model: Decoder, workload: Workload) -> None:
        self.model = model
        decodes = workload.phase == "decode"
        self._place = workload.context if decodes else 0
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch, 1 if decodes else workload.prompt)
        self._ids = torch.randint(0, model.sizes.vocabulary, shape, generator=generator).to(model.embedding.device)

    def __call__(self) -> Tensor:
        """The next token of each sequence (batch,)."""
        return self.model(self._ids, self._place).argmax(-1)

    def reset(self) -> None:
        """Nothing: see above."""


def measure(
    target: Target,
    model: RandomModel,
    table: LatencyTable,
    *,
    limits: Limits = LIMITS,
    notify: Callable[[str], None] | None = None,
    lock_folder: Path | None = None,
    clock: Clock | None = None,
    device: cuda_timer.Device | None = None,
) -> None:
    """Times all formats and depths of a model in turns and keeps the rows; a block of each against the cells of what it computes.

    Kernels are the table's fastest. Does nothing where the table has all of it.
    """
    if not model.missing(table, target):
        return
    folder = lock_folder or table.folder
    with exclusive(folder, notify), torch_threads(target.threads), torch.inference_mode():
        made, refused = _made(target, model, table)
        keys = list(made)
        steps = {str(index): RandomStep(made[key], model.workload) for index, key in enumerate(keys)}
        runs = time_steps(steps, model.workload, target, limits, clock=clock, device=device) if steps else {}
        found = {keys[int(name)]: run for name, run in runs.items()}
        table.add([*(_row(target, key, run, made[key]) for key, run in found.items()), *refused])
        table.add_checks(_blocks(target, model, found, made, table))


def _made(target: Target, model: RandomModel, table: LatencyTable) -> tuple[dict[KernelKey, Decoder], list[Row]]:
    """A decoder for every cell, or a row with why there is none; they have one embedding, last norm and head."""
    sizes, load, generator = model.sizes, model.workload, torch.Generator().manual_seed(0)
    choose, dense = Chooser(target, table), parse_format(model.formats[0])
    embedding = torch.empty(sizes.vocabulary, sizes.hidden).normal_(std=1 / math.sqrt(sizes.hidden), generator=generator)
    head = choose(dense, sizes.vocabulary, sizes.hidden, load.batch).prepare(dense, {"weight": embedding}, target, m=load.batch)
    embedding = embedding.to(target.device, target.dtype)
    norm = _norm(sizes, target, generator)
    length = load.context + 1 if load.phase == "decode" else load.prompt
    made: dict[KernelKey, Decoder] = {}
    refused: list[Row] = []
    for fmt in model.formats:
        try:
            block = _block(sizes, parse_format(fmt), choose, load.tokens_in_flight, generator)
            blocks = [block, *(block.clone() for _ in range(model.n_blocks - 1))]
            whole = Decoder(sizes, blocks, embedding, norm, head, target, batch=load.batch, length=length)
            RandomStep(whole, load)()  # what does not run is not to end the whole measurement
            made |= {model.key(fmt, depth): whole.first(depth) for depth in model.depths}
        except RuntimeRefusal as error:
            refused += [_refused(target, model.key(fmt, depth), "unsupported", error) for depth in model.depths]
        except torch.OutOfMemoryError:
            raise
        except failures() as error:
            refused += [_refused(target, model.key(fmt, depth), "failed", error) for depth in model.depths]
    return made, refused


def _block(sizes: Sizes, fmt: Format, choose: Chooser, rows: int, generator: torch.Generator) -> Block:
    """Random payloads on the best kernels for so many rows; raises RuntimeRefusal where there is none."""

    def linear(n: int, k: int) -> Prepared:
        return choose(fmt, n, k, rows).prepare(fmt, random_payload(fmt, n, k, generator), choose.target, m=rows)

    qkv, o, gate_up, down = (linear(n, k) for n, k in sizes.shapes()[:-1])
    return Block(_norm(sizes, choose.target, generator), qkv, o, _norm(sizes, choose.target, generator), gate_up, down)


def _norm(sizes: Sizes, target: Target, generator: torch.Generator) -> nn.Module:
    return norm_of(1 + 0.1 * torch.randn(sizes.hidden, generator=generator), target)


def _refused(target: Target, key: KernelKey, status: Literal["unsupported", "failed"], error: Exception) -> Row:
    return Row(KERNEL, key, status, source_hash(target), str(error).strip().splitlines()[0], load=load_average())


def _row(target: Target, key: KernelKey, run: Measurement, made: Decoder) -> Row:
    samples, size = run.samples.all, made.size_bytes()
    cpu_ms = 1e3 * math.fsum(sample.cpu for sample in samples) / len(samples)
    cold = size >= target.cache_bytes
    return Row(KERNEL, key, "ok", source_hash(target), "", run.timing, size, cpu_ms, run.load, cold)


def _blocks(
    target: Target,
    model: RandomModel,
    found: Mapping[KernelKey, Measurement],
    made: Mapping[KernelKey, Decoder],
    table: LatencyTable,
) -> list[Check]:
    """A block's time by the difference of two depths, against its cells' sum, for formats of which all of that is known.

    A difference that is not above zero is noise, and left out.
    """
    mhz = clocks.read(target).mhz
    checks = []
    for fmt in model.formats:
        cells = block_cells(model, fmt, target)
        whole, half = (model.key(fmt, depth) for depth in model.depths)
        if whole not in found or not all(table.has(key) for key in cells):
            continue
        n_more = whole.k - half.k
        block_ms = found[whole].minus(found[half])[0] / n_more
        size = (made[whole].size_bytes() - made[half].size_bytes()) // n_more
        cells_ms = sum(table.best(key)[1].median_ms * count for key, count in cells.items())
        if block_ms > 0:
            checks.append(Check("block", KERNEL, whole, cells_ms, block_ms, size, found[whole].load, mhz))
    return checks


def block_cells(model: RandomModel, fmt: str, target: Target) -> dict[KernelKey, int]:
    """The cells of what a block computes and how often it does: its linears, and the operators that a step has more of for it."""
    rows = model.workload.tokens_in_flight
    linears = [KernelKey("linear", fmt, rows, n, k) for n, k in model.sizes.shapes()[:-1]]
    step = partial(operator_cells, model.sizes.widths, model.workload, target.compute_dtype)
    one, none = (Counter(dict(step(n_blocks=n_blocks))) for n_blocks in (1, 0))
    return {**Counter(linears), **(one - none)}
