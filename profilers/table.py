"""The latency table of a machine: an append-only file of what every kernel took at every shape. It raises rather than guesses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, NotRequired, Self, TypedDict

from methods.atomic import write_bytes, write_text
from methods.errors import InputError
from methods.locks import try_lock
from methods.typed import AtLeastOne, Count, Positive, json_of, read
from profilers.kernels.build import kernel_folder
from profilers.operators import contenders
from profilers.target import Target
from profilers.timer import Timing

SCHEMA = 3
"""1 had no device kind, no provenance, no checks and no checksums, 2 no implementations and no blocks; both are still read."""

KIND = "isolatency latency table"

_LOG = logging.getLogger(__name__)


class TableError(InputError):
    """A file that is not a latency table, or not one of this machine."""


class MissingCell(KeyError):
    """Nothing was measured for a key."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, order=True)
class KernelKey:
    """What is timed: x (m, k) times a weight (n, k) under a format (op `linear`), or what else a step computes (`profilers.cells`)."""

    op: str
    format: str
    m: Count
    n: Count
    k: Count


@dataclass(frozen=True)
class Row:
    """One kernel at one key. `source`: hash of the kernel's code; reason: why it was refused or failed; load: 1-minute load average.

    cpu_ms: CPU time a call of the calling thread; cold: the weight was not in a cache; implementation: what the kernel really ran
    (`profilers.implementation`), "" where nothing told.
    """

    kernel: str
    key: KernelKey
    status: Literal["ok", "unsupported", "failed"]
    source: str
    reason: str = ""
    timing: Timing | None = None
    size_bytes: Count = 0
    cpu_ms: float = 0.0
    load: float = 0.0
    cold: bool = True
    implementation: str = ""


@dataclass(frozen=True)
class Check:
    """Something that was timed twice: the same cell in another pass (`repeat`), the reference cell in the course of a sweep (`drift`),
    or a block of a random model (`block`): as the sum of its cells, and by the difference of two depths.

    first_ms, again_ms: the medians (of `drift`, first is the sweep's first); size_bytes: of the weight; clock_mhz: of the device
    then, nan where it does not tell.
    """

    kind: Literal["repeat", "drift", "block"]
    kernel: str
    key: KernelKey
    first_ms: Positive
    again_ms: Positive
    size_bytes: Count
    load: float
    clock_mhz: float = math.nan

    @property
    def ratio(self) -> float:
        """The larger median over the smaller."""
        return max(self.first_ms, self.again_ms) / min(self.first_ms, self.again_ms)


class Header(TypedDict):
    """A table's first line: what was measured, and how. The first tables said of a device only what it is."""

    schema: int
    kind: Literal["isolatency latency table"]
    fingerprint: str
    description: str
    facts: NotRequired[Mapping[str, Any]]
    arch: NotRequired[str]
    device: NotRequired[Literal["cpu", "cuda"]]
    sheet: NotRequired[str]
    compute_dtype: NotRequired[Literal["bf16", "fp32"]]
    threads: NotRequired[AtLeastOne]
    memory_bytes: NotRequired[AtLeastOne]
    capabilities: NotRequired[list[str]]
    cache_bytes: NotRequired[Count]
    versions: NotRequired[Mapping[str, str]]
    date: NotRequired[str]
    provenance: NotRequired[Mapping[str, Any]]
    content_hash: NotRequired[str]


_AGAIN = "remove the file to measure again"


@dataclass
class LatencyTable:
    """Rows by (kernel, key), the latest one counts; on disk one JSON a line after a header line.

    fingerprint: of the target that was measured; path: None keeps the table in memory; header: what the file says of the device and
    of how it was measured (empty in a table that was never on disk).
    """

    fingerprint: str
    description: str
    path: Path | None = None
    rows: dict[tuple[str, KernelKey], Row] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    header: Mapping[str, Any] = field(default_factory=dict)  # of `Header`

    @classmethod
    def open(cls, folder: Path, target: Target) -> Self:
        """The table of a target: `folder/FINGERPRINT.jsonl`, created where it is missing; an absent target's is where it was found.

        A damaged line of a machine that is here is left out with a warning, for it is measured again. Raises TableError on a file that
        is damaged as a whole, another machine's, or of a newer schema.
        """
        path = target.table or folder / f"{target.fingerprint}.jsonl"
        if path.exists():
            table = cls._mended(path) if target.present and path.suffix != ".parquet" else cls.read(path)
            if table.fingerprint != target.fingerprint:
                raise TableError(
                    f"{path}: measured on another machine ({table.description}), not on {target.description}; remove the file"
                )
            return table
        if not target.present:
            raise TableError(f"{path}: no stored table for {target.name}; measure there and copy it to this path")
        header = header_of(target)
        write_text(path, json.dumps(header, sort_keys=True) + "\n")
        return cls(target.fingerprint, target.description, path, header=header)

    @classmethod
    def read(cls, path: Path) -> Self:
        """A table from a file of either kind: one JSON a line, or Parquet, which is read only."""
        if path.suffix == ".parquet":
            from profilers import stored

            header, records = stored.read(path)
            table = cls(header["fingerprint"], header["description"], header=header)
            for number, record in enumerate(records, 1):
                table._take(path, number, record)
            return table
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """A table from its lines. A last line that was cut short is left out: it was being written when the run ended."""
        table, damaged = cls._sound(path)
        if damaged:
            raise next(iter(damaged.values()))
        return table

    @classmethod
    def _mended(cls, path: Path) -> Self:
        """A table without its damaged lines, as long as most lines are sound; they are cut out of the file unless someone is writing it."""
        table, damaged = cls._sound(path)
        if not damaged:
            return table
        if len(damaged) > len(table.rows) + len(table.checks):
            raise next(iter(damaged.values()))
        for error in damaged.values():
            _LOG.warning("%s; the line is left out, and what it held is measured again", str(error).rpartition(";")[0])
        with contextlib.suppress(OSError), (path.parent / "timing.lock").open("a+") as lock:
            if try_lock(lock.fileno()):
                _, lines = _lines(path)
                bad = set(cls._sound(path)[1])
                write_bytes(path, b"".join(line + b"\n" for number, line in enumerate(lines, 1) if number not in bad))
        return table

    @classmethod
    def _sound(cls, path: Path) -> tuple[Self, dict[int, InputError]]:
        """A table of a file's sound lines, and by number what is wrong with the others."""
        header, lines = _lines(path)
        table = cls(header["fingerprint"], header["description"], path, header=header)
        damaged = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                table._take(path, number, _parse(path, number, line))
            except InputError as error:
                damaged[number] = error
        return table, damaged

    @property
    def folder(self) -> Path:
        """Where its file lies, and whoever measures for it holds the timing lock; for a table in memory, the tables of the cache."""
        return kernel_folder().parent / "tables" if self.path is None else self.path.parent

    def refresh(self) -> None:
        """Takes over the rows that other runs have measured since; a table in memory has no others."""
        if self.path is not None:
            self.rows.update(self._sound(self.path)[0].rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Keeps rows and writes them through to the disk; the caller holds the lock of the table's folder where others may add too."""
        rows = list(rows)
        for row in rows:
            self._keep(row)
        if self.path is not None:
            _append(self.path, [asdict(row) for row in rows])

    def add_checks(self, checks: Iterable[Check]) -> None:
        """Keeps checks and writes them through to the disk."""
        checks = list(checks)
        self.checks += checks
        if self.path is not None:
            _append(self.path, [{"check": asdict(check)} for check in checks])

    def describe(self, provenance: Mapping[str, Any]) -> None:
        """Keeps how the table came about, and writes it through to the disk; what is told last counts."""
        self.header = {**self.header, "provenance": {**self.header.get("provenance", {}), **provenance}}
        if self.path is not None:
            _append(self.path, [{"provenance": provenance}])

    def records(self) -> list[dict[str, Any]]:
        """Every row and check as plain values, in an order that depends on nothing but them."""
        rows = [asdict(row) for _, row in sorted(self.rows.items(), key=lambda item: (item[0][1], item[0][0]))]
        return [*rows, *({"check": asdict(check)} for check in self.checks)]

    def has(self, key: KernelKey) -> bool:
        """Whether any kernel ran at a key."""
        return any(row.status == "ok" for row in self._at(key))

    def missing(self, keys: Iterable[KernelKey]) -> list[KernelKey]:
        """The keys at which a kernel or operator of this program has no row, or one of other code."""
        device = self.header.get("device", "cpu")
        return [
            key
            for key in dict.fromkeys(keys)
            if any(self.lacks(entry.name, entry.source_hash, key) for entry in contenders(key.op, device))
        ]

    def lacks(self, kernel: str, source_hash: str, key: KernelKey) -> bool:
        """Whether a kernel has no row at a key, or one of other code."""
        row = self.rows.get((kernel, key))
        return row is None or row.source != source_hash

    def timings(self, key: KernelKey) -> dict[str, Timing]:
        """The timing of every kernel that ran at a key, fastest first."""
        found = {row.kernel: row.timing for row in self._at(key) if row.status == "ok" and row.timing is not None}
        return dict(sorted(found.items(), key=lambda item: item[1].median_ms))

    def best(self, key: KernelKey) -> tuple[str, Timing]:
        """The fastest kernel of a key and its timing; raises MissingCell with what is known."""
        timings = self.timings(key)
        if not timings:
            reasons = self.reasons(key)
            known = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items()) or "not measured"
            raise MissingCell(f"no latency of {key.format} at m={key.m}, n={key.n}, k={key.k} on {self.description} ({known})")
        return next(iter(timings.items()))

    def reasons(self, key: KernelKey) -> dict[str, str]:
        """Why kernels have no timing at a key."""
        return {row.kernel: row.reason for row in self._at(key) if row.status != "ok"}

    def keys(self) -> Iterator[KernelKey]:
        """Every key that at least one kernel ran at."""
        yield from sorted({row.key for row in self.rows.values() if row.status == "ok"})

    def _at(self, key: KernelKey) -> list[Row]:
        return [row for (_, at), row in self.rows.items() if at == key]

    def _keep(self, row: Row) -> None:
        self.rows[row.kernel, row.key] = row

    def _take(self, path: Path, number: int, record: dict[str, Any]) -> None:
        line = f"{path}: line {number}"
        if "provenance" in record:
            told = read(dict[str, Any], record["provenance"], line, _AGAIN)
            self.header = {**self.header, "provenance": {**self.header.get("provenance", {}), **told}}
        elif "check" in record:
            self.checks.append(read(Check, record["check"], line, _AGAIN))
        else:
            self._keep(read(Row, record, line, _AGAIN))


def _lines(path: Path) -> tuple[Header, list[bytes]]:
    """The header of a table's file, checked, and all its lines but one that was cut short at the end."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TableError(f"{path}: cannot be read as a latency table ({error}); remove it to measure again") from error
    return check_header(path, _parse(path, 1, lines[0])), lines[:-1]


def header_of(target: Target) -> dict[str, Any]:
    """What a table's file says of its device, so that it can be known and used elsewhere."""
    import numpy
    import torch

    return {
        "schema": SCHEMA,
        "kind": KIND,
        "fingerprint": target.fingerprint,
        "description": target.description,
        "facts": dict(target.facts),
        "arch": target.arch,
        "device": target.device,
        "sheet": target.sheet,
        "compute_dtype": target.compute_dtype,
        "threads": target.threads,
        "memory_bytes": target.memory_bytes,
        "capabilities": sorted(target.capabilities),
        "cache_bytes": target.cache_bytes,
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_header(path: Path, header: Any) -> Header:
    """The header as it is, of its kinds; raises TableError or WrongValue, in one line, for one that this program cannot take."""
    if not isinstance(header, dict) or header.get("kind") != KIND or not isinstance(header.get("schema"), int):
        raise TableError(f"{path}: not a latency table; remove it to measure again")
    if header["schema"] > SCHEMA:
        raise TableError(
            f"{path}: schema {header['schema']} is newer than this program's {SCHEMA}; update it or remove the file"
        )
    return read(Header, header, f"{path}: header", _AGAIN)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    data = json_of(line, f"{path}: line {number}", _AGAIN)
    if not isinstance(data, dict):
        raise TableError(f"{path}: line {number} is not a row; remove the file to measure again")
    stored = data.pop("sha256", None)
    if stored not in (None, _digest(data)):  # lines of schema 1 carry none
        raise TableError(f"{path}: line {number} was changed: its checksum does not fit; remove the file to measure again")
    return data


def _line(record: Mapping[str, Any]) -> str:
    """A record as a line that carries its own checksum."""
    return json.dumps({**record, "sha256": _digest(record)}, sort_keys=True) + "\n"


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Whole lines or none; what a killed run left of its last line is cut off first. The caller keeps others from appending."""
    data = "".join(map(_line, records)).encode()
    with path.open("r+b") as file:
        end = _end_of_last_line(file)
        file.truncate(end)
        file.seek(end)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _end_of_last_line(file: BinaryIO) -> int:
    """Position after the last newline."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0
