"""The numerics gate for every kernel of a device over default shapes: the first thing to run where a GPU is at hand.

`python -m profilers.kernels.check_device --device cuda --out FILE` needs torch, numpy and pandas (and triton, for the project's own
kernels). It writes a JSON that tells of every cell whether the kernel is right, and why not; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from methods.atomic import write_text
from methods.formats.format import Format, parse_format
from methods.formats.numerics import shape_of
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from profilers.kernels import gate
from profilers.kernels.catalogue import kernels
from profilers.kernels.device import failures
from profilers.kernels.kernel import LinearKernel, Payload
from profilers.kernels.payloads import random_payload
from profilers.target import Target, local_cpu, local_cuda

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (1024, 4096))
"""Outputs and inputs: those of a 135M model, none of which is a power of two, and larger ones."""

TOKENS = (1, 3, 8, 16, 33, 128)

FORMATS = (
    "bf16", "bf16-2of4", "bf16-r64",
    "w2a16-g32", "w2a16-g64-asym", "w3a16-g64", "w3a16-g32-asym", "w4a16-g32", "w4a16-g64", "w4a16-g64-asym", "w4a16-g128",
    "w5a16-g32", "w6a16-g64-asym", "w8a16", "w8a16-g64", "nf4", "mxfp4a16", "nl4a16-g64", "lut4a16", "lut4a16-g64", "w4a8-g64",
    "w4a8-token-g64-asym", "w8a8-g64", "w8a8-token", "fp8-token", "fp8-tensor",
)  # fmt: skip

Status = Literal["ok", "wrong", "failed", "unsupported"]


@dataclass(frozen=True)
class Cell:
    """What the gate says of a kernel at a shape: n outputs, k inputs, m tokens. `wrong` and `failed` come with a reason."""

    kernel: str
    format: str
    n: int
    k: int
    m: int
    status: Status
    reason: str = ""


def payload_of(fmt: Format, n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in a format, rounded to the nearest of the grid that spans each group."""
    generator = torch.Generator().manual_seed(seed)
    if fmt.dense:
        return random_payload(fmt, n, k, generator)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return nearest(weight, fmt, minmax(weight, fmt))


def check_cell(kernel: LinearKernel, fmt: Format, payload: Payload, target: Target, m: int) -> Cell:
    """The gate for one kernel; what torch or Triton raise where they cannot run is told, not raised."""
    n, k = shape_of(fmt, payload)
    reason = kernel.supports(fmt, n, k, m, target)
    status: Status = "unsupported"
    if reason is None:
        generator = torch.Generator().manual_seed(m)
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        try:
            prepared = kernel.prepare(fmt, payload, target, bias, m=m)
            reason = gate.check(prepared, fmt, payload, x.to(target.device, target.dtype), bias)
            status = "ok" if reason is None else "wrong"
        except failures() as error:
            status, reason = "failed", str(error).strip().splitlines()[0]
    return Cell(kernel.name, fmt.name, n, k, m, status, reason or "")


def check_device(
    target: Target,
    formats: Iterable[str] = FORMATS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
) -> Iterator[Cell]:
    """Every kernel of the target's device at every format, shape and number of tokens."""
    for fmt in map(parse_format, formats):
        for n, k in shapes:
            if not fmt.divides(k):
                continue
            payload = payload_of(fmt, n, k)
            for kernel in kernels(target):
                yield from (check_cell(kernel, fmt, payload, target, m) for m in tokens)


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    try:
        for name in names:
            parse_format(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return names


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of OUTPUTSxINPUTS; write 192x576,576x1536")
    pairs = [part.split("x") for part in text.split(",")]
    return tuple((int(n), int(k)) for n, k in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where every kernel that is supported is right, 1 where one is not, 2 where there is no such device."""
    parser = argparse.ArgumentParser(
        prog="python -m profilers.kernels.check_device", description="Gates every kernel of a device."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gate.json"), help="the JSON to write (default: %(default)s)")
    parser.add_argument("--formats", type=_formats, default=FORMATS, help="comma-separated (default: one of every kind)")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help="OUTPUTSxINPUTS, comma-separated (default: six)")
    options = parser.parse_args(arguments)
    target = local_cuda() if options.device == "cuda" else local_cpu()
    if target is None:
        sys.stderr.write("no CUDA device: torch sees none; run this on the machine with the GPU, or pass --device cpu\n")
        return 2
    cells = []
    for cell in check_device(target, options.formats, options.shapes):
        if cell.status != "unsupported":
            cells.append(cell)
        if cell.status in ("wrong", "failed"):
            sys.stderr.write(f"{cell.kernel} {cell.format} n={cell.n} k={cell.k} m={cell.m}: {cell.status}, {cell.reason}\n")
    n_bad = sum(cell.status in ("wrong", "failed") for cell in cells)
    record = {"device": target.description, "fingerprint": target.fingerprint, "cells": [asdict(cell) for cell in cells]}
    write_text(options.out, json.dumps(record, indent=1) + "\n")
    n_right = sum(cell.status == "ok" for cell in cells)
    sys.stdout.write(f"{target.description}: {n_right} cells right, {n_bad} not; {options.out}\n")
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
