"""What lies in the cache folder, whether it is whole, and getting rid of it. Everything in it can be made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from search.config import ConfigError

KINDS: Mapping[str, str] = {
    "models": "GGUF models, converted",
    "tables": "measured kernel times of this machine",
    "generated": "text that models wrote themselves",
    "kernels": "compiled kernels",
}
"""The folders of the cache and what they hold."""


@dataclass(frozen=True)
class Item:
    """One thing in the cache: a file, or a folder that is used as a whole. problem: why it is of no use, "" where it is sound."""

    kind: str
    name: str
    size_bytes: int
    problem: str = ""


def items(cache: Path, *, verify: bool = False) -> list[Item]:
    """Everything in the cache, by kind and name; with `verify` each is read whole and checked."""
    result = []
    for kind in KINDS:
        for path in _paths(cache, kind):
            problem = _CHECKS[kind](path) if verify else ""
            result.append(Item(kind, path.name, sum(file.stat().st_size for file in _files(path)), problem))
    return result


def clear(cache: Path, kind: str) -> int:
    """Deletes one kind, or `all`; returns the bytes that this freed. Other files in the folder are left alone.

    Raises ConfigError for an unknown kind, and where a run is timing on this machine right now: it appends to its table.
    """
    from profilers.timer import exclusive

    if kind not in (*KINDS, "all"):
        raise ConfigError(f"cache: no kind {kind!r}; there are {', '.join(KINDS)} and all")
    freed = 0
    for own in KINDS if kind == "all" else [kind]:
        paths = list(_paths(cache, own))
        if own == "tables" and paths:
            with exclusive(cache / "tables", _busy):
                freed += _delete(paths)
        else:
            freed += _delete(paths)
    return freed


def _busy(text: str) -> None:
    raise ConfigError(f"cache: {text.split('; ', maxsplit=1)[0]}; clear tables when it has ended")


def _delete(paths: Iterable[Path]) -> int:
    freed = 0
    for path in paths:
        freed += sum(file.stat().st_size for file in _files(path))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return freed


def _paths(cache: Path, kind: str) -> list[Path]:
    folder = cache / kind
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock" and not path.name.startswith("."))


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _model(path: Path) -> str:
    from methods.model.gguf import ORIGIN

    if not (path / ORIGIN).is_file():
        return f"it has no {ORIGIN}: it was never finished"
    return next((problem for file in path.glob("*.safetensors") if (problem := _tensors(file))), "")


def _tensors(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        return f"{path.name} is damaged ({error})"
    return ""


def _table(path: Path) -> str:
    from profilers.table import LatencyTable, TableError

    try:
        LatencyTable.load(path)
    except TableError as error:
        return str(error)
    return ""


def _compiled(path: Path) -> str:
    return "" if path.read_bytes()[:4] == b"\x7fELF" else "it is no shared library"


_CHECKS: Mapping[str, Callable[[Path], str]] = {
    "models": _model,
    "tables": _table,
    "generated": _tensors,
    "kernels": _compiled,
}
