"""How many threads this machine can run. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from methods.errors import InputError


class TargetError(InputError):
    """A target that is not known, that is absent and has no stored table, or that has not the threads it is asked for."""


def allowed_cpus() -> set[int]:
    """The CPUs that this process may use, hardware threads counted."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores this process may use (affinity counted); logical ones where the system does not tell."""
    allowed = allowed_cpus()
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            return len(allowed)
    return len(cores)


def check_threads(threads: int) -> None:
    """Raises TargetError for more threads than CPUs: they would take turns, and thousands of them stop the machine."""
    most = len(allowed_cpus())
    if not 1 <= threads <= most:
        raise TargetError(
            f"--threads {threads}: this machine has {most} CPUs for this process; use 1 to {most}, or 0 for half of its cores"
        )
