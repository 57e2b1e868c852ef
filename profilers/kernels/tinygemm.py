"""torch's int4 kernel for CUDA, made for a few tokens: `w4a16` by group, activations in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats.format import Format
from profilers.kernels.aten_packed import Int4PackLinear, refuses_int4
from profilers.kernels.device import refuses_target
from profilers.kernels.kernel import Payload, Prepared, hash_of
from profilers.target import Target

INNER_TILES = (8, 4, 2)
"""Tiles of 16 inputs that are packed together, the widest loads first."""


@dataclass(frozen=True)
class Tinygemm:
    """`tinygemm`: `w4a16-g{32,64,128,256}`, symmetric for the same reason as `int4pack`."""

    name: str = "tinygemm"

    @property
    def source_hash(self) -> str:
        """See `LinearKernel`."""
        return _HASH

    def supports(self, fmt: Format, n: int, k: int, m: int, target: Target) -> str | None:
        """See `LinearKernel`."""
        reason = refuses_int4(fmt, n, k, 8)
        if reason or target.compute_dtype != "bf16":
            return reason or "takes activations in bf16"
        return refuses_target(target, "cuda", "sm80")

    def prepare(
        self,
        fmt: Format,
        payload: Payload,
        target: Target,
        bias: Tensor | None = None,
        *,
        m: int = 1,
        like: Prepared | None = None,
    ) -> Int4PackLinear:
        """See `LinearKernel`."""
        codes, scale = payload["codes"].to(target.device), payload["scale"].to(target.device)
        weight = torch.ops.aten._convert_weight_to_int4pack(nibbles(codes), inner_tiles(codes.shape[1]))
        pairs = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).contiguous()
        rounded = None if bias is None else bias.detach().bfloat16().to(target.device)
        return Int4PackLinear(weight, pairs, fmt.group, rounded, (codes.shape[0], codes.shape[1]))


def nibbles(codes: Tensor) -> Tensor:
    """Codes (n, k) uint8 below 16 -> (n, k / 2) uint8, the even input in the upper half: what torch packs on CUDA."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


def inner_tiles(k: int) -> int:
    """How many tiles are packed together for k inputs, a multiple of 32."""
    return next(tiles for tiles in INNER_TILES if k % (16 * tiles) == 0)


_HASH = hash_of(__file__)
