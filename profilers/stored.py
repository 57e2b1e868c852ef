"""Latency tables as Parquet files: what is committed, carried to other machines and put together. The one file that needs pyarrow."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods.atomic import write_bytes
from methods.typed import json_of
from methods.typed import read as typed
from profilers.table import SCHEMA, Header, LatencyTable, TableError, check_header
from profilers.target import differences

_AGAIN = "remove it to measure again"
_METADATA = b"isolatency"
_COLUMNS = (
    "check", "kernel", "implementation", "op", "format", "m", "n", "k", "status", "label", "median_ms", "p10_ms", "p90_ms", "record",
)  # fmt: skip
"""Flat columns are for other programs' eyes; `record`, the row as JSON, is what is read back."""


def write(table: LatencyTable, path: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Writes a table in one step, with its header, how it was made and the hash of its rows.

    provenance: driver, clocks, command and the like. Raises TableError for a table whose header is not known.
    """
    pyarrow, parquet = _libraries()
    if not table.header:
        raise TableError(f"{path}: a table without a header cannot be stored; measure it with `search profile`")
    records = table.records()
    header = {
        **table.header,
        "schema": SCHEMA,
        "content_hash": content_hash(records),
        "provenance": {**table.header.get("provenance", {}), **(provenance or {})},
    }
    flat = [_flat(record) for record in records]
    columns = {name: [row.get(name) for row in flat] for name in _COLUMNS}
    data = pyarrow.table(columns).replace_schema_metadata({_METADATA: json.dumps(header, sort_keys=True).encode()})
    sink = io.BytesIO()
    parquet.write_table(data, sink, compression="zstd")
    write_bytes(path, sink.getvalue())


def read(path: Path) -> tuple[Header, list[dict[str, Any]]]:
    """Header and rows of a file; raises TableError or WrongValue, in one line, where it is corrupt, foreign, or of a newer schema."""
    pyarrow, parquet = _libraries()
    try:
        data = parquet.read_table(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{path}: cannot be read as a latency table ({reason}); {_AGAIN}") from error
    metadata = data.schema.metadata or {}
    if _METADATA not in metadata or "record" not in data.column_names:
        raise TableError(f"{path}: Parquet, but not a latency table; {_AGAIN}")
    header = check_header(path, json_of(metadata[_METADATA], f"{path}: header", _AGAIN))
    texts = typed(tuple[str, ...], data.column("record").to_pylist(), f"{path}: records", _AGAIN)
    kept = (json_of(text, f"{path}: row {number}", _AGAIN) for number, text in enumerate(texts, 1))
    records = [typed(dict[str, Any], record, f"{path}: row {number}", _AGAIN) for number, record in enumerate(kept, 1)]
    if header.get("content_hash") != content_hash(records):
        raise TableError(f"{path}: its rows are not those that its hash is of; measure it again or get another copy")
    return header, records


def content_hash(records: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the rows, in hex."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def merge(tables: Sequence[LatencyTable]) -> LatencyTable:
    """One table of several partial ones of the same device; where two have a cell, the later of `tables` counts.

    Raises TableError where their fingerprints differ: timings of two set-ups do not belong into one table.
    """
    first = tables[0]
    for other in tables[1:]:
        if other.fingerprint != first.fingerprint:
            one, two = (table.header.get("facts") or {} for table in (first, other))
            apart = "; ".join(differences(one, two, ("in the first", "in the second")))
            raise TableError(
                f"tables of two devices or set-ups cannot be merged: {first.description} ({first.fingerprint}) and "
                f"{other.description} ({other.fingerprint}){f'; they differ in {apart}' if apart else ''}"
            )
    merged = LatencyTable(first.fingerprint, first.description, header=tables[-1].header)
    for table in tables:
        merged.add(table.rows.values())
        merged.add_checks(check for check in table.checks if check not in merged.checks)
    return merged


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    source = record.get("check", record)
    timing = source.get("timing") or {}
    return {
        "check": source.get("kind") if "check" in record else None,
        **{name: source.get(name) for name in ("kernel", "implementation", "status")},
        **source["key"],
        **{name: timing.get(name) for name in ("label", "median_ms", "p10_ms", "p90_ms")},
        "record": json.dumps(record, sort_keys=True),
    }


def _libraries() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise TableError("Parquet tables need pyarrow; install it, or use the table's .jsonl file") from None
    return pyarrow, parquet
