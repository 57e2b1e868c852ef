"""Which code a call really ran: oneDNN's implementation, the CUDA kernels, or the instructions that the project's C++ was compiled for."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from _ctypes import CFuncPtr
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO

import torch
from torch import Tensor

from profilers.kernels.build import compiled_for
from profilers.target import Target
from profilers.timer import Call

_MOVES = ("reorder",)
"""oneDNN primitives that prepare for the one that computes."""


def implementation(work: Callable[..., object], inputs: tuple[Tensor, ...], target: Target) -> str:
    """What one call `work(*inputs)` ran, parts of several kinds joined by ` + `; "" where nothing tells.

    work: has run before, so that nothing is compiled or allocated for the first time; the call is not to be timed.
    """
    call = partial(work, *inputs)
    if target.device == "cuda":
        return ", ".join(cuda_kernels(call))
    return " + ".join(filter(None, (", ".join(onednn(call)), own_code(work))))


def refusal(name: str) -> str | None:
    """Why an implementation is none that a kernel may be timed as: oneDNN's reference, a plain loop for what it has nothing better for."""
    found = [part for part in name.replace(" + ", ", ").split(", ") if part.startswith("ref")]
    return f"oneDNN runs its reference implementation {found[0]}" if found else None


def onednn(call: Call) -> list[str]:
    """The implementations of the primitives of a call, such as `brg_matmul:avx512_core_bf16`, each once, data movement left out."""
    if os.name == "nt" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    verbose = torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryFile() as said:
        with _stdout_to(said), verbose:
            call()
        said.seek(0)
        return implementations(said.read().decode(errors="replace"))


def implementations(text: str) -> list[str]:
    """Those in what oneDNN prints, of any of its versions: `onednn_verbose,…,exec,cpu,matmul,brg_matmul:avx512_core_bf16,…`."""
    found = []
    for line in text.splitlines():
        fields = line.split(",")
        if not fields[0].endswith("_verbose") or "exec" not in fields:
            continue
        kind, name = fields[fields.index("exec") + 2 :][:2]
        if kind not in _MOVES:
            found.append(name or kind)
    return list(dict.fromkeys(found))


def own_code(work: object) -> str:
    """`C++ for …`, where an object or a part of it holds a compiled function: there is no library but the project's."""
    held = [value for part in [work, *_attributes(work)] for value in _attributes(part)]
    return f"C++ for {compiled_for()}" if any(isinstance(value, CFuncPtr) for value in held) else ""


def _attributes(part: object) -> list[object]:
    """What an object of Python code holds, in its dictionary or in slots."""
    slots = [name for kind in type(part).__mro__ for name in kind.__dict__.get("__slots__", ())]
    return [*getattr(part, "__dict__", {}).values(), *(getattr(part, name, None) for name in slots)]


def cuda_kernels(call: Call) -> list[str]:
    """The names of the kernels that a call launches on torch's current CUDA device, each once, in their order."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = profiled.events() or []
    names = [event.name for event in events if event.device_type is DeviceType.CUDA]
    return list(dict.fromkeys(name for name in names if not name.startswith(("Memcpy", "Memset"))))


@contextmanager
def _stdout_to(file: IO[bytes]) -> Iterator[None]:
    """What C code of this process writes to its standard output goes into a file inside: oneDNN knows no other way to tell."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        os.dup2(file.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
