"""GemLite in Triton's interpreter, in a process of its own: it asks for a device when it is imported, so that it is told of one."""

from __future__ import annotations

import importlib
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch

from methods.formats.format import parse_format
from profilers.kernels import gate
from profilers.kernels.check_device import payload_of
from profilers.kernels.gemlite_grouped import GemLite
from profilers.target import local_cpu


def pool() -> ProcessPoolExecutor:
    """One process in which Triton interprets and torch and Triton tell of a GPU."""
    return ProcessPoolExecutor(1, get_context("spawn"), _start)


class _Driver:
    """What GemLite and Triton's choice among variants ask of a driver; every variant takes as long, so that the first one runs."""

    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 99 << 10})

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cuda", arch=90, warp_size=32)

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        return lambda *_, **__: [1.0, 1.0, 1.0]


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    told: Any = SimpleNamespace(name="a GPU", multi_processor_count=1)
    setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # noqa: B010
    setattr(torch.cuda, "get_device_properties", lambda *_: told)  # noqa: B010
    importlib.import_module("triton.runtime").driver.set_active(_Driver())


def gated(name: str, n: int, k: int, m: int, dtype: str = "fp32") -> str | None:
    """What the gate says, or why two calls of which one is a clone's differ."""
    fmt, target = parse_format(name), replace(local_cpu(1), compute_dtype=dtype)
    kernel = GemLite("cpu")
    reason = kernel.supports(fmt, n, k, m, target)
    if reason is not None:
        return reason
    payload = payload_of(fmt, n, k, seed=m)
    generator = torch.Generator().manual_seed(n + k + m)
    x, bias = torch.randn(m, k, generator=generator).to(target.dtype), torch.randn(n, generator=generator)
    prepared = kernel.prepare(fmt, payload, target, bias)
    problem = gate.check(prepared, fmt, payload, x, bias)
    if problem is None and not torch.allclose(prepared(x), prepared.clone()(x), rtol=1e-5, atol=1e-5):
        return "a clone gives another result"
    return problem


def weight_bytes(name: str, n: int, k: int) -> int:
    """What a packed weight takes."""
    fmt = parse_format(name)
    return GemLite("cpu").prepare(fmt, payload_of(fmt, n, k), replace(local_cpu(1), compute_dtype="bf16")).size_bytes()
