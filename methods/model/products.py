"""Linears in fp32 on the CPU by oneDNN, where the product that torch would call leaves half of the processor unused.

torch multiplies fp32 matrices with MKL, which goes without AVX-512 on processors that Intel did not make. oneDNN uses it: 2.2 times as
fast on an AMD EPYC of 2025, at the same precision (fp32 products, fp32 sums).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PLAIN = (Tensor, nn.Parameter)


@contextmanager
def fast_linears() -> Iterator[None]:
    """Inside, every fp32 linear of this thread runs on oneDNN where that is faster; elsewhere nothing changes."""
    if not _faster():
        yield
        return
    with _Linears():
        yield


class _Linears(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and not kwargs and _fits(*args):
            if not torch.is_grad_enabled():
                return _onednn(*args)
            return _Linear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` with its gradients by the same product; a second derivative is that of torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, inputs = g.flatten(0, -2), x.flatten(0, -2)
        multiply = _plain if torch.is_grad_enabled() else _onednn
        below = multiply(g, weight.T) if of_x else None
        own = multiply(rows.T, inputs.T) if of_weight else None
        return below, own, rows.sum(0) if of_bias else None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`; x: (…, d_in), weight: (d_out, d_in). Fast where neither takes part in a graph."""
    in_graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _onednn(x, weight) if _faster() and _fits(x, weight) and not in_graph else _plain(x, weight)


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Other strides than rows' or columns' take a path that is hundreds of times slower.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    by_columns = matrix.dim() == 2 and matrix.T.is_contiguous()
    return matrix if by_columns else matrix.contiguous()


def _fits(x: object, weight: object, bias: object = None) -> bool:
    """Plain fp32 tensors on the CPU, with at least one row."""
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return (
        all(type(t) in _PLAIN and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)  # type: ignore[attr-defined]
        and x.dim() > 1  # type: ignore[attr-defined]
        and x.numel() > 0  # type: ignore[attr-defined]
    )


@cache
def _faster() -> bool:
    """Whether oneDNN is here, the processor has AVX-512, torch uses it, and Intel did not make it."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""
