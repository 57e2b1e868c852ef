"""`Format`: how a linear's weight is stored *and computed*, weight code and activation rule together. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

DENSE_DTYPES = ("fp32", "bf16", "fp16")
WEIGHT_BITS = (2, 3, 4, 8)
_NAME = re.compile(r"w(?P<bits>\d+)a(?P<act>8|16)(?P<token>-token)?(?:-g(?P<group>\d+))?(?P<asym>-asym)?")


@dataclass(frozen=True, order=True)
class Format:
    """A number format of a linear layer.

    dense: the dtype of an unquantized weight (`fp32`, `bf16`, `fp16`) or "" for an integer grid.
    bits: bits of a weight code (16 or 32 for dense).
    group: consecutive inputs that share a scale; -1 is one scale a channel (output row).
    symmetric: the grid is `scale * (u - 2**(bits-1))`; otherwise `scale * u + offset` with a bf16 offset a group.
    act_bits: 16 leaves activations alone; 8 rounds them dynamically to int8.
    act_group: inputs that share an activation scale, a token; -1 is one scale a token.
    """

    bits: int
    group: int = -1
    symmetric: bool = True
    act_bits: int = 16
    act_group: int = -1
    dense: str = ""

    def __post_init__(self) -> None:
        if self.dense:
            if self.dense not in DENSE_DTYPES:
                raise ValueError(f"format: dense={self.dense!r}; use one of {DENSE_DTYPES}")
            return
        if self.bits not in WEIGHT_BITS:
            raise ValueError(f"format: bits={self.bits}; integer grids have {WEIGHT_BITS} bits")
        if self.group != -1 and (self.group < 16 or self.group % 16):
            raise ValueError(f"format: group={self.group}; use a multiple of 16, or -1 for one scale a channel")
        if self.act_bits not in (8, 16):
            raise ValueError(f"format: act_bits={self.act_bits}; use 8 or 16")
        if self.act_group not in (-1, self.group):
            raise ValueError(f"format: act_group={self.act_group}; use -1 (a token) or the weight's group={self.group}")

    @property
    def name(self) -> str:
        """`bf16`, `w4a8-g64`, `w8a8-token`, `w4a16-g32-asym`, …; `parse_format` reads it back.

        `w4a8-g64` rounds activations per token and group of 64; `w4a8-token-g64` per token.
        """
        if self.dense:
            return self.dense
        token = "-token" if self.act_bits == 8 and self.act_group == -1 else ""
        group = f"-g{self.group}" if self.group != -1 else ""
        return f"w{self.bits}a{self.act_bits}{token}{group}{'' if self.symmetric else '-asym'}"

    @property
    def levels(self) -> int:
        """How many values a weight can take within its group."""
        return int(2**self.bits)

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code; symmetric 8 bits leave out -128, which int8 kernels that use |u| cannot hold."""
        return int(self.symmetric and self.bits == 8), self.levels - 1

    def groups(self, d_in: int) -> int:
        """Number of groups of a row; raises ValueError where the group does not divide it."""
        size = self.group_size(d_in)
        return d_in // size

    def group_size(self, d_in: int) -> int:
        """The group in inputs, with -1 resolved; raises ValueError where it does not divide `d_in`."""
        if self.dense or self.group == -1:
            return d_in
        if d_in % self.group:
            divisors = [g for g in (16, 32, 48, 64, 96, 128, 192, 256) if d_in % g == 0]
            raise ValueError(f"{self.name}: group={self.group} does not divide d_in={d_in}; use one of {divisors or [-1]}")
        return self.group

    def divides(self, d_in: int) -> bool:
        """Whether the group divides a row of `d_in` inputs."""
        return bool(self.dense) or self.group == -1 or d_in % self.group == 0

    def bits_per_weight(self, d_in: int) -> float:
        """Stored bits a weight, scales and offsets (16 bits each) included."""
        if self.dense:
            return float(self.bits)
        return self.bits + (16 if self.symmetric else 32) / self.group_size(d_in)


def parse_format(name: str) -> Format:
    """The format of a name; raises ValueError with the grammar on anything else."""
    if name in DENSE_DTYPES:
        return Format(bits=32 if name == "fp32" else 16, dense=name)
    match = _NAME.fullmatch(name)
    if not match or (match["token"] and match["act"] == "16"):
        raise ValueError(
            f"unknown format {name!r}; write {', '.join(DENSE_DTYPES)} or w<bits>a<8|16>[-token][-g<group>][-asym], e.g. w4a8-g64"
        )
    group = int(match["group"] or -1)
    act_bits = int(match["act"])
    act_group = -1 if act_bits == 16 or match["token"] else group
    result = Format(int(match["bits"]), group, not match["asym"], act_bits, act_group)
    if result.name != name:
        raise ValueError(f"format {name!r} is written {result.name!r}")
    return result
