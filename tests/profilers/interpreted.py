"""What runs in a process of its own for the tests of the Triton kernels: Triton decides at import whether it interprets."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, Literal

import torch

from methods.formats.activations import rounded
from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode, quantize_activation
from profilers.kernels import gate
from profilers.kernels.check_device import payload_of
from profilers.kernels.fp8 import Fp8
from profilers.kernels.kernel import LinearKernel
from profilers.kernels.triton_grouped import TritonGrouped
from profilers.kernels.triton_int8 import TritonInt8
from profilers.kernels.triton_rows import quantized
from profilers.target import local_cpu

Name = Literal["few", "many", "int8", "fp8"]


def pool(interprets: bool) -> ProcessPoolExecutor:
    """One process in which Triton interprets, or compiles."""
    return ProcessPoolExecutor(1, get_context("spawn"), _start, (interprets,))


def _start(interprets: bool) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if interprets else "0"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def kernel_of(name: Name, parts: int | None) -> LinearKernel:
    """A kernel of the interpreter."""
    if name == "fp8":
        return Fp8("cpu")
    return TritonInt8("cpu", parts) if name == "int8" else TritonGrouped(name, "cpu", parts)


def gated(name: Name, fmt: str, dtype: str, n: int, k: int, m: int, parts: int | None) -> str | None:
    """What the gate says of a kernel, and of few tokens why two calls or a clone differ."""
    kernel, target = kernel_of(name, parts), replace(local_cpu(1), compute_dtype=dtype)
    reason = kernel.supports(parse_format(fmt), n, k, m, target)
    if reason is not None:
        return reason
    generator = torch.Generator().manual_seed(n + k + m)
    payload = payload_of(parse_format(fmt), n, k, seed=m)
    x, bias = torch.randn(m, k, generator=generator).to(target.dtype), torch.randn(n, generator=generator)
    prepared = kernel.prepare(parse_format(fmt), payload, target, bias, m=m)
    problem = gate.check(prepared, parse_format(fmt), payload, x, bias)
    if problem is None and m <= 3 and not torch.equal(prepared(x), prepared.clone()(x)):
        return "a clone, or a second call, gives another result"
    return problem


def exact_error(name: Name, fmt: str, n: int, k: int, m: int) -> float:
    """Relative error in fp32 against fp64 of a format with rounded inputs: everything but the scales is integer arithmetic."""
    form, target = parse_format(fmt), replace(local_cpu(1), compute_dtype="fp32")
    payload = payload_of(form, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    got = kernel_of(name, 2).prepare(form, payload, target)(x)
    expected = quantize_activation(x, form).double() @ decode(form, payload).double().T
    return float((got.double() - expected).norm() / expected.norm())


def unlike_reference(fmt: str, m: int, k: int, dtype: str) -> int:
    """How many inputs a kernel rounds otherwise than the reference numerics do."""
    form = parse_format(fmt)
    x = (
        torch.randn(m, k, generator=torch.Generator().manual_seed(2))
        .mul(torch.logspace(-3, 2, m)[:, None])
        .to(gate_dtype(dtype))
    )
    x[0] = 0
    group = k if form.act_group == -1 else form.act_group
    codes, scale = quantized(x, group, torch.int8 if form.act_element == "int" else torch.float8_e4m3fn)
    got = (codes.float().view(m, -1, group) * scale[..., None]).view(m, k)
    return int((got != rounded(x, form, {})).sum())


def gate_dtype(dtype: str) -> torch.dtype:
    """A dtype by the name that targets give it."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def not_finite_rows(name: Name, fmt: str, bad: float) -> list[bool]:
    """Of three tokens, of which the second holds a value that is not finite: whether each has an output that is not."""
    form, target = parse_format(fmt), local_cpu(1)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    x[1, 100] = bad
    got = kernel_of(name, 1).prepare(form, payload_of(form, 48, 192), replace(target, compute_dtype="bf16"))(x)
    return [not bool(row.isfinite().all()) for row in got]


def same_memory(fmt: str) -> tuple[bool, float]:
    """Whether few and many tokens share one packed weight, and how far their products are apart."""
    form, target = parse_format(fmt), replace(local_cpu(1), compute_dtype="fp32")
    payload = payload_of(form, 40, 192)
    few = kernel_of("few", None).prepare(form, payload, target)
    many = kernel_of("many", None).prepare(form, payload, target, like=few)
    x = torch.randn(2, 2, 192, generator=torch.Generator().manual_seed(4))
    return many.words is few.words, float((few(x) - many(x)).abs().max())


def shared_memory(name: Name, fmt: str, m: int, k: int, capability: int) -> dict[str, int]:
    """Bytes of shared memory of every kernel that a product launches, compiled to machine code for a CUDA compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for kernel, arguments, constants in _launched(name, parse_format(fmt), m, k):
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
        signature, fixed, facts = {}, dict(constants), {}
        for index, (argument, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            whole = value.data_ptr() if isinstance(value, torch.Tensor) else value
            signature[argument] = _type_of(value)
            if signature[argument] == "constexpr":
                fixed[argument] = value
            elif isinstance(whole, int) and whole % 16 == 0:
                facts[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        ordered = {argument: signature[argument] for argument in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, ordered, fixed, facts), GPUTarget("cuda", capability, 32), options)
        found[kernel.__name__] = int(compiled.metadata.shared)
    return found


def _launched(name: Name, fmt: Format, m: int, k: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The Triton functions that a product calls, with what they are given, products being taken in bf16 as on a device."""
    from profilers.kernels import triton_code

    calls = []

    class Recorder:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **constants: calls.append((self.function, arguments, constants))

    names = ("few_rows", "many_rows", "int8_rows", "quantize_rows")
    originals = {known: getattr(triton_code, known) for known in names}
    for known, function in originals.items():
        setattr(triton_code, known, Recorder(function))
    operands = triton_code.OPERANDS
    triton_code.OPERANDS = {**operands, "fp32": operands["bf16"]}
    prepared = kernel_of(name, 4).prepare(
        fmt, payload_of(fmt, 64, k), replace(local_cpu(1), compute_dtype="bf16"), torch.zeros(64)
    )
    if name != "fp8":
        prepared(torch.zeros(m, k, dtype=torch.bfloat16))
    else:
        quantized(torch.zeros(m, k, dtype=torch.bfloat16), k, torch.float8_e4m3fn)
    for known, function in originals.items():
        setattr(triton_code, known, function)
    triton_code.OPERANDS = operands
    return calls


def _type_of(value: Any) -> str:
    types = {
        torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
    }  # fmt: skip
    if isinstance(value, torch.Tensor):
        return f"*{types[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 else "i32"
