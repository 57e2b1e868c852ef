"""Root-mean-square norms on one kernel call instead of a dozen torch operators, wherever a module proves to be one."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from methods.model.weights import is_norm_like, norm_view
from profilers.kernels.build import NoCompiler, library
from profilers.target import Target

_EPSILONS = ("variance_epsilon", "eps")


class KernelNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * gain` over the last dimension; gain (d,) fp32, rows in one dtype."""

    def __init__(self, gain: Tensor, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.gain = gain.detach().float().contiguous()
        self.eps, self.dtype = eps, dtype
        function = ctypes.CDLL.__getattr__(library(), "isolatency_rms_norm")
        function.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 3 + (ctypes.c_double,)
        function.restype = None
        self._run: Any = function
        self._bf16 = int(dtype is torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        if x.dtype is not self.dtype or not x.is_contiguous():
            x = x.to(self.dtype).contiguous()
        y = torch.empty_like(x)
        dim = x.shape[-1]
        self._run(x.data_ptr(), self.gain.data_ptr(), y.data_ptr(), x.numel() // dim, dim, self._bf16, self.eps)
        return y


def install(result: nn.Module, original: nn.Module, replaced: dict[str, Tensor], target: Target) -> int:
    """Replaces norms of `result` that compute what the kernel computes; returns how many.

    original: the fp32 model, in which each candidate is compared with the kernel on random rows; replaced: parameters that `result`
    has in place of the original's. Layer norms stay: torch has one operator for them.
    """
    try:
        library()
    except NoCompiler:
        return 0
    found = {name: eps for name, module in original.named_modules() if (eps := _epsilon(module)) is not None}
    n_installed = 0
    for name, eps in found.items():
        offset = _offset(original, name, eps)
        if offset is not None:
            weight = replaced.get(f"{name}.weight", original.get_parameter(f"{name}.weight"))
            result.set_submodule(name, KernelNorm(weight.float() + offset, eps, target.dtype))
            n_installed += 1
    return n_installed


def _epsilon(module: nn.Module) -> float | None:
    if isinstance(module, nn.LayerNorm | nn.Linear) or not is_norm_like(module) or getattr(module, "bias", None) is not None:
        return None
    value = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    return value if module.get_parameter("weight").numel() % 16 == 0 else None


def _offset(original: nn.Module, name: str, eps: float) -> float | None:
    """The constant added to the weight (1 for Gemma), or None where the module computes something else."""
    try:
        view = norm_view(original, name)
    except ValueError:
        return None
    x = 3 * torch.randn(3, view.weight.numel(), generator=torch.Generator().manual_seed(1))
    x[0] *= eps**0.5  # a row so small that eps decides
    expected = original.get_submodule(name)(x)
    got = KernelNorm(view.weight.float() + view.unit_offset, eps, torch.float32)(x)
    return view.unit_offset if torch.allclose(expected.float(), got, rtol=1e-4, atol=1e-6) else None
