"""The clocks that a device runs at, and whether it holds them back."""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

from profilers.target import Target

_QUERY = "clocks.sm,clocks.mem,power.draw,clocks_throttle_reasons.active"
_IDLE = 0x1
"""The one reason for low clocks that a measurement ends: nothing is running."""

MOVED = 0.03
"""Relative change of the clock during a block of timings from which they are not of one state."""


@dataclass(frozen=True)
class Clocks:
    """mhz, memory_mhz: nan where the device does not tell; held_back: by heat or power, on GPUs."""

    mhz: float = math.nan
    memory_mhz: float = math.nan
    power_w: float = math.nan
    held_back: bool = False

    def steady(self, after: Clocks) -> bool:
        """Whether a block between these two readings ran in one state; what is not told is taken for steady."""
        moved = abs(after.mhz - self.mhz) / self.mhz if self.mhz > 0 else 0.0
        return not (self.held_back or after.held_back or moved > MOVED)


def read(target: Target) -> Clocks:
    """The clocks of a device that is here, now: of a GPU by `nvidia-smi`, of a CPU by the kernel."""
    return _gpu() if target.device == "cuda" else _cpu()


def driver() -> str:
    """The NVIDIA driver's version; empty where there is none."""
    return _smi("driver_version").strip()


def _gpu() -> Clocks:
    parts = [part.strip() for part in _smi(_QUERY).split(",")]
    if len(parts) != 4:
        return Clocks()
    numbers = [float(part) if part.replace(".", "", 1).isdigit() else math.nan for part in parts[:3]]
    reasons = int(parts[3], 16) if parts[3].startswith("0x") else 0
    return Clocks(numbers[0], numbers[1], numbers[2], bool(reasons & ~_IDLE))


def _smi(query: str) -> str:
    """The first line that nvidia-smi says of the first visible device; empty where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return lines[0] if lines else ""


def _cpu() -> Clocks:
    """The mean over the processors; some virtual machines show only a nominal value, others none."""
    found = []
    for path in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")):
        text = path.read_text().strip()
        found += [int(text) / 1e3] if text.isdigit() else []
    if not found and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return Clocks(sum(found) / len(found)) if found else Clocks()
