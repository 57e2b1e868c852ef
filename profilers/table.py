"""The latency table of a machine: an append-only file of what every kernel took at every shape. It raises rather than guesses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from profilers.kernels.catalogue import KERNELS
from profilers.target import Target
from profilers.timer import Timing

SCHEMA = 1


class TableError(ValueError):
    """A file that is not a latency table, or not one of this machine."""


class MissingCell(KeyError):
    """Nothing was measured for a key."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, order=True)
class KernelKey:
    """What is timed: x (m, k) times a weight (n, k) under a format."""

    op: str
    format: str
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Row:
    """One kernel at one key. `source`: hash of the kernel's code; reason: why it was refused or failed; load: 1-minute load average.

    cpu_ms: CPU time a call of the calling thread; cold: the weight was not in a cache.
    """

    kernel: str
    key: KernelKey
    status: Literal["ok", "unsupported", "failed"]
    source: str
    reason: str = ""
    timing: Timing | None = None
    size_bytes: int = 0
    cpu_ms: float = 0.0
    load: float = 0.0
    cold: bool = True


@dataclass
class LatencyTable:
    """Rows by (kernel, key), the latest one counts; on disk one JSON a line after a header line.

    fingerprint: of the target that was measured; path: None keeps the table in memory.
    """

    fingerprint: str
    description: str
    path: Path | None = None
    rows: dict[tuple[str, KernelKey], Row] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, target: Target) -> Self:
        """The table of a target: `folder/FINGERPRINT.jsonl`, created where it is missing; an absent target's is where it was found.

        Raises TableError on a corrupt file, another machine's, or a newer schema.
        """
        path = target.table or folder / f"{target.fingerprint}.jsonl"
        if path.exists():
            table = cls.load(path)
            if table.fingerprint != target.fingerprint:
                raise TableError(
                    f"{path}: measured on another machine ({table.description}), not on {target.description}; remove the file"
                )
            return table
        if not target.present:
            raise TableError(f"{path}: no stored table for {target.name}; measure there and copy it to this path")
        folder.mkdir(parents=True, exist_ok=True)
        _append(path, [_header(target)])
        return cls(target.fingerprint, target.description, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """A table from its file. A last line that was cut short is dropped: it was being written when the run ended."""
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"{path}: cannot be read as a latency table ({error}); remove it to measure again") from error
        header = _parse(path, 1, lines[0])
        _check_header(path, header)
        table = cls(header["fingerprint"], header["description"], path)
        torn = lines[-1]
        for number, line in enumerate(lines[1:-1], 2):
            table._keep(_row(path, number, line))
        if torn:
            _rewrite(path, lines[:-1])
        return table

    def add(self, rows: Iterable[Row]) -> None:
        """Keeps rows and writes them through to the disk."""
        rows = list(rows)
        for row in rows:
            self._keep(row)
        if self.path is not None:
            _append(self.path, [asdict(row) for row in rows])

    def has(self, key: KernelKey) -> bool:
        """Whether any kernel ran at a key."""
        return any(row.status == "ok" for row in self._at(key))

    def missing(self, keys: Iterable[KernelKey]) -> list[KernelKey]:
        """The keys at which a kernel of this program has no row, or one of other code."""
        return [
            key for key in dict.fromkeys(keys) if any(self.lacks(kernel.name, kernel.source_hash, key) for kernel in KERNELS)
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


def _header(target: Target) -> dict[str, Any]:
    import numpy
    import torch

    return {
        "schema": SCHEMA,
        "kind": "isolatency latency table",
        "fingerprint": target.fingerprint,
        "description": target.description,
        "arch": target.arch,
        "compute_dtype": target.compute_dtype,
        "threads": target.threads,
        "memory_bytes": target.memory_bytes,
        "capabilities": sorted(target.capabilities),
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    if header.get("kind") != "isolatency latency table" or not isinstance(header.get("schema"), int):
        raise TableError(f"{path}: not a latency table; remove it to measure again")
    if header["schema"] > SCHEMA:
        raise TableError(
            f"{path}: schema {header['schema']} is newer than this program's {SCHEMA}; update it or remove the file"
        )
    if not {"fingerprint", "description"} <= set(header):
        raise TableError(f"{path}: the header lacks its fingerprint; remove it to measure again")


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise TableError(f"{path}: line {number} is not JSON ({error}); remove the file to measure again") from error
    if not isinstance(data, dict):
        raise TableError(f"{path}: line {number} is not a row; remove the file to measure again")
    return data


def _row(path: Path, number: int, line: str) -> Row:
    data = _parse(path, number, line)
    try:
        timing = Timing(**data.pop("timing")) if data.get("timing") else None
        return Row(key=KernelKey(**data.pop("key")), **{**data, "timing": timing})
    except (TypeError, KeyError) as error:
        raise TableError(f"{path}: line {number} is not a row ({error}); remove the file to measure again") from error


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def _rewrite(path: Path, lines: list[str]) -> None:
    """Drops a torn line, so that the next row starts on its own line; a table that may not be written is left as it is."""
    if not os.access(path, os.W_OK):
        return
    new = path.with_suffix(f".{os.getpid()}.tmp")
    new.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    new.replace(path)
