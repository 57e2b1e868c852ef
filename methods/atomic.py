"""Writing that leaves either the whole file or folder, or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from methods.locks import try_lock

_PART = ".part"
"""Ends the name, which starts with a dot, of what is not finished; whoever makes it holds its lock."""


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` with `data` in one step; a reader sees the old or the new file, never a part.

    Raises OSError that names `path`, where the disk is full for example; the old file is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            try_lock(handle)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to make it in; gone when the block ends, unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
    handle = os.open(staging, os.O_RDONLY)
    try:
        try_lock(handle)
        yield staging
    finally:
        os.close(handle)
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends and disappears if it raises.

    Raises FileExistsError where `folder` holds something already: nothing is overwritten; OSError that names `folder` where a library
    could not write into it, whatever that library raised.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or choose another folder")
    with staging_folder(folder) as staging:
        try:
            yield staging
        except BaseException as error:
            number = re.search(r"\(os error (\d+)\)", str(error))  # so say libraries in Rust: safetensors, tokenizers
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        staging.chmod(0o755)
        staging.replace(folder)


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
