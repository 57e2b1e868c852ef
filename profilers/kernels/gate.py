"""The numerics gate: a kernel that does not compute what its format says is not timed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import decode, quantize_activation
from profilers.kernels.kernel import Payload, Prepared

_EDGE_ROWS = 8


def tolerance(fmt: Format, dtype: torch.dtype) -> float:
    """Largest relative error (Frobenius norm) of a kernel's output: rounding of sums and output, and ties of int8 activations."""
    if fmt.act_bits == 8:
        return 3e-2
    return 1e-5 if dtype == torch.float32 else 5e-3


def check(prepared: Prepared, fmt: Format, payload: Payload, x: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a prepared kernel is wrong, or None: weights read back bit for bit, outputs near the float64 reference.

    x (m, k) in the compute dtype, on the kernel's device; of many rows the first and last eight are compared, all of them for NaN,
    which memory holds that the kernel should have written and has not.
    """
    weight = decode(fmt, payload)
    if not torch.equal(prepared.dequant(), weight):
        return "the packed weight does not decode to the payload"
    with poisoned():
        got = prepared(x)
    got, x = got.cpu(), x.cpu()
    if got.shape != (x.shape[0], weight.shape[0]) or got.dtype != x.dtype:
        return f"returned {tuple(got.shape)} {got.dtype} for {x.shape[0]} rows of {weight.shape[0]} outputs in {x.dtype}"
    if not torch.isfinite(got).all():
        return "returned NaN or infinity on finite input"
    rows = torch.arange(x.shape[0])
    rows = rows if len(rows) <= 2 * _EDGE_ROWS else torch.cat((rows[:_EDGE_ROWS], rows[-_EDGE_ROWS:]))
    expected = quantize_activation(x[rows].float(), fmt).double() @ weight.double().T
    if bias is not None:
        expected = expected + bias.double()
    error = float((got[rows].double() - expected).norm() / expected.norm())
    limit = tolerance(fmt, x.dtype)
    return None if error <= limit else f"relative error {error:.1e} is above {limit:.0e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """torch's new memory holds NaN, or the largest integer, inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    # The public function imports torch's compiler, four seconds; warnings alone, since only the filling is wanted.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(fills)
