"""The project's own kernels for packed codes, `panels.h`: integer grids of every width, group, offset and activation rule."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.build import SOURCES, Isa, NoCompiler, library
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.target import Target

_INT32_SAFE_INPUTS = 65536
_PANEL = 32


class Layer(ctypes.Structure):
    """`struct Layer` of panels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "act_group")),
        *((name, ctypes.c_int32) for name in ("bits", "asym", "act_bits", "bf16", "threads")),
        ("stream", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
    )


def layer_of(fmt: Format, n: int, k: int, target: Target) -> Layer:
    """The description of a layer, without its memory."""
    return Layer(
        n=n,
        k=k,
        group=fmt.group_size(k),
        act_group=k if fmt.act_group == -1 else fmt.act_group,
        bits=fmt.bits,
        asym=not fmt.symmetric,
        act_bits=fmt.act_bits,
        bf16=target.compute_dtype == "bf16",
        threads=target.threads,
    )


def bind(isa: Isa, name: str, n_pointers: int, n_integers: int = 0) -> Callable[..., int]:
    """A function of the library with its argument types set; calls are then about 1 µs."""
    function = ctypes.CDLL.__getattr__(library(isa), name)
    function.argtypes = (ctypes.c_void_p,) * n_pointers + (ctypes.c_int64,) * n_integers
    function.restype = ctypes.c_int64 if name.endswith("bytes") else None
    return function


def refuses(fmt: Format, k: int, isa: Isa) -> str | None:
    """Why integer grids are not what the format is, or its shape is not one of `refuses_shape`."""
    if fmt.dense:
        return "integer grids only"
    if not fmt.plain:
        return "integer grids of 2, 3, 4 or 8 bits with bf16 scales, inputs left alone or rounded to int8 a token"
    return refuses_shape(fmt, k, isa)


def refuses_shape(fmt: Format, k: int, isa: Isa) -> str | None:
    """What every kernel on packed codes asks for, and a compiler."""
    if k % 16:
        return f"k={k} is not a multiple of 16"
    if not fmt.divides(k):
        return f"group={fmt.group} does not divide k={k}"
    if k > _INT32_SAFE_INPUTS:
        return f"k={k} is above {_INT32_SAFE_INPUTS}, where int32 sums may overflow"
    return refuses_build(isa)


def refuses_build(isa: Isa = "native") -> str | None:
    """Why the library cannot be compiled here, or None."""
    try:
        library(isa)
    except NoCompiler as error:
        return str(error)
    return None


class PackedLinear:
    """A weight as one stream of panels (layout: panels.h); levels: (16,) fp32 by code, or None for integers."""

    def __init__(self, layer: Layer, stream: Tensor, bias: Tensor | None, isa: Isa, levels: Tensor | None = None) -> None:
        self.layer, self.stream, self.bias, self.isa, self.levels = layer, stream, bias, isa, levels
        layer.stream = stream.data_ptr()
        layer.bias = address(bias)
        layer.levels = address(levels)
        self.address = ctypes.addressof(layer)
        self._run = bind(isa, "isolatency_linear", 3, 1)
        self._n, self._k = int(layer.n), int(layer.k)
        self._dtype = torch.bfloat16 if layer.bf16 else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`; x of another dtype is converted."""
        if x.dtype is not self._dtype or not x.is_contiguous():
            x = x.to(self._dtype).contiguous()
        y = torch.empty((*x.shape[:-1], self._n), dtype=self._dtype)
        self._run(self.address, x.data_ptr(), y.data_ptr(), x.numel() // self._k)
        return y

    def decoded(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(k, n) view of the decoded weight, inputs first because that is how the stream decodes; out: memory to use."""
        width = -(-self._n // _PANEL) * _PANEL
        if out is None:
            out = torch.empty((self._k, width), dtype=dtype)
        else:
            out = out[: self._k * width].view(self._k, width)
        bind(self.isa, "isolatency_decode", 2, 1)(self.address, out.data_ptr(), dtype == torch.bfloat16)
        return out[:, : self._n]

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return self.decoded(torch.float32).T.contiguous()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.stream.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(Layer.from_buffer_copy(self.layer), self.stream.clone(), self.bias, self.isa, self.levels)


def pack(fmt: Format, payload: Payload, target: Target, bias: Tensor | None, isa: Isa, levels: Tensor | None) -> PackedLinear:
    """The stream of a payload: codes, scales and, if asymmetric, offsets in bf16; levels: as in `PackedLinear`."""
    codes, scale = payload["codes"].contiguous(), payload["scale"].contiguous()
    offset = None if fmt.symmetric else payload["offset"].contiguous()
    n, k = codes.shape
    layer = layer_of(fmt, n, k, target)
    stream = torch.zeros(bind(isa, "isolatency_stream_bytes", 1)(ctypes.addressof(layer)), dtype=torch.uint8)
    bind(isa, "isolatency_pack", 5)(
        ctypes.addressof(layer), codes.data_ptr(), scale.data_ptr(), address(offset), stream.data_ptr()
    )
    return PackedLinear(layer, stream, padded(bias), isa, levels)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie, null for None."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Grouped:
    """Multiplies from packed codes: int8 dot products, or fp32 sums where activations stay as they are.

    isa: code path to compile, for tests; `native` takes the best of this CPU.
    """

    isa: Isa = "native"

    @property
    def name(self) -> str:
        """`grouped`, or with the forced path."""
        return "grouped" if self.isa == "native" else f"grouped-{self.isa}"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        return refuses(fmt, k, self.isa)

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> PackedLinear:
        """See `LinearKernel`."""
        if isinstance(like, PackedLinear) and like.isa == self.isa:
            return like
        return pack(fmt, payload, target, bias, self.isa, None)


def padded(bias: Tensor | None) -> Tensor | None:
    """fp32 bias with zeros up to a whole panel, as the kernels read it."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.detach().float(), (0, -len(bias) % _PANEL)).contiguous()


_HASH = hash_of(*map(str, SOURCES), __file__)
