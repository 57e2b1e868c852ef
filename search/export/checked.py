"""Exports that load as what was evaluated: written and read back beside their place, and put there only if they do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError

from methods import atomic
from methods.bank import DamagedEdit
from search.export.verification import Verification, not_loaded
from search.memory import out_of_memory

Verify: TypeAlias = Callable[[Path], Verification]
"""Loads a folder and compares it with what was evaluated."""

_LOADING = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OSError, SafetensorError)
"""What runtimes raise for a folder that they cannot load."""


def export(folder: Path, write: Callable[[Path], None], verify: Verify) -> Verification:
    """What loading showed of the folder that `write` made; `folder` appears with its checksums, or not at all.

    Raises ValueError where what is loaded back is not what was evaluated, FileExistsError where `folder` holds something, and what
    `write` raises for something that the format cannot express.
    """
    atomic.check_free(folder)
    with atomic.staging_folder(folder) as staging:
        made = staging / folder.name
        write(made)
        check = loaded_back(made, verify)
        if not check.ok:
            message = check.message.replace(str(made), str(folder))
            raise ValueError(f"export {folder}: what is loaded back is not what was evaluated: {message}")
        atomic.seal(made)
        made.replace(folder)
    return check


def standing(folder: Path, verify: Verify) -> Verification:
    """What a folder that is there already is worth: its checksums first, then what loading it shows."""
    problem = atomic.broken_seal(folder)
    return not_loaded(0, problem, "") if problem else loaded_back(folder, verify)


def loaded_back(folder: Path, verify: Verify) -> Verification:
    """`verify` of a folder, where a runtime that cannot load it is an outcome too: not ok, and why."""
    try:
        return verify(folder)
    except DamagedEdit:
        raise  # of what the folder is compared with
    except _LOADING as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or out_of_memory(error):
            raise
        text = " ".join(str(error).split()) or "no message"
        return not_loaded(0, f"it does not load ({type(error).__name__}: {text})", "")
