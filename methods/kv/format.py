"""`CacheFormat`: how keys and values of past tokens are stored. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from methods.model.structure import Structure

Kind = Literal["dense", "fp8", "int", "kivi", "kvquant", "turbo"]
Scale = Literal["token", "head", "tensor"]

DENSE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
BITS: dict[str, tuple[int, ...]] = {"int": (2, 3, 4, 8), "kivi": (2, 3, 4, 8), "kvquant": (2, 3, 4), "turbo": (2, 3, 4)}
OUTLIERS = 0.01
"""Elements of a token that kvquant keeps in 16 bits, on either side."""

_NAME = re.compile(
    r"kv-(?:(?P<dense>fp32|bf16|fp16)|fp8(?:-(?P<scale>head|tensor))?"
    r"|(?P<kind>int|kivi|kvquant|turbo)(?:(?P<bits>\d)|-k(?P<keys>\d)v(?P<values>\d))(?:-g(?P<group>\d+))?)"
    r"(?P<smooth>-smooth)?(?P<rot>-rot)?(?:-w(?P<window>\d+))?(?:-s(?P<sinks>\d+))?"
)


@dataclass(frozen=True, order=True)
class CacheFormat:
    """How a cache stores past keys and values. The tokens of the call at hand are always attended in full precision.

    kind: `dense`: cast to the dtype `dense`. `fp8`: E4M3, a scale for each `scale`: a token's head (dynamic), a layer's head or a
    layer (both calibrated). `int`: per token, scale and offset for every `group` channels of a head (-1: all of them). `kivi`: keys per
    channel in groups of `group` tokens, values per token in groups of `group` channels. `kvquant`: calibrated codebooks, keys before
    the rotary embedding and per channel, values per token, 1 % of a token's elements in 16 bits. `turbo`: rotated unit vectors on the
    best codebook of a normal distribution.
    smooth: a calibrated shift and scale per channel before rounding. rotated: heads are rotated by a Hadamard matrix first (kivi:
    values only). window: newest tokens kept as the model computes them; kivi's keys leave it all at once when it is full, everything
    else token by token. sinks: first tokens kept likewise. What has been rounded is never rounded again.
    """

    kind: Kind
    key_bits: int = 16
    value_bits: int = 16
    group: int = -1
    smooth: bool = False
    rotated: bool = False
    window: int = 0
    sinks: int = 0
    scale: Scale = "token"
    dense: str = ""

    def __post_init__(self) -> None:
        reason = self._shape_fault() or self._bits_fault() or self._option_fault()
        if reason:
            raise ValueError(f"cache format {self.kind}: {reason}")

    def _shape_fault(self) -> str | None:
        if self.window < 0 or self.sinks < 0:
            return f"window={self.window}, sinks={self.sinks}; neither can be negative"
        if self.kind == "kivi" and (self.group < 8 or self.group % 8):
            return f"group={self.group}; use a multiple of 8"
        if self.kind == "kivi" and self.window % self.group:
            return f"window={self.window} is no multiple of group={self.group}; keys leave it in whole groups"
        if self.group != -1 and self.kind not in ("int", "kivi"):
            return f"group={self.group} has no meaning; only int and kivi have groups"
        return f"group={self.group}; use -1 or a multiple of 8" if self.group != -1 and self.group % 8 else None

    def _bits_fault(self) -> str | None:
        bits = (self.key_bits, self.value_bits)
        if self.kind == "dense":
            known = DENSE_BITS.get(self.dense)
            return None if known and bits == (known, known) else f"dense={self.dense!r}, bits={bits}; use one of {DENSE_BITS}"
        if self.dense:
            return f"dense={self.dense!r} has no meaning"
        allowed = (8,) if self.kind == "fp8" else BITS[self.kind]
        return None if set(bits) <= set(allowed) else f"bits={bits}; use one of {allowed}"

    def _option_fault(self) -> str | None:
        if self.scale != "token" and self.kind != "fp8":
            return f"scale={self.scale!r} has no meaning; only fp8 has scales of a head or tensor"
        if self.smooth and self.kind != "int":
            return "only int can be smoothed"
        if self.rotated and self.kind not in ("int", "kivi"):
            return "only int and kivi can be rotated"
        if self.smooth and self.rotated:
            return "smooth and rotated are two ways to spread outlier channels; use one of them"
        if self.kind == "dense" and (self.window or self.sinks):
            return "window and sinks keep full precision, which dense keeps everywhere"
        return None

    @property
    def name(self) -> str:
        """`kv-bf16`, `kv-fp8`, `kv-int4-g64`, `kv-int-k8v4-rot`, `kv-kivi2-g32-w128`, `kv-kvquant3-s1`, …

        `parse_cache_format` reads it back.
        """
        if self.kind == "dense":
            body = self.dense
        elif self.kind == "fp8":
            body = "fp8" if self.scale == "token" else f"fp8-{self.scale}"
        else:
            split = self.key_bits != self.value_bits
            body = f"{self.kind}-k{self.key_bits}v{self.value_bits}" if split else f"{self.kind}{self.key_bits}"
        options = (
            (f"-g{self.group}", self.group != -1),
            ("-smooth", self.smooth),
            ("-rot", self.rotated),
            (f"-w{self.window}", self.window > 0),
            (f"-s{self.sinks}", self.sinks > 0),
        )
        return f"kv-{body}" + "".join(text for text, present in options if present)

    @property
    def calibrated(self) -> bool:
        """Whether a cache of the format needs a `methods.kv.calibrate.Calibration` of its model."""
        return self.kind == "kvquant" or self.smooth or self.scale != "token"

    @property
    def key_block(self) -> int:
        """Tokens whose keys are rounded together."""
        return max(self.window, self.group) if self.kind == "kivi" else 1

    def refuses(self, structure: Structure) -> str | None:
        """Why a model's cache cannot have the format, or None."""
        dim, width = structure.head_dim, structure.n_kv_heads * structure.head_dim
        if self.kind in ("dense", "fp8"):
            return None
        if dim % 8:
            return f"{self.name}: heads of {dim} channels; packed rows of whole bytes need a multiple of 8"
        if self.group != -1 and dim % self.group:
            divisors = [g for g in (8, 16, 32, 64, 128) if dim % g == 0]
            return f"{self.name}: group={self.group} does not divide head_dim={dim}; use one of {divisors}"
        if self.kind == "kvquant" and width > 2**15:
            return f"{self.name}: {width} channels of a token; outliers have 16-bit indices, up to {2**15}"
        return None

    def token_bytes(self, structure: Structure, side: Literal["keys", "values"]) -> float:
        """Bytes that one packed token takes in one layer, scales, offsets and outliers included."""
        heads, dim = structure.n_kv_heads, structure.head_dim
        width = heads * dim
        bits = self.key_bits if side == "keys" else self.value_bits
        codes = width * bits / 8
        if self.kind == "fp8":
            return codes + (2 * heads if self.scale == "token" else 0)
        if self.kind in ("int", "kivi"):
            return codes + 4 * width / (dim if self.group == -1 else self.group)
        if self.kind == "kvquant":
            return codes + 4 * n_outliers(width) + (4 if side == "values" else 0)
        return codes + (2 * heads if self.kind == "turbo" else 0)

    def split(self, context: int, side: Literal["keys", "values"], sliding: int | None = None) -> tuple[int, int]:
        """Tokens (in full precision, packed) that a layer holds after `context` tokens; sliding: its attention window, if it has one.

        A layer with a sliding window drops what left it, but neither parts of a group nor the newest tokens that are still to be packed.
        """
        sinks = min(self.sinks, context)
        past = context - sinks
        block = self.key_block if side == "keys" else 1
        packed = past // block * block if block > 1 else max(0, past - self.window)
        left = max(0, context - (sliding - 1)) if sliding else 0
        unit = self.group if side == "keys" and self.kind == "kivi" else 1
        gone = min(packed, max(0, left - sinks) // unit * unit)
        return context - packed - min(left, sinks), packed - gone

    def size_bytes(self, structure: Structure, batch: int, context: int, sliding: Sequence[int | None] = ()) -> int:
        """Bytes of a whole cache after `context` tokens a sequence, without the calibration, which is a constant of the model.

        sliding: each layer's attention window or None; empty means that no layer has one. What stays in full precision is counted in
        the structure's dtype. Exact, but for grouped keys that a beam search or crop left behind.
        """
        width = structure.n_kv_heads * structure.head_dim * DENSE_BITS[structure.dtype] / 8
        total = 0.0
        for window in sliding or (None,) * len(structure.blocks):
            for side in ("keys", "values"):
                kept, packed = self.split(context, side, window)
                total += kept * width + packed * self.token_bytes(structure, side)
        return round(batch * total)

    def bits_per_element(self, structure: Structure, context: int) -> float:
        """Mean stored bits of a key or value after `context` tokens, everything included, where no layer slides."""
        elements = 2 * len(structure.blocks) * structure.n_kv_heads * structure.head_dim * context
        return 8 * self.size_bytes(structure, 1, context) / elements


def n_outliers(width: int) -> int:
    """Elements of a token of `width` channels that kvquant keeps in 16 bits."""
    return max(1, round(OUTLIERS * width))


def parse_cache_format(name: str) -> CacheFormat:
    """The format of a name; raises ValueError with the grammar on anything else."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"unknown cache format {name!r}; write kv-bf16, kv-fp8[-head|-tensor], or kv-<int|kivi|kvquant|turbo><bits>[-g<group>]"
            "[-smooth][-rot][-w<window>][-s<sinks>] with -k<bits>v<bits> for bits that differ, e.g. kv-int-k8v4-g64"
        )
    dense: str = match["dense"] or ""
    kind: Kind = "dense" if dense else match["kind"] or "fp8"  # type: ignore[assignment]
    scale: Scale = match["scale"] or "token"  # type: ignore[assignment]
    both = DENSE_BITS.get(dense) or int(match["bits"] or 8)
    found = CacheFormat(
        kind,
        int(match["keys"] or both),
        int(match["values"] or both),
        int(match["group"] or -1),
        bool(match["smooth"]),
        bool(match["rot"]),
        int(match["window"] or 0),
        int(match["sinks"] or 0),
        scale,
        dense,
    )
    if found.name != name:
        raise ValueError(f"cache format {name!r} is written {found.name!r}")
    return found
