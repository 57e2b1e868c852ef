"""GemLite's Triton kernels for integers in few bits. The package is optional, and these kernels have not run on a GPU yet."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from methods.formats.format import Format
from methods.formats.numerics import decode_grid
from profilers.kernels.device import Device, refuses_target, version_of
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.target import Target

PACKAGE = "gemlite"
LEAST = (0, 6)
"""The version whose calls are written here."""

BITS = (2, 4, 8)
MULTIPLE = 32
"""What inputs come in a multiple of, and the smallest group: tiles along the inputs are as large, and lie in one group each."""

WORD = 32
_MOST_SPLITS = 16
_MOST_COLUMNS = 1024


class GemLiteLinear:
    """What GemLite's functional call takes.

    codes: (k bits / 32, n) int32, an input's code at its place in the word times the bits. scale: (groups, n) in the compute dtype, or
    (1, n). zero: the code of zero () int32, or what is added to `code * scale`, of the shape of scales. meta: GemLite's own numbers.
    """

    def __init__(self, fmt: Format, parts: tuple[Tensor, Tensor, Tensor], meta: list[int], bias: Tensor | None) -> None:
        gemlite: Any = importlib.import_module(PACKAGE)
        # Sums of many parts that are rounded to bf16 at every addition are too far from the format's.
        gemlite.set_native_atomic_bfp16(False)
        self.format, self.meta, self.bias = fmt, meta, bias
        self.codes, self.scale, self.zero = parts
        self._last = torch.zeros((), device=self.codes.device)
        self._run = gemlite.forward_functional

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        x = x.to(self.scale.dtype).contiguous()
        y: Tensor = self._run(x, self.bias, [self.codes, self.scale, self.zero, self._last], self.meta)
        return y

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        payload = {"codes": from_words(self.codes.cpu(), self.format.bits), "scale": self.scale.T.contiguous().cpu()}
        if not self.format.symmetric:
            payload["offset"] = self.zero.T.contiguous().cpu()
        return decode_grid(self.format, payload)

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def clone(self) -> Self:
        """See `Prepared`."""
        zero = self.zero.clone() if self.format.symmetric else roomy(self.zero)
        return type(self)(self.format, (self.codes.clone(), roomy(self.scale), zero), self.meta, self.bias)


@dataclass(frozen=True)
class GemLite:
    """`gemlite`: `w{2,4,8}a16`, by row or with groups of a power of two from 32, and with offsets by group.

    device: for tests, `cpu` is for Triton's interpreter. GemLite times its variants at the first call with a shape, and takes the
    best one from then on, unless it comes with a choice for the device.
    """

    device: Device = "cuda"

    @property
    def name(self) -> str:
        """`gemlite`, with `-cpu` behind it where it is interpreted."""
        return PACKAGE + ("" if self.device == "cuda" else "-cpu")

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _hash()

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        reason = refuses_target(target, self.device, "sm80", PACKAGE, LEAST)
        if reason or not fmt.integer or fmt.bits not in BITS or fmt.act_bits != 16:
            return reason or f"integers of {', '.join(map(str, BITS))} bits, inputs left alone"
        if k % MULTIPLE or not fmt.divides(k):
            return f"k={k} must be a multiple of {MULTIPLE} and of the group {fmt.group}"
        group = fmt.group_size(k)
        if group == k:
            return None if fmt.symmetric else "offsets by group alone, not one a row"
        return None if group >= MULTIPLE and group & (group - 1) == 0 else f"group={group} is no power of two from {MULTIPLE}"

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> GemLiteLinear:
        """See `LinearKernel`."""
        gemlite: Any = importlib.import_module(PACKAGE)
        codes = payload["codes"]
        n, k = codes.shape
        scale = payload["scale"].to(self.device, target.dtype)
        kind = gemlite.DType.BF16 if target.compute_dtype == "bf16" else gemlite.DType.FP32
        linear = gemlite.GemLiteLinear(fmt.bits, fmt.group_size(k), k, n, kind, kind)
        zeros = fmt.levels // 2 if fmt.symmetric else torch.zeros_like(scale)
        linear.pack(codes.to(self.device), scale, zeros)
        words, own, zero, _ = (part.detach() for part in linear.get_tensor_args())
        # GemLite takes zero points and keeps the negative product with the scale, rounded: an offset takes its place as it is.
        zero = zero if fmt.symmetric else roomy(payload["offset"].to(self.device, target.dtype).T)
        kept = None if bias is None else bias.detach().to(self.device, target.dtype)
        return GemLiteLinear(fmt, (words, roomy(own), zero), linear.get_meta_args(), kept)


def roomy(values: Tensor) -> Tensor:
    """A copy of values (groups, n), contiguous, with zeros behind them in memory: GemLite's tiles read scales beyond the last."""
    rows = _MOST_SPLITS + -(-_MOST_COLUMNS // values.shape[1])
    return functional.pad(values, (0, 0, 0, rows)).contiguous()[: len(values)]


def from_words(words: Tensor, bits: int) -> Tensor:
    """GemLite's words (k bits / 32, n) int32 -> codes (n, k) uint8."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    codes: Tensor = (words.T[..., None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)


@functools.cache
def _hash() -> str:
    return hash_of(__file__, versions=(version_of(PACKAGE), version_of("triton")))
