"""Compiles the C++ kernels at first use and keeps the library by the hash of its source and flags."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from methods.atomic import sha256, staging_folder, write_text
from profilers.cache_folder import cache_folder

Isa = Literal["native", "avx2", "portable"]

_NAMES = (
    *("grouped.cpp", "lookup.cpp", "csr.cpp", "lowrank.cpp", "attention.cpp", "prompt.cpp", "norm.cpp"),
    *("panels.h", "attention.h", "threads.h", "vectors.h"),
)
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_MACHINE: dict[Isa, tuple[str, ...]] = {
    "native": ("-O3", "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"),
    "avx2": ("-O1", "-march=x86-64-v3"),
    "portable": ("-O1", "-DISOLATENCY_PORTABLE"),
}
"""Only `native` is for speed; the others prove that the same source is right on other machines, and compile in seconds."""

_ISA_NAMES = {3: "AVX512-VNNI and BF16", 2: "AVX512-VNNI", 1: "AVX2", 0: "portable C++"}
"""By what `isolatency_isa` of grouped.cpp returns."""


MISSING = "no C++ compiler found; install g++ or clang++, or set CXX"


class NoCompiler(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def kernel_folder() -> Path:
    """Where compiled kernels are kept."""
    return cache_folder() / "kernels"


def compiler() -> str | None:
    """Path of a C++ compiler: `$CXX`, g++, clang++ or c++, whichever comes first."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


_PLANNING = contextvars.ContextVar("planning", default=False)


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Inside, kernels are taken to compile wherever there is a compiler, and nothing is compiled: none of them can be called."""
    token = _PLANNING.set(True)
    try:
        yield
    finally:
        _PLANNING.reset(token)


def library(isa: Isa = "native") -> ctypes.CDLL:
    """The compiled kernels; raises NoCompiler, at once where they could not be built before. While `planning`, a library without them.

    OpenMP symbols are left to torch's own copy first: two thread pools would spin against each other. Then with the compiler's own
    OpenMP, then without.
    """
    if _PLANNING.get() and compiler() is not None:
        return ctypes.CDLL(None)
    found = _loaded(isa)
    if isinstance(found, str):
        raise NoCompiler(found)
    return found


@functools.cache
def _loaded(isa: Isa) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    cxx = compiler()
    if cxx is None:
        return MISSING
    problem = ""
    for compile_flags, link_flags in ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), ((), ())):
        try:
            return ctypes.CDLL(str(_built(cxx, (*_MACHINE[isa], *compile_flags), link_flags)))
        except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            problem = str(getattr(error, "stderr", None) or error).strip()
    return f"{cxx} could not build the kernels: {problem.splitlines()[0] if problem else 'no message'}"


def compiled_for() -> str:
    """The instructions that the native library uses, in words; raises NoCompiler."""
    return _ISA_NAMES[int(library().isolatency_isa())]


def _built(cxx: str, compile_flags: tuple[str, ...], link_flags: tuple[str, ...]) -> Path:
    flags = ("-std=c++17", "-fPIC", "-Wno-psabi", *compile_flags)
    stamp = (
        b"".join(source.read_bytes() for source in SOURCES)
        + repr((cxx, flags, link_flags, platform.processor(), _cpu(), torch.__version__)).encode()
    )
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
    path = kernel_folder() / f"{hashlib.sha256(stamp).hexdigest()[:16]}{suffix}"
    if _whole(path):
        return path
    with staging_folder(path) as made:
        objects = {str(source): str(made / f"{source.stem}.o") for source in SOURCES if source.suffix == ".cpp"}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: _call(cxx, *flags, "-c", pair[0], "-o", pair[1]), objects.items()))
        undefined = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
        _call(cxx, "-shared", *undefined, *objects.values(), "-o", str(made / "kernels.so"), *link_flags)
        write_text(_checksum(path), sha256(made / "kernels.so"))
        (made / "kernels.so").replace(path)
    return path


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _whole(path: Path) -> bool:
    """Whether the library is there as it was built: loading a damaged one would end the process. Earlier versions left no checksum."""
    return path.exists() and (not _checksum(path).exists() or _checksum(path).read_text(errors="replace") == sha256(path))


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def _cpu() -> str:
    """`-march=native` code of another CPU may not run here, and home folders travel."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
