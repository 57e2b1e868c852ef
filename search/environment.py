"""What numbers depend on besides the configuration: versions, machine, threads, revision of the code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profilers.target import Target

_PACKAGES = ("isolatency", "torch", "transformers", "numpy", "scipy", "optuna", "lightgbm", "safetensors")


def environment(target: Target) -> dict[str, str]:
    """By name: versions, the operating system, the measured device with its threads, and the revision where the code lies in git."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    found |= {"system": platform.platform(), "device": target.description, "threads": str(target.threads)}
    revision = _revision(Path(__file__).resolve().parent.parent)
    return found | ({"revision": revision} if revision else {})


def version() -> str:
    """`isolatency 0.1.0`, with the revision where the code lies in git."""
    try:
        number = importlib.metadata.version("isolatency")
    except importlib.metadata.PackageNotFoundError:
        number = "not installed"
    revision = _revision(Path(__file__).resolve().parent.parent)
    return f"isolatency {number}{f' ({revision})' if revision else ''}"


def _revision(folder: Path) -> str:
    """`abcdef123456`, or `abcdef123456-dirty`; empty where there is no repository, or no git to ask."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def busy(target: Target, cache: Path) -> str:
    """A warning, before anything is timed, that the machine is not quiet, and why that is worth knowing; "" where it is."""
    from profilers.doctor import disturbances

    why = "; ".join(f"{finding.name}: {finding.detail}" for finding in disturbances(target, cache))
    return f"warning: this machine is busy, so that timings take longer and may not count as met: {why}" if why else ""
