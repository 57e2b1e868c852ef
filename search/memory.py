"""Memory of the process: recognising that it ran out, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's own error, or torch's, which on a CPU is a plain RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
    )


def give_back() -> None:
    """What is used no more goes back to the system: models, which refer to themselves, and what glibc keeps of freed memory.

    That is half a model after a conversion.
    """
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "malloc_trim") else None
