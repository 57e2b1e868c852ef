"""How much faster than dense bf16 each format's fastest kernel is: `python -m results.benchmarks.latency.kernels` prints the tables.

Shapes of the default model's four kinds of linears; up to 64 rows with cold weights, all formats of a shape taking turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from profilers.plan import MODELS, Shape, cells
from profilers.sweep import measure
from profilers.table import KernelKey, LatencyTable
from profilers.target import Target, local_cpu
from spaces.runtimes import DEFAULT_FORMATS

BASE = ("bf16", "dense-prepacked")
"""What everything is compared with: a format and its kernel."""

FORMATS = (
    *DEFAULT_FORMATS["isolatency"],
    *("w8a8-token", "w4a16-g64", "nf4a16-g64", "nf4a8-g64", "bf16-s90", "bf16-s95", "bf16-r64", "bf16-r128"),
)
PACKAGED = (("w4a16-g64", "int4pack"), ("w8a16", "int8pack"))
"""torch's own weight-only kernels, whether they are the fastest of their format or not."""

NAMES = ("q+k+v", "o", "gate+up", "down")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128, 512], help="rows of x (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    options = parser.parse_args()
    target = local_cpu(options.threads)
    shapes = MODELS["smollm2-135m"].shapes()[: len(NAMES)]
    measured = list(dict.fromkeys([BASE[0], *options.formats, *(fmt for fmt, _ in PACKAGED)]))
    table = LatencyTable(target.fingerprint, target.description)
    with tempfile.TemporaryDirectory() as folder:  # where the lock of this machine's timings lies, as no table does
        measure(target, cells(shapes, measured, options.rows), table, lock_folder=Path(folder))
    sys.stdout.write(_head(target))
    for m in options.rows:
        sys.stdout.write(_table(table, m, shapes, options.formats))


def _head(target: Target) -> str:
    return (
        f"{target.description}; torch {torch.__version__}; {date.today()}. Measured: medians, times faster than {BASE[1]} {BASE[0]}, "
        "and the kernel that was; of that one itself ms with p10 and p90.\n"
    )


def _table(table: LatencyTable, m: int, shapes: Sequence[Shape], formats: Sequence[str]) -> str:
    lines = [
        f"\n{m} rows\n",
        "| format | " + " | ".join(f"{name} {n}x{k}" for name, (n, k) in zip(NAMES, shapes, strict=True)) + " |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    lines.append(_line(f"{BASE[0]}, ms", [_base(table, KernelKey("linear", BASE[0], m, *shape)) for shape in shapes]))
    rows: list[tuple[str, str | None]] = [(name, None) for name in formats]
    for name, kernel in [*rows, *PACKAGED]:
        cell = [_ratio(table, KernelKey("linear", name, m, *shape), kernel) for shape in shapes]
        lines.append(_line(name if kernel is None else f"{name}, {kernel}", cell))
    return "\n".join(lines) + "\n"


def _line(label: str, cell: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cell)} |"


def _base(table: LatencyTable, key: KernelKey) -> str:
    timing = table.timings(key)[BASE[1]]
    return f"{timing.median_ms:.4f} ({timing.p10_ms:.4f}-{timing.p90_ms:.4f})"


def _ratio(table: LatencyTable, key: KernelKey, kernel: str | None) -> str:
    base = table.timings(KernelKey(key.op, BASE[0], key.m, key.n, key.k))[BASE[1]]
    timings = table.timings(key)
    name = kernel or next(iter(timings), "")
    return f"{base.median_ms / timings[name].median_ms:.2f} {name}" if name in timings else "none"


if __name__ == "__main__":
    main()
