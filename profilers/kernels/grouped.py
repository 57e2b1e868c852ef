"""The project's own kernels for packed codes, `panels.h`: integer grids of every width, group, offset and activation rule."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.build import Isa
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.native import FILES, PANEL, NativeLinear, address, bind, padded, refuses_build
from profilers.target import Target

_INT32_SAFE_INPUTS = 65536


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


class PackedLinear(NativeLinear):
    """A weight as one stream of panels (layout: panels.h); levels: (16,) fp32 by code, or None for integers."""

    __slots__ = ("levels", "stream")

    layer: Layer

    def __init__(self, layer: Layer, stream: Tensor, bias: Tensor | None, isa: Isa, levels: Tensor | None = None) -> None:
        super().__init__("isolatency_linear", layer, bias, isa)
        self.stream, self.levels = stream, levels
        layer.stream, layer.levels = stream.data_ptr(), address(levels)

    def decoded(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(k, n) view of the decoded weight, inputs first because that is how the stream decodes; out: memory to use."""
        k, width = int(self.layer.k), -(-self._n // PANEL) * PANEL
        if out is None:
            out = torch.empty((k, width), dtype=dtype)
        else:
            out = out[: k * width].view(k, width)
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


_HASH = hash_of(*FILES, __file__)
