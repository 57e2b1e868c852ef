"""What a target's name stands for: the device that is here, a stored table, a sister's table, or a datasheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from methods.errors import InputError
from methods.typed import json_of
from profilers.datasheets import DATASHEETS, DEVICE_TABLES, Datasheet
from profilers.table import Header, check_header
from profilers.target import Target, TargetError, cuda_capabilities, digest_of, local_cpu, local_cuda

_SUFFIXES = (".parquet", ".jsonl")

State = Literal["here", "stored table", "sister's table", "datasheet", "not here"]


@dataclass(frozen=True)
class Resolution:
    """What a name resolves to on this machine, and why; target is None where it is `not here`."""

    name: str
    state: State
    why: str
    target: Target | None


def resolve(
    name: str, folders: Sequence[Path] = (DEVICE_TABLES,), threads: int | None = None, *, allow_modelled: bool = False
) -> Target:
    """The target of a name: the local device if it is that one; else its table in `folders`, the first that has one; else a sister's.

    `cpu` and `cuda` are what is here. allow_modelled: a datasheet will do where there is no table. Raises TargetError in one line.
    """
    found = look_up(name, folders, threads)
    if found.target is None:
        raise TargetError(f"target {name!r}: {found.why}")
    if found.state == "datasheet" and not allow_modelled:
        folder = folders[0] if folders else DEVICE_TABLES
        raise TargetError(
            f"target {name!r} is not this machine and has no stored table; measure there (`search profile --target {name} --out "
            f"{name}.parquet`) and put the file into {folder} or --devices, or take datasheet numbers with --allow-modelled, "
            f"or search for --target cpu"
        )
    return found.target


def look_up(name: str, folders: Sequence[Path] = (DEVICE_TABLES,), threads: int | None = None) -> Resolution:
    """What a name resolves to; raises InputError where its table cannot be read."""
    if name == "cpu":
        return Resolution(name, "here", "the CPU of this machine", local_cpu(threads))
    gpu = local_cuda()
    if gpu is not None and name in ("cuda", gpu.name):
        return Resolution(name, "here", "the CUDA device of this machine", replace(gpu, name=name))
    if name == "cuda":
        return Resolution(name, "not here", "torch finds no CUDA device on this machine", None)
    path = stored_path(name, folders)
    if path is not None:
        target = _stored(name, path)
        local = _local_twin(target)
        if local is not None:
            return Resolution(name, "here", f"this machine, by the fingerprint of {path}", local)
        return Resolution(name, "stored table", str(path), _with_sister(target, folders))
    sheet = DATASHEETS.get(name)
    if sheet is None:
        known = ", ".join(("cpu", "cuda", *DATASHEETS))
        return Resolution(
            name, "not here", f"not known here; known targets: {known}, and whatever has a table in --devices", None
        )
    return _from_sister(sheet, folders) or Resolution(name, "datasheet", sheet.source, _from_sheet(sheet))


def listing(folders: Sequence[Path] = (DEVICE_TABLES,), threads: int | None = None) -> list[Resolution]:
    """Every name there is, and what it resolves to here; a table that cannot be read is `not here`, and why."""
    stored = {path.stem for folder in folders if folder.is_dir() for path in folder.iterdir() if path.suffix in _SUFFIXES}
    found = []
    for name in dict.fromkeys(("cpu", "cuda", *DATASHEETS, *sorted(stored))):
        try:
            found.append(look_up(name, folders, threads))
        except InputError as error:
            found.append(Resolution(name, "not here", str(error), None))
    return found


def stored_path(name: str, folders: Sequence[Path]) -> Path | None:
    """Where a table that was measured elsewhere lies, or None."""
    paths = (folder / f"{name}{suffix}" for folder in folders for suffix in _SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _local_twin(stored: Target) -> Target | None:
    """This machine, where a stored table is of it: same fingerprint with the table's threads."""
    try:
        here = local_cpu(stored.threads) if stored.device == "cpu" else local_cuda()
    except TargetError:
        return None
    return replace(here, name=stored.name) if here is not None and here.fingerprint == stored.fingerprint else None


def _from_sister(sheet: Datasheet, folders: Sequence[Path]) -> Resolution | None:
    """The table of a device of the same compute capability, to be rescaled by the two datasheets."""
    target = _with_sister(_from_sheet(sheet), folders)
    if target.sister_table is None:
        return None
    of_sister = _stored(target.sister, target.sister_table)
    target = replace(
        target,
        label="transferred",
        fingerprint=digest_of(["transferred", sheet.name, of_sister.fingerprint]),
        description=f"{sheet.title}, transferred from {of_sister.description}",
    )
    return Resolution(sheet.name, "sister's table", f"{target.sister_table}, rescaled by datasheet ratios", target)


def _with_sister(target: Target, folders: Sequence[Path]) -> Target:
    """The target with a device of its compute capability that has a table, where there is one."""
    sheet = DATASHEETS.get(target.sheet)
    for other in DATASHEETS.values() if sheet is not None else ():
        path = stored_path(other.name, folders)
        if path is not None and other.name != target.sheet and sheet is not None and other.capability == sheet.capability:
            return replace(target, sister=other.name, sister_table=path)
    return target


def _from_sheet(sheet: Datasheet) -> Target:
    return Target(
        name=sheet.name,
        arch="sm" + "".join(map(str, sheet.capability)),
        present=False,
        compute_dtype="bf16",
        threads=1,
        memory_bytes=int(sheet.memory * 2**30),
        capabilities=cuda_capabilities(sheet.capability),
        fingerprint=digest_of(["modelled", sheet.name, sheet.bandwidth, dict(sheet.peak)]),
        description=f"{sheet.title}, modelled from its datasheet ({sheet.bandwidth:g} GB/s, {sheet.peak['bf16']:g} TFLOP/s bf16)",
        cache_bytes=int(sheet.l2 * 2**20),
        device="cuda",
        sheet=sheet.name,
        label="modelled",
    )


def _stored(name: str, path: Path) -> Target:
    header = _header(path)
    missing = [fact for fact in ("arch", "compute_dtype", "threads", "memory_bytes", "capabilities") if fact not in header]
    if missing:
        raise TargetError(f"{path}: its header lacks {', '.join(missing)}, as in old tables; measure it again on {name}")
    return Target(
        name=name,
        arch=header["arch"],
        present=False,
        compute_dtype=header["compute_dtype"],
        threads=header["threads"],
        memory_bytes=header["memory_bytes"],
        capabilities=frozenset(header["capabilities"]),
        fingerprint=header["fingerprint"],
        description=header["description"],
        cache_bytes=header.get("cache_bytes", 32 << 20),
        table=path,
        device=header.get("device", "cpu"),
        sheet=header.get("sheet", ""),
    )


def _header(path: Path) -> Header:
    if path.suffix == ".parquet":
        from profilers import stored

        return stored.read(path)[0]
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not a latency table ({error}); measure it again") from error
    return check_header(path, json_of(line, path, "it is no latency table: measure it again"))
