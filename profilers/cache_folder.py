"""Where everything is kept on this machine that can be made again. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ISOLATENCY_CACHE`, else `$XDG_CACHE_HOME/isolatency`, else `~/.cache/isolatency`; an empty variable counts as unset.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification has it. Raises ValueError for an account without a
    home folder.
    """
    try:
        if own := os.environ.get("ISOLATENCY_CACHE"):
            return Path(own).expanduser()
        shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "isolatency"
    except RuntimeError:
        raise ValueError("this account has no home folder; set ISOLATENCY_CACHE to a folder where things can be kept") from None
