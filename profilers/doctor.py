"""What stands in the way of fast kernels and quiet timings on this machine."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from methods.locks import try_lock
from profilers import clocks
from profilers.kernels.build import MISSING, NoCompiler, compiled_for, compiler, kernel_folder
from profilers.pace import SLOW, pace_of
from profilers.sweep import load_average, torch_threads
from profilers.target import Target, local_cpu, local_cuda, physical_cores
from profilers.timer import quantile

QUIET_LOAD = 0.5
_LOOK_S = 0.5
_SLOW_SHARE = 0.1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `ok` is False where it costs speed or trust in timings, and `detail` says what to do."""

    name: str
    ok: bool
    detail: str


def doctor(cache: Path, threads: int | None = None) -> list[Finding]:
    """Everything worth knowing before a measurement; cache: where tables and kernels are kept. Compiles the kernels."""
    target = local_cpu(threads)
    cores = physical_cores()
    return [
        Finding("target", True, f"{target.description}; activations in {target.compute_dtype}"),
        *_kernels(),
        Finding("instructions", bool(target.capabilities), ", ".join(sorted(target.capabilities)) or "none that kernels use"),
        Finding("threads", target.threads <= cores, f"{target.threads} on {cores} physical cores"),
        _load(cores),
        *_governor(),
        *_quota(target.threads),
        *_clock(target),
        _pace(target),
        *_cuda(),
        Finding("memory", target.memory_bytes >= 4 << 30, f"{target.memory_bytes / 2**30:.0f} GiB physical"),
        _writable("cache folder", cache),
        _writable("kernel folder", kernel_folder()),
        _lock(cache / "tables"),
    ]


def disturbances(target: Target, cache: Path) -> list[Finding]:
    """What would disturb timings on a CPU that is here, now: other work, a slow core, another run that times. Half a second."""
    if not target.present or target.device != "cpu":
        return []
    looked = (_load(physical_cores()), _pace(target), _lock(cache / "tables"))
    return [finding for finding in looked if not finding.ok]


def _load(cores: int) -> Finding:
    load = load_average()
    quiet = load <= QUIET_LOAD * cores
    detail = f"{load:.1f} processes ran or waited on average over the last minute, on {cores} physical core{'s' if cores > 1 else ''}"
    return Finding("load", quiet, detail if quiet else f"{detail}; stop what else runs for trustworthy timings")


def _kernels() -> Iterator[Finding]:
    path = compiler()
    yield Finding("compiler", path is not None, path or MISSING)
    if path is not None:
        try:
            yield Finding("kernels", True, f"compiled for {compiled_for()}")
        except NoCompiler as error:
            yield Finding("kernels", False, str(error))


def _clock(target: Target) -> Iterator[Finding]:
    mhz = clocks.read(target).mhz
    if not math.isnan(mhz):  # some virtual machines do not tell
        yield Finding("clock", True, f"{mhz:.0f} MHz now; recorded with every sweep")


def _pace(target: Target) -> Finding:
    """Half a second of it."""
    readings = []
    with torch_threads(target.threads):
        pace, begin = pace_of(target), time.perf_counter()
        while time.perf_counter() - begin < _LOOK_S:
            readings.append(pace.now())
    slow = sum(reading > SLOW for reading in readings) / len(readings)
    now = quantile(sorted(readings), 0.5)
    detail = f"fixed work takes {now:.2f} times its best time here, over {SLOW:g} times during {slow:.0%} of {_LOOK_S:g} s"
    advice = "; something shares the cores or holds their clock back, timings wait for better moments and take longer"
    if slow == 1:
        advice += " (if it never was faster than now: `search cache --clear pace`)"
    return Finding("pace", slow <= _SLOW_SHARE, detail + (advice if slow > _SLOW_SHARE else ""))


def _cuda() -> Iterator[Finding]:
    gpu = local_cuda()
    if gpu is None:
        yield Finding(
            "cuda", True, "torch finds no CUDA device; names of GPUs stand for tables or datasheets (`search targets`)"
        )
        return
    now = clocks.read(gpu)
    held = "; its clock is held back by heat or power, timings would be of that" if now.held_back else ""
    yield Finding("cuda", not now.held_back, f"{gpu.description}{held}")
    triton = importlib.util.find_spec("triton") is not None
    yield Finding(
        "triton", triton, "installed" if triton else "none; install it, or the project's own GPU kernels cannot be measured"
    )


def _governor() -> Iterator[Finding]:
    try:
        name = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return  # virtual machines do not show it
    yield Finding("frequency governor", name == "performance", f"{name}; `performance` gives steadier timings")


def _quota(threads: int) -> Iterator[Finding]:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return
    if quota != "max":
        cpus = int(quota) / int(period)
        yield Finding("container quota", cpus >= threads, f"{cpus:g} CPUs for {threads} threads")


def _writable(name: str, folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(name, True, str(folder))
    except OSError as error:
        return Finding(name, False, f"{folder} cannot be written ({error.strerror}); choose another with --cache")


def _lock(folder: Path) -> Finding:
    path = folder / "timing.lock"
    if not path.exists():
        return Finding("timing lock", True, "free")
    with path.open("a+") as file:
        free = try_lock(file.fileno())
    return Finding("timing lock", free, "free" if free else f"another run is timing (holds {path}); timings wait for it")
