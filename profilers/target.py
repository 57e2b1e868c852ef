"""Targets: the machine that is here, and machines that a stored table knows."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

KNOWN = ("a100", "h100", "h200", "l4", "l40s", "a10g", "rtx3090", "rtx4090", "orin", "gb10")
"""Machines that a stored table may describe; `cpu` is the machine the program runs on."""

DEVICE_TABLES = Path("results/devices")
"""Where tables lie that were measured on other machines."""

_CPU_FLAGS = (
    "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "i8mm",
)  # fmt: skip
_NO_MATTER = ("OMP_NUM_THREADS", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
"""Threads are set explicitly; the others are what libraries set when they are imported, and change no timing."""

_ENVIRONMENT = ("OMP_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "MKL_", "ATEN_CPU_CAPABILITY")


class TargetError(ValueError):
    """A target that is not known, or that is absent and has no stored table."""


@dataclass(frozen=True)
class Target:
    """A machine that latencies belong to.

    present: kernels can be timed here and now; compute_dtype: dtype of activations between kernels (`bf16`, `fp32`);
    capabilities: instruction sets; fingerprint: 16 hex digits of everything a timing depends on but the kernels' sources;
    cache_bytes: the last-level cache; table: the stored table of a machine that is not here.
    """

    name: str
    arch: str
    present: bool
    compute_dtype: Literal["bf16", "fp32"]
    threads: int
    memory_bytes: int
    capabilities: frozenset[str]
    fingerprint: str
    description: str
    cache_bytes: int = 32 << 20
    table: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype` as torch names it."""
        return torch.bfloat16 if self.compute_dtype == "bf16" else torch.float32


def local_cpu(threads: int | None = None) -> Target:
    """This machine's CPU. `threads` defaults to half of the physical cores: the rest of the machine keeps the other half."""
    model, flags = _cpu_model()
    cores = physical_cores()
    if threads is not None and threads < 1:
        raise TargetError(f"target cpu: threads={threads}; use 1 to {cores}")
    n_threads = threads or max(1, cores // 2)
    capabilities = frozenset(flag for flag in _CPU_FLAGS if flag in flags)
    caches = dict(_caches())
    facts = {
        "model": model,
        "flags": sorted(flags),
        "caches": caches,
        "cores": cores,
        "threads": n_threads,
        "torch": torch.__version__,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT) and k not in _NO_MATTER},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Target(
        name="cpu",
        arch=platform.machine(),
        present=True,
        compute_dtype="bf16" if capabilities & {"avx512_bf16", "amx_bf16"} else "fp32",
        threads=n_threads,
        memory_bytes=memory_bytes(),
        capabilities=capabilities,
        fingerprint=digest,
        description=f"{model}, {cores} cores, {n_threads} thread{'s' if n_threads > 1 else ''}, torch {torch.__version__}",
        cache_bytes=max((size for level, size in caches.items() if level != "L1"), default=32 << 20),
    )


def resolve(name: str, tables: Path = DEVICE_TABLES, threads: int | None = None) -> Target:
    """The target of a name: `cpu` is measured here; a known machine needs `tables/NAME.jsonl`, brought from there.

    Raises TargetError in one line otherwise.
    """
    if name == "cpu":
        return local_cpu(threads)
    if name not in KNOWN:
        raise TargetError(f"unknown target {name!r}; known targets: cpu, {', '.join(KNOWN)}")
    stored = stored_path(name, tables)
    if not stored.exists():
        raise TargetError(
            f"target {name!r} is not this machine and there is no stored table {stored}; measure there with "
            f"`search profile`, copy the table to that path, or use --target cpu"
        )
    return _stored(name, stored)


def targets(tables: Path = DEVICE_TABLES) -> list[Target]:
    """The local CPU and every known machine with a stored table."""
    return [local_cpu(), *(_stored(name, stored_path(name, tables)) for name in KNOWN if stored_path(name, tables).exists())]


def stored_path(name: str, tables: Path) -> Path:
    """Where a table that was measured elsewhere lies."""
    return tables / f"{name}.jsonl"


def _stored(name: str, path: Path) -> Target:
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
        return Target(
            name=name,
            arch=str(header["arch"]),
            present=False,
            compute_dtype=header["compute_dtype"],
            threads=int(header["threads"]),
            memory_bytes=int(header["memory_bytes"]),
            capabilities=frozenset(header["capabilities"]),
            fingerprint=str(header["fingerprint"]),
            description=str(header["description"]),
            table=path,
        )
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not a latency table ({error!r}); measure it again on {name}") from error


def physical_cores() -> int:
    """Physical cores this process may use (affinity counted); logical ones where the system does not tell."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            return len(allowed)
    return len(cores)


def memory_bytes() -> int:
    """Physical memory, or 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 << 30


def _cpu_model() -> tuple[str, frozenset[str]]:
    info: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            info[key.strip()] = value.strip()
    flags = info.get("flags", info.get("Features", "")).split()
    return info.get("model name", platform.processor() or platform.machine()), frozenset(flags)


def _caches() -> Iterator[tuple[str, int]]:
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in sorted(folder.glob("index*")):
        with suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                size = (index / "size").read_text().strip()
                factor = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
                yield f"L{(index / 'level').read_text().strip()}", int(size.rstrip("KM")) * factor
