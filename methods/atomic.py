"""Writing that leaves either the whole file or folder, or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from methods.locks import try_lock

_PART = ".part"
"""Ends the name, which starts with a dot, of what is not finished; whoever makes it holds its lock."""

SEAL = "checksums.json"
"""The SHA-256 of every other file of a folder, by its path in it; folders of earlier versions have none."""

_DAMAGED = ".damaged-"
"""Begins the name of what was moved aside."""

Made = TypeVar("Made")


def _beside(path: Path, make: Callable[[Path], Made]) -> tuple[Path, Made]:
    """What `make` makes under a hidden name beside `path` that nobody has yet, with the modes that the umask leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
        try:
            return part, make(part)
        except FileExistsError:
            continue


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` with `data` in one step; a reader sees the old or the new file, never a part.

    Raises OSError that names `path`, where the disk is full for example; the old file is left then.
    """
    part, file = _beside(path, lambda part: part.open("xb"))
    try:
        with file:
            try_lock(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to make it in; gone when the block ends, unless it was renamed."""
    staging, _ = _beside(path, Path.mkdir)
    handle = os.open(staging, os.O_RDONLY)
    try:
        try_lock(handle)
        yield staging
    finally:
        os.close(handle)
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends and disappears if it raises: whatever is to be checked of it is
    checked inside.

    Raises FileExistsError where `folder` holds something already: nothing is overwritten; OSError that names `folder` where a library
    could not write into it, whatever that library raised.
    """
    check_free(folder)
    with staging_folder(folder) as staging:
        try:
            yield staging
        except BaseException as error:
            number = re.search(r"\(os error (\d+)\)", str(error))  # so say libraries in Rust: safetensors, tokenizers
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        _share(staging)
        staging.replace(folder)


def check_free(folder: Path) -> None:
    """Raises FileExistsError where there is something that a new folder would overwrite; an empty folder is nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or choose another folder")


def _share(folder: Path) -> None:
    """Lets everyone read the files below who may read the folder: some libraries write theirs for their own account alone."""
    mode = folder.stat().st_mode
    for path in folder.rglob("*"):
        own = path.stat().st_mode
        path.chmod(own | mode & (0o777 if path.is_dir() else 0o666))


def seal(folder: Path) -> None:
    """Writes the checksums of all files of a folder into it, as the last thing that is done to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_text(folder / SEAL, json.dumps(sums, indent=1) + "\n")


def broken_seal(folder: Path) -> str:
    """Which file of a folder is not what was sealed, "" where none is or nothing was sealed; files that were added do not matter."""
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except ValueError as error:
        return f"{SEAL} is damaged ({error})"
    if not isinstance(sums, dict):
        return f"{SEAL} is damaged: no JSON object"
    missing = next((name for name in sums if not (folder / name).is_file()), "")
    if missing:
        return f"{missing} is missing"
    changed = next((name for name, digest in sums.items() if sha256(folder / name) != digest), "")
    return f"{changed} was changed after it was written" if changed else ""


def set_aside(path: Path) -> Path:
    """Renames what is damaged to a hidden name beside it, `.damaged-NAME`, with a number where that is taken; returns the new path."""
    names = (f"{_DAMAGED}{path.name}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    aside = next(place for name in names if not (place := path.with_name(name)).exists())
    path.rename(aside)
    return aside


def remove_abandoned(folder: Path) -> int:
    """Deletes what processes that were killed left unfinished in a folder and below; returns how many. What is being written stays."""
    removed = 0
    for path in sorted(folder.rglob(f".*{_PART}")):
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # finished or removed in the meantime, or in a folder that was
        try:
            if not try_lock(handle):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed += 1
        finally:
            os.close(handle)
    return removed


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
