"""Scale codecs: how the scales of a weight are stored, at what cost. Imports no torch; `methods.formats.scales` writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROW, TENSOR = -1, -2
WIDTHS: Mapping[str, int] = {
    "bf16": 16,
    "fp16": 16,
    "fp32": 32,
    "e8m0": 8,
    "e4m3": 8,
    "u3": 3,
    "u4": 4,
    "u6": 6,
    "s6": 6,
    "s8": 8,
}
"""Bits of what stands for one scale: a float, a power of two, a minifloat, or an unsigned or signed integer."""


@dataclass(frozen=True)
class Codec:
    """How scales are stored, and offsets with them.

    code: of `WIDTHS`. span: what shares a scale of the second level, by which those of the first are multiplied: 0 none, so many
    consecutive inputs of a row, `ROW` or `TENSOR`. second: the dtype of that. mean: scales are stored about their mean, and the span
    counts scales of the whole tensor instead of inputs. least: scales are stored above the least of their span, which counts rows at one
    group of inputs; offsets likewise, as zero points in units of their scale. signed: scales may be negative. offsets: whether it stores
    offsets too; second levels without a least hold those that are not positive.
    """

    code: str
    span: int = 0
    second: str = ""
    mean: bool = False
    least: bool = False
    signed: bool = False
    offsets: bool = False

    @property
    def width(self) -> int:
        """Bits of a scale's own part."""
        return WIDTHS[self.code]

    @property
    def steps(self) -> int:
        """Of an integer code: the largest unsigned one, or the magnitude of the least signed one."""
        return int(2**self.width - 1) if self.code[0] == "u" else int(2 ** (self.width - 1))

    @property
    def inputs(self) -> int:
        """Consecutive inputs of a row that share a scale of the second level; 0 where it is not inputs that do."""
        return 0 if self.mean or self.least else max(self.span, 0)

    @property
    def by_rows(self) -> bool:
        """Whether no row shares anything with another."""
        return self.span != TENSOR and not self.mean and not self.least

    def second_bits(self, n_blocks: int, n_groups: int, d_in: int) -> int:
        """Bits of the second level of the scales (n_blocks, n_groups) of a weight with d_in inputs."""
        if not self.span:
            return 0
        if self.mean:
            n = math.ceil(n_blocks * n_groups / self.span) + 1
        elif self.least:
            n = 2 * math.ceil(n_blocks / self.span) * n_groups
        else:
            n = {ROW: n_blocks, TENSOR: 1}.get(self.span) or n_blocks * d_in // self.span
        return n * WIDTHS[self.second]


CODECS: Mapping[str, Codec] = {
    "bf16": Codec("bf16", signed=True, offsets=True),
    "fp16": Codec("fp16", signed=True, offsets=True),
    "fp32": Codec("fp32", signed=True, offsets=True),
    "e8m0": Codec("e8m0"),
    "nv": Codec("e4m3", TENSOR, "fp32"),
    "dq": Codec("s8", 256, "fp32", mean=True),
    "u4": Codec("u4", ROW, "fp32"),
    "u6": Codec("u6", ROW, "fp32"),
    "bi3": Codec("u3", 16, "bf16", least=True, offsets=True),
    "k4": Codec("u4", 256, "fp16", offsets=True),
    "k6": Codec("u6", 256, "fp16", offsets=True),
    "k6s": Codec("s6", 256, "fp16", signed=True),
    "k8s": Codec("s8", 256, "fp16", signed=True),
}
"""`nv`: NVFP4's; `dq`: QLoRA's double quantization; `u4`, `u6`: VS-Quant's; `bi3`: SpQR's; `k…`: llama.cpp's
K-quants', by super-block."""
