"""This machine, another one and a GPU that is not here, what times on it, and tables with timings that a test states."""

from __future__ import annotations

from dataclasses import replace

from profilers.clocks import Clocks
from profilers.table import KernelKey, LatencyTable, Row, header_of
from profilers.target import Target, cuda_capabilities, local_cpu
from profilers.timer import Timing

HERE = local_cpu(1)
THERE = replace(HERE, fingerprint="0" * 16, description="another CPU")
GPU = replace(
    THERE,
    device="cuda",
    arch="sm90",
    sheet="h100",
    fingerprint="1" * 16,
    description="an H100",
    capabilities=cuda_capabilities((9, 0)),
)


def timing(ms: float, label: str = "measured") -> Timing:
    return Timing(ms, 0.9 * ms, 1.2 * ms, 9, label=label, lo_ms=0.95 * ms, hi_ms=1.05 * ms)  # type: ignore[arg-type]


def cell(n: int, k: int, fmt: str = "w4a8-g32", m: int = 1) -> KernelKey:
    return KernelKey("linear", fmt, m, n, k)


def table_of(target: Target, cells: dict[KernelKey, float]) -> LatencyTable:
    table = LatencyTable(target.fingerprint, target.description, header=header_of(target))
    table.add(Row("grouped", key, "ok", "hash", timing=timing(ms), size_bytes=key.n * key.k // 2) for key, ms in cells.items())
    return table


class FakeDevice:
    """Graphs are lists; a call takes 1 ms, 2 where it is cold; clocks as they are set."""

    def __init__(self, clocks: list[Clocks]) -> None:
        self._clocks, self.captures, self.timed = clocks, 0, 0

    def captured(self, calls):
        self.captures += 1
        return lambda: [call() for call in calls]

    def seconds(self, call) -> float:
        self.timed += 1
        result = call()
        return 1e-3 * (len(result) if isinstance(result, list) else 1)

    def clocks(self) -> Clocks:
        return self._clocks.pop(0)
