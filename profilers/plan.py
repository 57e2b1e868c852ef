"""Which cells a sweep measures: the shapes of a model, of models people use, of a file, and a log-uniform plan between them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from methods.formats.format import parse_format
from methods.model.structure import Structure
from methods.typed import Range, shown, text_of
from profilers.cached_attention import Heads
from profilers.cells import Widths, operator_cells, site_cells
from profilers.table import KernelKey
from profilers.workload import Workload

Shape = tuple[int, int]
"""Outputs and inputs of a linear: (n, k)."""

DECODE_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (128, 512, 2048)
FIRST_ROWS = (1, 512)
"""One of each phase."""

PLANS = Range(0, 10_000)
"""Log-uniform shapes of one plan; there are some 60,000 that differ."""

SIDES = Range(1, 2**20)
"""Outputs or inputs of a linear."""

BATCHES = (1, 8)
CONTEXTS = (128, 512, 2048, 8192)

CACHES = ("kv-int8", "kv-fp8", "kv-int4")
"""Cache formats that attention is measured with, besides the compute dtype's own."""

FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": (
            "bf16", "w8a8-g64", "w8a8-token", "w4a8-g32-asym", "w4a8-g64-asym", "w4a8-g64", "w4a16-g64", "w3a8-g32-asym",
            "w3a8-g64-asym", "w2a8-g32-asym", "w2a8-g64-asym", "nf4a16-g64", "nf4a8-g64", "bf16-s90", "bf16-s95", "bf16-r64",
            "bf16-r128",
        ),
        "cuda": (
            "bf16", "w8a16-g64", "w8a8-token", "w8a8-g64", "w4a16-g64", "w4a16-g128", "w4a16-g64-asym", "w4a8-g64", "w3a16-g64",
            "w2a16-g64", "nf4a16-g64", "fp8-token", "bf16-2of4", "bf16-r128",
        ),
    }
)  # fmt: skip
"""What is measured where no formats are named, by kind of device."""


@dataclass(frozen=True)
class Sizes:
    """A model's widths: hidden, inner, heads, key/value heads, head dimension, vocabulary."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def widths(self) -> Widths:
        """Those that operators depend on."""
        return Widths(self.hidden, Heads(self.heads, self.kv_heads, self.head_dim), self.vocabulary, self.inner)

    def shapes(self) -> list[Shape]:
        """q+k+v, o, gate+up, down, and the output head."""
        attention = self.heads * self.head_dim
        return [
            (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            (self.hidden, attention),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
            (self.vocabulary, self.hidden),
        ]


MODELS: Mapping[str, Sizes] = MappingProxyType(
    {
        "llama-3.2-1b": Sizes(2048, 8192, 32, 8, 64, 128256),
        "llama-3.2-3b": Sizes(3072, 8192, 24, 8, 128, 128256),
        "llama-3.1-8b": Sizes(4096, 14336, 32, 8, 128, 128256),
        "qwen3-1.7b": Sizes(2048, 6144, 16, 8, 128, 151936),
        "qwen3-4b": Sizes(2560, 9728, 32, 8, 128, 151936),
        "qwen3-8b": Sizes(4096, 12288, 32, 8, 128, 151936),
        "gemma-2-2b": Sizes(2304, 9216, 8, 4, 256, 256000),
        "smollm2-135m": Sizes(576, 1536, 9, 3, 64, 49152),
    }
)
"""By the names that people know them by, from their published configurations."""


def log_uniform(count: int = 40, seed: int = 0, smallest: int = 192, largest: int = 16384) -> list[Shape]:
    """Shapes whose sides, multiples of 64, are spread evenly over their logarithm: what a fit between shapes needs."""
    if count not in PLANS:
        raise ValueError(f"--plan {count}: use a whole number{PLANS.words}")
    generator = random.Random(seed)

    def side() -> int:
        wanted = smallest * math.exp(math.log(largest / smallest) * generator.random())
        return max(smallest, round(wanted / 64) * 64)

    found = dict.fromkeys([(192, 576), (576, 192)])
    while len(found) < count:
        found[side(), side()] = None
    return list(found)


def read_shapes(path: Path) -> list[Shape]:
    """Shapes from a text file, `outputs inputs` a line (commas do too, `#` starts a comment); raises ValueError naming the line."""
    shapes: list[Shape] = []
    for number, line in enumerate(text_of(path, "give a text file of shapes").splitlines(), 1):
        content = line.partition("#")[0].strip()
        match = re.fullmatch(r"([0-9]{1,7})[\s,;x]+([0-9]{1,7})", content)
        sides = tuple(map(int, match.groups())) if match else ()
        if content and not (sides and all(side in SIDES for side in sides)):
            raise ValueError(
                f"{path}: line {number}, {shown(content)}, is not a shape; write outputs and inputs{SIDES.words}, such as 1536 576"
            )
        if sides:
            shapes.append((sides[0], sides[1]))
    if not shapes:
        raise ValueError(f"{path}: no shapes in it; write outputs and inputs, such as 1536 576, one shape a line")
    return shapes


def cells(shapes: Iterable[Shape], formats: Sequence[str], rows: Sequence[int] = DECODE_ROWS + PREFILL_ROWS) -> list[KernelKey]:
    """Every format that divides a shape, at every number of rows; few rows of all shapes come first, so that a short sweep has both phases.

    Raises ValueError for a format that there is not.
    """
    unique = list(dict.fromkeys(shapes))
    order = sorted(rows, key=lambda m: (m not in FIRST_ROWS, m))
    fitting = {shape: [name for name in formats if parse_format(name).divides(shape[1])] for shape in unique}
    return [KernelKey("linear", name, m, *shape) for m in order for shape in unique for name in fitting[shape]]


def model_cells(
    structure: Structure, formats: Sequence[str], rows: Sequence[int], experts_per_token: int = 0
) -> list[KernelKey]:
    """The cells of a model's sites in a few formats, and of its head in its own."""
    found: dict[KernelKey, None] = {}
    for m in rows:
        for site in structure.sites:
            for name in dict.fromkeys((structure.dtype, *formats)):
                if parse_format(name).divides(site.d_in):
                    found |= dict.fromkeys(key for key, _ in site_cells(site, parse_format(name), m, experts_per_token))
        found[KernelKey("linear", structure.dtype, m, structure.n_vocab, structure.d_model)] = None
    return list(found)


def operators(widths: Iterable[Widths], dtype: str, workloads: Sequence[Workload] = ()) -> list[KernelKey]:
    """The cells outside of linears of models of some widths: in some workloads, and where others are interpolated between."""
    grid = [Workload("decode", batch, context=context) for batch in BATCHES for context in CONTEXTS]
    grid += [Workload("prefill", prompt=prompt) for prompt in PREFILL_ROWS]
    caches = ("", *(cache for cache in CACHES if cache != f"kv-{dtype}"))
    found: dict[KernelKey, None] = {}
    for own in dict.fromkeys(widths):
        for workload in dict.fromkeys((*workloads, *grid)):
            for cache in caches:
                found |= dict.fromkeys(key for key, _ in operator_cells(own, workload, dtype, cache))
    return sorted(found, key=lambda key: (key.op, key.m, key.n, key.k))


def by_shape(keys: Sequence[KernelKey]) -> list[list[KernelKey]]:
    """The same cells, those that take turns in one measurement together, in the order of their first."""
    return [list(group) for _, group in groupby(keys, key=lambda key: (key.op, key.m, key.n, key.k))]
