"""What the layers on the project's own C++ share: how its functions are called, and what a call costs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from profilers.kernels.build import SOURCES, Isa, NoCompiler, library

FILES = (*map(str, SOURCES), __file__)
"""What a kernel's hash covers besides its own file."""

PANEL = 32
"""Outputs that the kernels' widest loop takes at once, as panels.h has it; biases are padded to whole ones."""


def bind(isa: Isa, name: str, n_pointers: int, n_integers: int = 0) -> Callable[..., int]:
    """A function of the library with its argument types set; calls are then about 0.6 µs."""
    function = ctypes.CDLL.__getattr__(library(isa), name)
    function.argtypes = (ctypes.c_void_p,) * n_pointers + (ctypes.c_int64,) * n_integers
    function.restype = ctypes.c_int64 if name.endswith("bytes") else None
    return function


def refuses_build(isa: Isa = "native") -> str | None:
    """Why the library cannot be compiled here, or None."""
    try:
        library(isa)
    except NoCompiler as error:
        return str(error)
    return None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie, null for None."""
    return None if tensor is None else tensor.data_ptr()


def padded(bias: Tensor | None) -> Tensor | None:
    """fp32 bias with zeros up to a whole panel, as the kernels read it."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.detach().float(), (0, -len(bias) % PANEL)).contiguous()


class NativeLinear:
    """A layer that a function (layer, x, y, how many numbers x has) of the library multiplies with.

    layer: a structure with n, k, bf16 and bias among its fields. A small weight is read within ten microseconds and whatever a call
    touches may be as cold as the weight: attributes have slots, and what C can work out it does.
    """

    __slots__ = ("_dtype", "_n", "_run", "address", "bias", "isa", "layer")

    def __init__(self, function: str, layer: ctypes.Structure, bias: Tensor | None, isa: Isa) -> None:
        self.layer, self.bias, self.isa = layer, bias, isa
        layer.bias = address(bias)
        self.address = ctypes.addressof(layer)
        self._run = bind(isa, function, 3, 1)
        self._n = int(layer.n)
        self._dtype = torch.bfloat16 if layer.bf16 else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`; x of another dtype is converted."""
        if x.dtype is not self._dtype or not x.is_contiguous():
            x = x.to(self._dtype).contiguous()
        y = x.new_empty(*x.shape[:-1], self._n)
        self._run(self.address, x.data_ptr(), y.data_ptr(), x.numel())
        return y
