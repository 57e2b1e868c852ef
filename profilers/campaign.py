"""A sweep over a device: cells in the order of a plan, some of them twice, a reference cell in between and random models behind them."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from profilers import clocks, random_models
from profilers.checks import summary
from profilers.duration import parse_duration
from profilers.operators import OPERATORS, footprint, kind_of
from profilers.plan import FIRST_ROWS, FORMATS, MODELS, by_shape, cells, log_uniform, operators, read_shapes
from profilers.random_models import RandomModel
from profilers.resolution import look_up
from profilers.sweep import measure
from profilers.table import Check, KernelKey, LatencyTable
from profilers.target import Target, digest_of, local_cpu
from profilers.timer import exclusive

REFERENCE = KernelKey("linear", "bf16", 1, 2048, 2048)
"""What tells whether the device is still in the state that it was in."""

BLOCK_S = 60.0
"""Seconds of measuring between two looks at the reference cell."""

REPEATED = 10
"""One cell of so many is measured again at the end, unless a sweep says otherwise."""

_COPIES = 4
_LOOKS = 3

Say = Callable[[str], None]
Count = Callable[[int, int], None]


def sweep(
    target: Target,
    keys: Sequence[KernelKey],
    table: LatencyTable,
    *,
    models: Sequence[RandomModel] = (),
    repeated: int = REPEATED,
    budget_s: float = math.inf,
    progress: Count | None = None,
    notify: Say | None = None,
    lock_folder: Path | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[KernelKey]:
    """Measures the cells that the table misses, in their order, then random models, what something disturbed once more, and one in
    `repeated` cells again.

    Returns what the budget left; what is too large for the memory is not among it.

    Whatever was measured is on disk before the next cell begins. The lock is free between two shapes, so that others get their turn.
    progress: (cells done, of).
    """
    begin, first_s = now(), budget_s * (1 - 1.2 / (repeated + 1.2))  # what is left is for measuring again

    def until(seconds: float) -> Callable[[object], bool]:
        return lambda _: now() - begin <= seconds

    todo = [key for key in table.missing(keys) if fits(target, key)]
    groups = by_shape(todo)
    looked, done = -math.inf, 0
    for group in itertools.takewhile(until(first_s), groups):
        if now() - looked > BLOCK_S:
            table.add_checks(_drift(target, table, notify, lock_folder))
            looked = now()
        measure(target, group, table, notify=notify, lock_folder=lock_folder)
        done += len(group)
        if progress:
            progress(done, len(todo))
    fitting = [model for model in models if model.fits(target)]
    for model in itertools.takewhile(until(first_s), fitting):
        random_models.measure(target, model, table, notify=notify, lock_folder=lock_folder)
    disturbed = by_shape([key for key in keys if _disturbed(table, key)])
    for group in itertools.takewhile(until(first_s), disturbed):
        _better(target, group, table, notify, lock_folder)
    for group in itertools.takewhile(until(budget_s), by_shape([key for key in keys if fits(target, key)])):
        if _to_repeat(group[0], repeated) and table.has(group[0]) and not _checked(table, group):
            table.add_checks(_again(target, group, table, notify, lock_folder))
    if todo:
        table.add_checks(_drift(target, table, notify, lock_folder))
    left = [key for key in table.missing(keys) if fits(target, key)]
    return left + [key for model in fitting for key in model.missing(table, target)]


def fits(target: Target, key: KernelKey) -> bool:
    """Whether a cell's weight, dense and a few times, or an operator's data leave most of the memory to others."""
    needed = footprint(key) if kind_of(key.op) in OPERATORS else _COPIES * 4 * key.n * key.k
    return needed <= target.memory_bytes // 2


def _to_repeat(key: KernelKey, repeated: int) -> bool:
    """The same cells in every run of a sweep."""
    return int(digest_of([key.m, key.n, key.k]), 16) % repeated == 0


def _checked(table: LatencyTable, group: Sequence[KernelKey]) -> bool:
    return any(check.kind == "repeat" and check.key in group for check in table.checks)


def _again(
    target: Target, group: Sequence[KernelKey], table: LatencyTable, notify: Say | None, lock_folder: Path | None
) -> list[Check]:
    """Another measurement of cells, against what the table has of them."""
    fresh = _fresh(target, group, table, notify, lock_folder)
    mhz = clocks.read(target).mhz
    found = []
    for (kernel, key), row in fresh.rows.items():
        before = table.rows.get((kernel, key))
        if row.timing is not None and before is not None and before.timing is not None:
            medians = before.timing.median_ms, row.timing.median_ms
            found.append(Check("repeat", kernel, key, *medians, row.size_bytes, row.load, mhz))
    return found


def _disturbed(table: LatencyTable, key: KernelKey) -> bool:
    return any(timing.disturbed for timing in table.timings(key).values())


def _better(
    target: Target, group: Sequence[KernelKey], table: LatencyTable, notify: Say | None, lock_folder: Path | None
) -> None:
    """Another measurement of cells, of which what was not disturbed counts from now on."""
    fresh = _fresh(target, group, table, notify, lock_folder)
    with exclusive(lock_folder or table.folder, notify):
        table.add(row for row in fresh.rows.values() if row.timing is not None and not row.timing.disturbed)


def _drift(target: Target, table: LatencyTable, notify: Say | None, lock_folder: Path | None) -> list[Check]:
    """The reference cell now, against the first time in this table; what something disturbed is looked at again, a few times at most."""
    for _ in range(_LOOKS):
        fresh = _fresh(target, [REFERENCE], table, notify, lock_folder)
        kernel, timing = fresh.best(REFERENCE)
        if not timing.disturbed:
            break
    first = next((check.first_ms for check in table.checks if check.kind == "drift"), timing.median_ms)
    row = fresh.rows[kernel, REFERENCE]
    return [Check("drift", kernel, REFERENCE, first, timing.median_ms, row.size_bytes, row.load, clocks.read(target).mhz)]


def _fresh(
    target: Target, group: Sequence[KernelKey], table: LatencyTable, notify: Say | None, lock_folder: Path | None
) -> LatencyTable:
    fresh = LatencyTable(table.fingerprint, table.description, header=table.header)
    folder = lock_folder or table.folder
    measure(target, group, fresh, notify=notify, lock_folder=folder)
    return fresh


def provenance(target: Target, command: Sequence[str]) -> dict[str, object]:
    """How a table came about, besides what its header says: command, clocks and driver, as far as the device tells."""
    now = asdict(clocks.read(target))
    known = {name: value for name, value in now.items() if not (isinstance(value, float) and math.isnan(value))}
    return {"command": " ".join(command), "clocks": known, "driver": clocks.driver()}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m profilers.sweep --out DIR --budget 10m`: a slice of the whole sweep, which goes on where the last one ended.

    Needs torch, numpy and pandas alone. 0 when the sweep is complete, 3 when the budget left cells, 2 for bad input, 130 interrupted.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return _slice(parsed)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"sweep: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what was measured is kept, the same command goes on from there\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m profilers.sweep", description="Measure this device's latency table.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the table, FINGERPRINT.jsonl")
    parser.add_argument("--budget", default="", help="time to measure, 10m; default: until complete")
    parser.add_argument("--target", default="", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=0, help="threads of a CPU; 0: half of its cores")
    parser.add_argument("--models", default="", metavar="M,M", help=f"of {', '.join(MODELS)}; default: all that fit")
    parser.add_argument("--shapes", default="", metavar="FILE", help="shapes instead of models, outputs and inputs a line")
    parser.add_argument("--plan", type=int, default=40, metavar="N", help="log-uniform shapes besides; 0: none")
    parser.add_argument("--formats", default="", metavar="F,F", help="default: what the device's kernels are for")
    parser.add_argument(
        "--repeat", type=int, default=REPEATED, metavar="N", help="measure one cell in N twice; default: %(default)s"
    )
    parser.add_argument("--rows", default="", metavar="M,M", help="rows of the products; default: from 1 to 2048")
    return parser


def _slice(parsed: argparse.Namespace) -> int:
    target = local(parsed.target, parsed.threads or None)
    if parsed.repeat < 1:
        raise ValueError(f"--repeat {parsed.repeat}: one cell in so many is measured twice; use 1 (all) or more")
    folder = Path(parsed.out)
    table = LatencyTable.open(folder, target)
    keys, models = _planned(parsed, target), _planned_models(parsed, target)
    budget_s = parse_duration(parsed.budget) if parsed.budget else math.inf
    began, told = time.monotonic(), [0.0]

    def progress(done: int, total: int) -> None:
        spent = time.monotonic() - began
        if spent - told[0] > 5 or done == total:
            told[0] = spent
            sys.stderr.write(f"{done} of {total} cells, {spent / done * (total - done) / 60:.0f} min left\n")

    sys.stderr.write(f"{target.description}; table {table.path}\n")
    left = sweep(
        target, keys, table, models=models, repeated=parsed.repeat, budget_s=budget_s, progress=progress, notify=_write
    )
    table.describe(provenance(target, sys.argv))
    _write(summary(table))
    if left:
        total = len(keys) + sum(len(model.cells()) for model in models)
        _write(f"{len(left)} of {total} cells are left; the same command goes on")
    return 3 if left else 0


def _write(text: str) -> None:
    sys.stderr.write(text + "\n")


def local(name: str, threads: int | None = None) -> Target:
    """The device of a name, which has to be here; "" is the CUDA device where there is one, else the CPU. Raises ValueError."""
    if name in ("", "cpu"):
        cuda = look_up("cuda").target if not name else None
        return cuda or local_cpu(threads)
    found = look_up(name, threads=threads)
    if found.target is None or not found.target.present:
        raise ValueError(f"--target {name}: not here ({found.why}); a table is measured on the device that it is of")
    return found.target


def _planned_models(parsed: argparse.Namespace, target: Target) -> list[RandomModel]:
    """None where shapes are named instead of models."""
    if parsed.shapes:
        return []
    return random_models.planned([MODELS[name] for name in _model_names(parsed)], _formats(parsed, target))


def _model_names(parsed: argparse.Namespace) -> list[str]:
    names = [name for name in parsed.models.split(",") if name] or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"--models {unknown[0]}: not known; use {', '.join(MODELS)}, or --shapes FILE")
    return names


def _formats(parsed: argparse.Namespace, target: Target) -> tuple[str, ...]:
    return tuple(filter(None, parsed.formats.split(","))) or FORMATS[target.device]


def _planned(parsed: argparse.Namespace, target: Target) -> list[KernelKey]:
    names = _model_names(parsed)
    shapes = read_shapes(Path(parsed.shapes)) if parsed.shapes else [shape for name in names for shape in MODELS[name].shapes()]
    shapes += log_uniform(parsed.plan) if parsed.plan else []
    formats = _formats(parsed, target)
    others = [] if parsed.shapes else operators([MODELS[name].widths for name in names], target.compute_dtype)
    if not parsed.rows:
        both = cells(shapes, formats, FIRST_ROWS)  # before the operators, so that a short sweep has both phases of all shapes
        return list(dict.fromkeys([*both, *others, *cells(shapes, formats)]))
    rows = [int(text) for text in parsed.rows.split(",") if text.isdigit() and int(text)]
    if len(rows) < len(parsed.rows.split(",")):
        raise ValueError(f"--rows {parsed.rows}: whole numbers above zero, with commas, such as 1,8,512")
    return [*cells(shapes, formats, rows), *others]
