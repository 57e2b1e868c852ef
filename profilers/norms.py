"""Root-mean-square norms on one kernel call instead of a dozen torch operators, wherever a module proves to be one."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


class TorchNorm(nn.Module):
    """The same by torch's operator, one launch on CUDA; gain (d,) fp32, taken to the rows' dtype where nothing of it is lost."""

    def __init__(self, gain: Tensor, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        narrow = gain.detach().to(dtype)
        self.gain = narrow if torch.equal(narrow.float(), gain.float()) else gain.detach().float()
        self.eps, self.dtype = eps, dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        return functional.rms_norm(x.to(self.gain.dtype), self.gain.shape, self.gain, self.eps).to(self.dtype)


def install(result: nn.Module, original: nn.Module, replaced: dict[str, Tensor], target: Target) -> int:
    """Replaces norms of `result` that compute what the kernel computes; returns how many.

    original: the fp32 model, in which each candidate is compared with the kernel on random rows; replaced: parameters that `result`
    has in place of the original's. Layer norms stay: torch has one operator for them.
    """
    norm = KernelNorm if target.device == "cpu" else TorchNorm
    try:
        if norm is KernelNorm:
            library()
    except NoCompiler:
        return 0
    found = {name: eps for name, module in original.named_modules() if (eps := _epsilon(module)) is not None}
    n_installed = 0
    for name, eps in found.items():
        offset = _offset(original, name, eps, norm)
        if offset is not None:
            weight = replaced.get(f"{name}.weight", original.get_parameter(f"{name}.weight"))
            gain = (weight.float() + offset).to(result.get_parameter(f"{name}.weight").device)
            result.set_submodule(name, norm(gain, eps, target.dtype))
            n_installed += 1
    return n_installed


def _epsilon(module: nn.Module) -> float | None:
    if isinstance(module, nn.LayerNorm | nn.Linear) or not is_norm_like(module) or getattr(module, "bias", None) is not None:
        return None
    value = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    return value if module.get_parameter("weight").numel() % 16 == 0 else None


def _offset(original: nn.Module, name: str, eps: float, norm: type[KernelNorm] | type[TorchNorm]) -> float | None:
    """The constant added to the weight (1 for Gemma), or None where the module computes something else."""
    try:
        view = norm_view(original, name)
    except ValueError:
        return None
    x = 3 * torch.randn(3, view.weight.numel(), generator=torch.Generator().manual_seed(1))
    x[0] *= eps**0.5  # a row so small that eps decides
    expected = original.get_submodule(name)(x)
    got = norm(view.weight.float() + view.unit_offset, eps, torch.float32)(x)
    return view.unit_offset if torch.allclose(expected.float(), got, rtol=1e-4, atol=1e-6) else None
