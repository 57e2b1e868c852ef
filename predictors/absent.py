"""Latencies of a target that is not here: its stored table, what lies between its cells, a sister's table, or a datasheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from methods.formats.format import parse_format
from methods.model.structure import Structure
from predictors.cells import MIN_SHAPES, Cell, fit_cells
from predictors.operator_cells import between
from profilers import roofline
from profilers.cells import model_key, outside_cells, site_cells, workload_of
from profilers.datasheets import DATASHEETS
from profilers.kernels.catalogue import supported
from profilers.label import Label, weakest
from profilers.operators import OPERATORS, kind_of
from profilers.table import KernelKey, LatencyTable, Row
from profilers.target import Target
from profilers.timer import Timing, quantile
from profilers.workload import Workload

LINEAR = "linear"

MIN_PROBES = 5
"""Cells that a device and its sister have to share before their ratio stands in for the datasheets'."""


class Elsewhere:
    """What is known of a target that is not here; its stored tables are read once.

    Raises TableError where one of them cannot be read.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._own = None if target.table is None else _Table(target.table)
        self._sister = None if target.sister_table is None else _Table(target.sister_table)
        self._factor = probe_factor(self._sister.table, self._own.table) if self._own and self._sister else None
        self._rows: dict[KernelKey, list[Row]] = {}

    def rows(self, key: KernelKey) -> list[Row]:
        """What the target's own table says of a cell, else its sister's, or without either its datasheet; empty where nothing does.

        Timings keep their labels.
        """
        if key not in self._rows:
            rows = [] if self._own is None else self._own.rows(key)
            if not rows and self._sister is not None:
                rows = [_transferred(self._target, row, self._factor) for row in self._sister.rows(key)]
            if self._own is None and self._sister is None:
                rows = _modelled(self._target, key)
            self._rows[key] = rows
        return self._rows[key]

    def best(self, key: KernelKey) -> Timing | None:
        """The fastest of `rows`, or None."""
        return min((row.timing for row in self.rows(key) if row.timing), key=lambda timing: timing.median_ms, default=None)

    def runs(self, structure: Structure, workload: Workload) -> list[Workload]:
        """In which workloads of a workload's phase whole models of these shapes were run there, or on its sister; the nearest first."""
        key = model_key(structure, workload)
        tables = [source.table for source in (self._own, self._sister) if source is not None]
        found = {workload_of(at) for table in tables for at in table.keys() if replace(at, m=key.m, n=key.n) == key}  # noqa: SIM118
        return sorted(found, key=lambda run: _distance(run, workload))

    def table(self, keys: Iterable[KernelKey]) -> LatencyTable:
        """A table in memory with those of `keys` of which something is known, and the checks of the tables that it comes from."""
        result = LatencyTable(self._target.fingerprint, self._target.description)
        for key in dict.fromkeys(keys):
            result.add(self.rows(key))
        for source in filter(None, (self._own, self._sister)):
            result.checks += source.table.checks
        return result


def label_of(table: LatencyTable, keys: Iterable[KernelKey]) -> Label:
    """The least trustworthy label among the best timings of `keys`."""
    return weakest(table.best(key)[1].label for key in keys if table.has(key))


class _Table:
    """A stored table, and a model of the kernel times between its cells."""

    def __init__(self, path: Path) -> None:
        self.table = LatencyTable.read(path)
        timed = [
            Cell(row.kernel, row.key.format, row.key.m, row.key.n, row.key.k, row.timing.median_ms)
            for row in self.table.rows.values()
            if row.timing is not None and row.key.op == LINEAR
        ]
        self._spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for cell in timed:
            self._spans.setdefault((cell.kernel, cell.format), []).append((cell.n * cell.k, cell.m))
        enough = any(
            len({cell.shape for cell in timed if (cell.kernel, cell.format) == kind}) > MIN_SHAPES for kind in self._spans
        )
        self._model = fit_cells(timed) if enough else None

    def rows(self, key: KernelKey) -> list[Row]:
        """The kernels that were timed at a cell, or where none was, what the others say of those timed around it."""
        found = [row for (_, at), row in self.table.rows.items() if at == key and row.status == "ok"]
        return found or [Row(kernel, key, "ok", "", timing=timing) for kernel, timing in self._between(key)]

    def _between(self, key: KernelKey) -> Iterator[tuple[str, Timing]]:
        if kind_of(key.op) in OPERATORS:
            yield from between(self.table.rows.values(), key)
            return
        for (kernel, fmt), spans in self._spans.items():
            sizes, rows = zip(*spans, strict=True)
            inside = min(sizes) <= key.n * key.k <= max(sizes) and min(rows) <= key.m <= max(rows)
            if self._model is None or fmt != key.format or key.op != LINEAR or not inside:
                continue
            if not self._model.knows(kernel, fmt):
                continue
            ms = self._model.predict(kernel, fmt, key.m, key.n, key.k)
            yield kernel, Timing(ms.mean, ms.lo, ms.hi, 0, label="interpolated", lo_ms=ms.lo, hi_ms=ms.hi)


def _modelled(target: Target, key: KernelKey) -> list[Row]:
    sheet = DATASHEETS[target.sheet]
    if kind_of(key.op) in OPERATORS:
        return [Row("roofline", key, "ok", "", timing=roofline.operator(sheet, key))]
    fmt = parse_format(key.format)
    if key.op != LINEAR or fmt.thinned or not (fmt.dense or supported(fmt, key.n, key.k, key.m, target)):
        return []
    return [Row("roofline", key, "ok", "", timing=roofline.linear(sheet, key))]


def _transferred(target: Target, row: Row, factor: float | None) -> Row:
    """A sister's row times the factor that probes gave, or what the two datasheets say of that cell."""
    assert row.timing is not None
    own, other = DATASHEETS[target.sheet], DATASHEETS[target.sister]
    if factor is None and row.key.op == LINEAR:
        factor = roofline.linear(own, row.key).median_ms / roofline.linear(other, row.key).median_ms
    elif factor is None and kind_of(row.key.op) in OPERATORS:
        factor = roofline.operator(own, row.key).median_ms / roofline.operator(other, row.key).median_ms
    elif factor is None:
        decode = row.key.op.startswith("model-decode")
        factor = other.bandwidth / own.bandwidth if decode else other.peak["bf16"] / own.peak["bf16"]
    return replace(row, timing=scaled(row.timing, factor))


def scaled(timing: Timing, factor: float) -> Timing:
    """Another device's timing times a factor: `transferred`."""
    times = {name: getattr(timing, name) * factor for name in ("median_ms", "p10_ms", "p90_ms", "lo_ms", "hi_ms")}
    label: Label = weakest((timing.label, "transferred"))
    return replace(timing, **times, label=label)


def rest_of_step(
    elsewhere: Elsewhere, structure: Structure, workload: Workload, dtype: str, experts_per_token: int = 0
) -> Timing | None:
    """A dense step less its sites' kernels: of the target's run of such a model in that workload, or from its nearest run in another.

    From another: that run's rest and the difference of what `outside_cells` lists, `interpolated` at best; what is no cell counts as in
    the run. dtype: the target's compute dtype. None where no run is there from which measured cells reach the workload.
    """
    fmt = parse_format(structure.dtype)
    wanted = Counter(dict(outside_cells(structure, workload, dtype)))
    for run in elsewhere.runs(structure, workload):
        had = Counter(dict(outside_cells(structure, run, dtype)))
        sites = (item for site in structure.sites for item in site_cells(site, fmt, run.tokens_in_flight, experts_per_token))
        whole = elsewhere.best(model_key(structure, run))
        parts = [_sum(elsewhere, cells) for cells in (sites, (wanted - had).items(), (had - wanted).items())]
        if whole is None or None in parts:
            continue
        kernels, more, less = (part for part in parts if part is not None)
        ms = (
            max(at - kernels.median_ms, 0.0) + plus - minus
            for at, plus, minus in (
                (whole.median_ms, more.median_ms, less.median_ms),
                (whole.lo_ms, more.lo_ms, less.hi_ms),
                (whole.hi_ms, more.hi_ms, less.lo_ms),
            )
        )
        median, low, high = (max(each, 0.0) for each in ms)
        label = (
            whole.label if run == workload else weakest(("interpolated", whole.label, kernels.label, more.label, less.label))
        )
        return replace(whole, median_ms=median, lo_ms=low, hi_ms=high, label=label)
    return None


def _sum(elsewhere: Elsewhere, cells: Iterable[tuple[KernelKey, int]]) -> Timing | None:
    """Of calls, or None where one of them is not known."""
    found = [(elsewhere.best(key), count) for key, count in cells]
    known = [(timing, count) for timing, count in found if timing is not None]
    return summed(known) if len(known) == len(found) else None


def _distance(run: Workload, workload: Workload) -> tuple[float, float]:
    """How far a run is from a workload: in its batch first, whose change brings other kernels, then in its length."""
    batch = abs(math.log(run.batch / workload.batch))
    lengths = [each.context if each.phase == "decode" else each.prompt for each in (run, workload)]
    return batch, abs(math.log(lengths[0] / lengths[1]))


def probe_factor(sister: LatencyTable, probes: LatencyTable) -> float | None:
    """By how much slower than its sister a device is: the median over the cells that both have of the ratio of their best timings.

    None where they share fewer than `MIN_PROBES`.
    """
    measured = probes.keys()
    shared = [key for key in measured if sister.has(key)]
    if len(shared) < MIN_PROBES:
        return None
    return quantile(sorted(probes.best(key)[1].median_ms / sister.best(key)[1].median_ms for key in shared), 0.5)


def summed(timings: Sequence[tuple[Timing, int]]) -> Timing:
    """The time of several calls, one after the other: medians and bounds add up, which makes the bounds wide."""
    names = ("median_ms", "p10_ms", "p90_ms")
    sums = {name: math.fsum(getattr(timing, name) * count for timing, count in timings) for name in names}
    label: Label = weakest(timing.label for timing, _ in timings)
    return Timing(sums["median_ms"], sums["p10_ms"], sums["p90_ms"], 0, label, sums["p10_ms"], sums["p90_ms"])
