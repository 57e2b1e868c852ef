"""What is kept to save work, whether it is whole, and getting rid of it: the cache folder, and the banks of studies.

Everything here can be made again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from methods.errors import InputError
from search.config import ConfigError

KINDS: Mapping[str, str] = {
    "models": "GGUF models, converted",
    "tables": "measured kernel times of this machine",
    "pace": "the best pace of this machine's cores",
    "maps": "whole-model latency maps of this machine",
    "generated": "text that models wrote themselves",
    "rotations": "rotations that were learned",
    "materialized": "finished blocks of checkpoints that `search materialize` has not finished",
    "kernels": "compiled kernels",
}
"""The folders of the cache and what they hold."""

BANK = "bank"
"""The kind of what lies in studies: the compressed tensors of every choice."""


@dataclass(frozen=True)
class Item:
    """One thing that is kept: a file, or a folder that is used as a whole.

    problem: why it is of no use, "" where it is sound; held: a running study has it.
    """

    kind: str
    name: str
    size_bytes: int
    problem: str = ""
    held: bool = False


def items(cache: Path, *, verify: bool = False) -> list[Item]:
    """Everything in the cache, by kind and name; with `verify` each is read whole and checked."""
    result = []
    for kind in KINDS:
        for path in _paths(cache, kind):
            problem = _CHECKS[kind](path) if verify else ""
            result.append(Item(kind, path.name, _size([path]), problem))
    return result


def banks(results: Path, *, verify: bool = False) -> list[Item]:
    """The bank of every study in a folder; with `verify` every file of it is read and checked."""
    result = []
    for study in _studies(results):
        files = _bank_files(study)
        problems = (problem for file in files if (problem := _edit(file))) if verify else iter(())
        with _claimed(study) as free:
            result.append(Item(BANK, study.name, _size(files), next(problems, ""), held=not free))
    return result


def clear(cache: Path, kind: str) -> int:
    """Deletes one kind, or `all`; returns the bytes that this freed. Other files in the folder are left alone.

    Raises ConfigError for an unknown kind, and where a run is timing on this machine right now: it appends to its table.
    """
    from methods.atomic import remove_abandoned
    from profilers.timer import exclusive

    if kind not in (*KINDS, "all"):
        raise ConfigError(f"cache: no kind {kind!r}; there are {', '.join(KINDS)} and all, and --max-size for banks")
    freed = 0
    for own in KINDS if kind == "all" else [kind]:
        paths = list(_paths(cache, own))
        if own == "tables" and paths:
            with exclusive(cache / "tables", _busy):
                freed += _delete(paths)
        else:
            freed += _delete(paths)
        remove_abandoned(cache / own)
    return freed


def trim(results: Path, max_bytes: int) -> int:
    """Deletes from the banks of all studies what was not used for longest, until they take `max_bytes` at most; returns what this freed.

    The bank of a study that runs is left alone, though it counts. What a study misses it computes again when it needs it.
    """
    with ExitStack() as claims:
        files: list[Path] = []
        total = 0
        for study in _studies(results):
            own = _bank_files(study)
            total += _size(own)
            if claims.enter_context(_claimed(study)):
                files += own
        freed = 0
        for file in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            if total - freed <= max_bytes:
                break
            freed += _delete([file])
    return freed


@contextmanager
def _claimed(study: Path) -> Iterator[bool]:
    """Holds a study where nobody else does; whether it could."""
    from search.folder import Busy, held

    with ExitStack() as claim:
        try:
            claim.enter_context(held(study))
        except Busy:
            yield False
            return
        yield True


def _studies(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("*/config.toml") if (path.parent / BANK).is_dir())


def _bank_files(study: Path) -> list[Path]:
    return [path for path in sorted((study / BANK).rglob("*.safetensors")) if not path.name.startswith(".")]


def _busy(text: str) -> None:
    raise ConfigError(f"cache: {text.split('; ', maxsplit=1)[0]}; clear tables when it has ended")


def _delete(paths: Iterable[Path]) -> int:
    freed = 0
    for path in paths:
        freed += _size([path])
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
            path.with_suffix(".sha256").unlink(missing_ok=True)
    return freed


_BESIDE = (".lock", ".sha256")


def _paths(cache: Path, kind: str) -> list[Path]:
    folder = cache / kind
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix not in _BESIDE and not path.name.startswith("."))


def _size(paths: Iterable[Path]) -> int:
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())


def _model(path: Path) -> str:
    from methods.atomic import broken_seal
    from methods.model.gguf import ORIGIN

    if not (path / ORIGIN).is_file():
        return f"it has no {ORIGIN}: it was never finished"
    if problem := broken_seal(path):
        return f"it is damaged: {problem}"
    return next((problem for file in path.glob("*.safetensors") if (problem := _tensors(file))), "")


def _tensors(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    from methods.bank import tensors_digest

    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        return f"{path.name} is damaged ({error})"
    return "" if stored in (None, tensors_digest("", tensors)) else f"{path.name} is damaged: its checksum does not fit"


def _edit(path: Path) -> str:
    from methods.bank import read_edit

    try:
        read_edit(path)
    except ValueError as error:
        return str(error)
    return ""


def _table(path: Path) -> str:
    from profilers.table import LatencyTable

    try:
        LatencyTable.load(path)
    except InputError as error:
        return str(error)
    return ""


def _compiled(path: Path) -> str:
    from methods.atomic import sha256

    checksum = path.with_suffix(".sha256")
    if path.read_bytes()[:4] != b"\x7fELF":
        return "it is no shared library"
    sound = not checksum.exists() or checksum.read_text(errors="replace") == sha256(path)
    return "" if sound else "it is damaged: its checksum does not fit"


def _pace(path: Path) -> str:
    from profilers.pace import kept_in

    return "" if math.isfinite(kept_in(path)[0]) else "it does not say how fast the machine was; it is measured again"


def _map(path: Path) -> str:
    from search.files import Steps
    from search.maps import kept_fits

    whole = kept_fits(Steps(path.parent), path.stem, path.stem) is not None
    return "" if whole else "it is damaged; it is measured again"


_CHECKS: Mapping[str, Callable[[Path], str]] = {
    "models": _model,
    "tables": _table,
    "pace": _pace,
    "maps": _map,
    "generated": _tensors,
    "rotations": _tensors,
    "materialized": lambda folder: next(
        (problem for file in sorted(folder.rglob("*.safetensors")) if (problem := _edit(file))), ""
    ),
    "kernels": _compiled,
}
