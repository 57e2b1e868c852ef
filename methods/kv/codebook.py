"""Codecs with codebooks instead of even steps: kvquant's keys and values, and turbo."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from methods.hadamard import random_signs
from methods.kv.codecs import HALF_MAX, Parts, head_hadamard
from methods.kv.format import n_outliers
from methods.kv.packing import pack_rows, unpack_rows


@dataclass(frozen=True)
class Codebook:
    """levels: (2**bits,) ascending, which codes are chosen by; decoded: what they are read as, the levels unless re-normalised."""

    levels: Tensor
    decoded: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.levels.numel()).bit_length() - 1

    def encode(self, z: Tensor) -> Tensor:
        """Packed codes (..., n * bits / 8) of the nearest levels to z (..., n)."""
        levels = self.levels.to(z.device)
        codes = torch.bucketize(z.contiguous(), (levels[1:] + levels[:-1]) / 2)
        return pack_rows(codes.to(torch.uint8), self.bits)

    def decode(self, packed: Tensor) -> Tensor:
        """(..., n) fp32."""
        decoded: Tensor = self.decoded.to(packed.device)[unpack_rows(packed, self.bits).int()]
        return decoded


@dataclass(frozen=True)
class ChannelCodebook:
    """KVQuant's keys: fixed range per channel, low and high (h, 1, d) fp32, a codebook of the range, a token's outliers beside it.

    A token keeps as many elements as the fraction says, those furthest outside their channel's range, so that every token takes the
    same room; the paper keeps whatever is outside, which is that many on average. Hooper 2024, sections 3.1 to 3.4.
    """

    book: Codebook
    low: Tensor
    high: Tensor
    unit: int = 1

    def encode(self, x: Tensor, start: int) -> Parts:
        middle, half = self._range(x)
        z = (x.float() - middle) / half
        rows = _as_rows(z)
        index = rows.abs().topk(n_outliers(rows.shape[-1]), -1).indices
        return {"codes": self.book.encode(z), **_outliers(_as_rows(x.float()), index)}

    def decode(self, parts: Parts, start: int) -> Tensor:
        z = self.book.decode(parts["codes"])
        middle, half = self._range(z)
        return _with_outliers(z * half + middle, parts)

    def _range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.low.to(like.device), self.high.to(like.device)
        return (high + low) / 2, ((high - low) / 2).clamp_min(1e-8)


@dataclass(frozen=True)
class TokenCodebook:
    """KVQuant's values: each token's own range over all heads, found without its outliers; a codebook of the range."""

    book: Codebook
    unit: int = 1

    def encode(self, x: Tensor, start: int) -> Parts:
        rows = _as_rows(x.float())
        index = (rows - rows.mean(-1, keepdim=True)).abs().topk(n_outliers(rows.shape[-1]), -1).indices
        span = inner_range(rows, index).clamp(-HALF_MAX, HALF_MAX).half()
        middle, half = _middle(span)
        codes = self.book.encode(_as_heads((rows - middle) / half, x.shape[1]))
        return {"codes": codes, "range": span[:, None], **_outliers(rows, index)}

    def decode(self, parts: Parts, start: int) -> Tensor:
        middle, half = _middle(parts["range"])
        return _with_outliers(self.book.decode(parts["codes"]) * half + middle, parts)


@dataclass(frozen=True)
class Turbo:
    """A head's vector as its length (fp16) and the codes of its direction after a random rotation, whose entries are near normal.

    TurboQuant (Zandieh 2025), algorithm 1, with random signs and a Hadamard matrix for the paper's dense random rotation.
    """

    bits: int
    unit: int = 1

    def encode(self, x: Tensor, start: int) -> Parts:
        x, dim = x.float(), x.shape[-1]
        norm = x.norm(dim=-1, keepdim=True).clamp(max=HALF_MAX).half()
        z = head_hadamard(x * _signs(dim, x.device)) * (dim**0.5 / norm.float().clamp_min(1e-8))
        return {"codes": normal_codebook(self.bits).encode(z), "norm": norm}

    def decode(self, parts: Parts, start: int) -> Tensor:
        z = normal_codebook(self.bits).decode(parts["codes"])
        dim = z.shape[-1]
        length = parts["norm"].float().mul(dim**-0.5)
        return head_hadamard(z) * _signs(dim, z.device) * length


def _signs(dim: int, device: torch.device) -> Tensor:
    """(d,) random but fixed, the same for a dimension everywhere."""
    return random_signs(dim, torch.Generator().manual_seed(dim)).float().to(device)


@functools.cache
def normal_codebook(bits: int) -> Codebook:
    """The levels of least mean squared error for a standard normal variable: Lloyd's and Max's fixed point."""
    count = 2**bits
    levels = [2.5 * (2 * i + 1 - count) / count for i in range(count)]
    for _ in range(1000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        levels = [(_density(a) - _density(b)) / (_below(b) - _below(a)) for a, b in pairwise(edges)]
    found = torch.tensor(levels)
    return Codebook(found, found)


def inner_range(rows: Tensor, index: Tensor) -> Tensor:
    """Least and largest (..., 2) of rows (..., n) but for the elements at index (..., k)."""
    low = rows.scatter(-1, index, math.inf).amin(-1)
    high = rows.scatter(-1, index, -math.inf).amax(-1)
    return torch.stack((low, high), -1)


def _middle(span: Tensor) -> tuple[Tensor, Tensor]:
    low, high = span.float()[..., :1], span.float()[..., 1:]
    return (high + low) / 2, ((high - low) / 2).clamp_min(1e-8)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _as_rows(x: Tensor) -> Tensor:
    """(b, h, t, d) -> (b, t, h * d)."""
    return x.transpose(1, 2).flatten(2)


def _as_heads(rows: Tensor, heads: int) -> Tensor:
    """(b, t, h * d) -> (b, h, t, d)."""
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def _outliers(rows: Tensor, index: Tensor) -> dict[str, Tensor]:
    values = rows.gather(-1, index).clamp(-HALF_MAX, HALF_MAX).half()
    return {"outlier": values[:, None], "index": index.to(torch.int16)[:, None]}


def _with_outliers(dense: Tensor, parts: Parts) -> Tensor:
    rows = _as_rows(dense)
    rows = rows.scatter(-1, parts["index"][:, 0].long(), parts["outlier"][:, 0].to(rows.dtype))
    return _as_heads(rows, dense.shape[1])
