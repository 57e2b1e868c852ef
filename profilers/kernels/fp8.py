"""FP8 products on CUDA by torch's scaled matrix product: a scale a token and one an output, or one of each for the whole tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from methods.formats.format import Format, parse_format
from profilers.kernels.device import Device, refuses_target
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.kernels.triton_rows import REACH, SOURCES, quantized
from profilers.target import Target

FORMATS = tuple(map(parse_format, ("fp8-token", "fp8-tensor")))
_DTYPE = torch.float8_e4m3fn


class Fp8Linear:
    """Weights (n, k) E4M3 and their scales fp32: (1, n), or () for the whole weight."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scale, self.bias = weight, scale, bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Prepared`."""
        n, k = self.weight.shape
        rows = x.to(torch.bfloat16).reshape(-1, k).contiguous()
        codes, scale = quantized(rows, k, _DTYPE) if self.scale.dim() else _as_one(rows)
        # Sums in the full precision of the matrix instructions would be no nearer to the format: its inputs have four significant bits.
        y = torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], n)

    def dequant(self) -> Tensor:
        """See `Prepared`."""
        return (self.weight.float() * (self.scale.t() if self.scale.dim() else self.scale)).cpu()

    def size_bytes(self) -> int:
        """See `Prepared`."""
        return self.weight.numel() + 4 * self.scale.numel()

    def clone(self) -> Self:
        """See `Prepared`."""
        return type(self)(self.weight.clone(), self.scale.clone(), self.bias)


def _as_one(rows: Tensor) -> tuple[Tensor, Tensor]:
    top = rows.abs().amax().float()
    scale = torch.where(top == 0, 1.0, top / REACH[_DTYPE])
    return (rows.float() / scale).clamp(-REACH[_DTYPE], REACH[_DTYPE]).to(_DTYPE), scale


@dataclass(frozen=True)
class Fp8:
    """`scaled-mm`: `fp8-token` and `fp8-tensor`. device: for tests, `cpu` takes torch's reference operator."""

    device: Device = "cuda"

    @property
    def name(self) -> str:
        """`scaled-mm`, with `-cpu` behind it in tests."""
        return "scaled-mm" + ("" if self.device == "cuda" else "-cpu")

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        if fmt not in FORMATS:
            return f"{' and '.join(known.name for known in FORMATS)} only"
        if n % 16 or k % 16:
            return f"n={n} and k={k} must be multiples of 16"
        if target.compute_dtype != "bf16":
            return "writes bf16"
        return refuses_target(target, self.device, "fp8", "triton" if fmt.act_rows == 1 else "")

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Fp8Linear:
        """See `LinearKernel`. Codes are E4M3's bit patterns."""
        weight = payload["codes"].contiguous().view(_DTYPE).to(self.device)
        stored = payload["scale"].float().to(self.device)
        scale = stored.reshape(1, -1).contiguous() if fmt.rows == 1 else stored.reshape(())
        return Fp8Linear(weight, scale, None if bias is None else bias.detach().bfloat16().to(self.device))


_HASH = hash_of(*SOURCES, __file__)
