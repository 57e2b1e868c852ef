"""What a CUDA kernel asks of a machine, and where its tensors lie."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from typing import Literal

import torch

from profilers.target import Target

Device = Literal["cuda", "cpu"]
"""`cuda`, or `cpu` for tests: the same code through Triton's interpreter and torch's reference operators."""


def refuses_target(
    target: Target, device: Device, capability: str, package: str = "", least: tuple[int, int] = (0, 0)
) -> str | None:
    """Why a kernel cannot run on a target, or None.

    capability: of `Target.capabilities`; package: one that it imports, which has to be here where the target is, in version `least` or
    a newer one.
    """
    if target.device != device:
        return f"runs on {device}, not on {target.device}"
    if device == "cuda" and capability not in target.capabilities:
        return f"needs {capability}, which {target.name} ({target.arch}) has not"
    return _refuses_package(package, least) if package and target.present else None


@functools.cache
def version_of(package: str) -> str:
    """The version of an installed package, "" where there is none: part of the source of a kernel that calls it. Imports nothing of it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _refuses_package(package: str, least: tuple[int, int]) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"needs the package {package}, which is not installed: pip install {package}"
    here = version_of(package)
    major, minor, *_ = *(int(part) for part in here.split(".") if part.isdigit()), 0, 0
    if (major, minor) >= least:
        return None
    return f"needs {package} {least[0]}.{least[1]} or newer, not {here or 'one of no version'}: pip install -U {package}"


def failures() -> tuple[type[Exception], ...]:
    """What torch and, if it was loaded, Triton raise where they cannot compile or a tile does not fit into a device's memory."""
    triton = sys.modules.get("triton")
    return (RuntimeError,) if triton is None else (RuntimeError, triton.TritonError)


@functools.cache
def processors(device: Device) -> int:
    """Streaming multiprocessors of the current CUDA device; 1 on a CPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if device == "cuda" else 1
