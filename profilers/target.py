"""Targets: machines that latencies belong to, and the devices that are here."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from profilers.cores import TargetError, check_threads, physical_cores
from profilers.datasheets import sheet_of
from profilers.label import Label

__all__ = ["Target", "TargetError", "differences", "digest_of", "local_cpu", "local_cuda", "memory_bytes", "physical_cores"]

_CPU_FLAGS = (
    "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "i8mm",
)  # fmt: skip
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_NO_MATTER = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
    *("OMP_DISPLAY_ENV", "OMP_DISPLAY_AFFINITY", "KMP_SETTINGS", "KMP_VERSION", "KMP_WARNINGS"),
)
"""Change neither arithmetic nor timing: threads are set explicitly, libraries set the next two when they are imported, and the last
only print when a process starts.
"""

_ENVIRONMENT = ("OMP_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "MKL_", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Target:
    """A machine that latencies belong to.

    present: kernels can be timed here and now; compute_dtype: dtype of activations between kernels (`bf16`, `fp32`);
    capabilities: instruction sets of a CPU, of a GPU `sm80`, `sm89` … (all up to its own) and `fp8`; fingerprint: 16 hex digits of
    everything a timing depends on but the kernels' sources; cache_bytes: the last-level cache; device: the kind of kernels it runs.
    sheet: its name in `profilers.datasheets.DATASHEETS`, "" where it has none there. Of a machine that is not here: table, where its
    stored table lies; sister, sister_table: a device of its generation with a table, from which what its own lacks is transferred;
    label: how trustworthy its latencies are at best. facts: of a machine that is here, what `fingerprint` is the digest of.
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
    device: Literal["cpu", "cuda"] = "cpu"
    sheet: str = ""
    sister: str = ""
    sister_table: Path | None = None
    label: Label = "measured"
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype` as torch names it."""
        return torch.bfloat16 if self.compute_dtype == "bf16" else torch.float32


def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU: not below AVX512-BW, nor where `ONEDNN_MAX_CPU_ISA` holds it below that."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def local_cpu(threads: int | None = None) -> Target:
    """This machine's CPU. `threads` defaults to half of the physical cores: the rest of the machine keeps the other half."""
    model, flags = _cpu_model()
    cores = physical_cores()
    if threads is not None:
        check_threads(threads)
    n_threads = threads or max(1, cores // 2)
    capabilities = frozenset(flag for flag in _CPU_FLAGS if flag in flags) - (set() if multiplies_bf16() else _BF16)
    caches = dict(_caches())
    facts = {
        "model": model,
        "flags": sorted(flags),
        "caches": caches,
        "cores": cores,
        "threads": n_threads,
        "torch": torch.__version__,
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if v and k.startswith(_ENVIRONMENT) and k not in _NO_MATTER
        },
    }
    return Target(
        name="cpu",
        arch=platform.machine(),
        present=True,
        compute_dtype="bf16" if capabilities & _BF16 else "fp32",
        threads=n_threads,
        memory_bytes=memory_bytes(),
        capabilities=capabilities,
        fingerprint=digest_of(facts),
        description=f"{model}, {_counted(cores, 'core')}, {_counted(n_threads, 'thread')}, torch {torch.__version__}",
        cache_bytes=max((size for level, size in caches.items() if level != "L1"), default=32 << 20),
        facts=facts,
    )


def _counted(n: int, name: str) -> str:
    return f"{n} {name}{'' if n == 1 else 's'}"


def local_cuda() -> Target | None:
    """The CUDA device at hand (torch's current one), or None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    major, minor = properties.major, properties.minor
    sheet = sheet_of(properties.name)
    facts = {
        "device": properties.name,
        "capability": [major, minor],
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "driver": int(getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()),
    }
    return Target(
        name=sheet.name if sheet else "cuda",
        arch=f"sm{major}{minor}",
        present=True,
        compute_dtype="bf16",
        threads=1,
        memory_bytes=properties.total_memory,
        capabilities=cuda_capabilities((major, minor)),
        fingerprint=digest_of(facts),
        description=f"{properties.name}, CUDA {torch.version.cuda}, torch {torch.__version__}",
        cache_bytes=int(getattr(properties, "L2_cache_size", 0)) or int((sheet.l2 if sheet else 40) * 2**20),
        device="cuda",
        sheet=sheet.name if sheet else "",
        facts=facts,
    )


def cuda_capabilities(capability: tuple[int, int]) -> frozenset[str]:
    """What kernels may ask of a CUDA device: every `smXY` up to its own, and `fp8` from 8.9."""
    generations = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    names = {f"sm{major}{minor}" for major, minor in (*generations, capability) if (major, minor) <= capability}
    return frozenset(names | ({"fp8"} if capability >= (8, 9) else set()))


def digest_of(facts: object) -> str:
    """A fingerprint: 16 hex digits of the SHA-256 of JSON-serialisable facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def differences(first: Mapping[str, Any], second: Mapping[str, Any], places: tuple[str, str] = ("there", "here")) -> list[str]:
    """What two set-ups differ in, by their facts: `torch 2.9.0 there, 2.13.0 here`; empty where one of them is not known."""
    if not first or not second:
        return []
    one, two = _flat(first), _flat(second)
    found = []
    for name in dict.fromkeys([*one, *two]):
        a, b = one.get(name, "not set"), two.get(name, "not set")
        if isinstance(a, list) and isinstance(b, list) and a != b:
            alone = [
                f"{' '.join(own)} only {place}"
                for own, place in zip((_without(a, b), _without(b, a)), places, strict=True)
                if own
            ]
            found.append(f"{name} {', '.join(alone)}")
        elif a != b:
            found.append(f"{name} {a} {places[0]}, {b} {places[1]}")
    return found


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with those of `caches` and `environment` beside the others; a number is the same as its text."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= {f"{key} cache" if name == "caches" else key: str(own) for key, own in value.items()}
        else:
            found[name] = [str(item) for item in value] if isinstance(value, list | tuple) else str(value)
    return found


def _without(a: list[str], b: list[str]) -> list[str]:
    """The first few of `a` that are not in `b`."""
    return [item for item in a if item not in b][:8]


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
