"""Where things are to lie: names and paths that no file system holds as they are, or that lead elsewhere. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from methods.errors import InputError

LOCK = "study.lock"
"""In a study's folder; held by its run, it says whose it is."""

_NEEDED = ("--model", "--target", "--results")
"""Flags whose empty value would mean the current folder, or nothing."""


def check_places(values: Mapping[str, object]) -> None:
    """Raises InputError for values, by flag, that no file system or TOML file holds as they are, and for names that lead elsewhere."""
    for flag, value in values.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                _check_text(flag, text)
            if flag == "--data" and not str(text).rpartition("=")[2].strip():
                raise InputError(f"--data {text!r}: names no text; give FILE, FOLDER or hf:NAME, or leave it out")
    for flag in _NEEDED:
        if not str(values[flag]).strip():
            raise InputError(f"{flag} is empty; give it a value, or leave it out for the default")
    study = str(values["--study"])
    if study != Path(study).name or study in (".", ".."):
        raise InputError(f"--study {study!r}: a name in the folder of --results, not a path; say where with --results")


def _check_text(flag: str, text: str) -> None:
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise InputError(f"{flag} {text!r}: holds a line break or another control character; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{flag} {text!r}: is no UTF-8; rename what it stands for") from None


def moved_study(path: Path, saved: Path) -> dict[str, str]:
    """Name and place of the study whose own configuration lies at `path`, where that is no more what it says; nothing for other files.

    saved: the study's folder by the configuration.
    """
    here = path.parent.resolve()
    if not (here / LOCK).exists() or saved.resolve() == here:
        return {}
    return {"study": here.name, "results": str(here.parent)}
