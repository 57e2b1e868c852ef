"""`Format`: how a linear's weight is stored *and computed*, weight code and activation rule together. Imports no torch."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from methods.formats.codecs import CODECS, Codec
from methods.formats.elements import BITS, LOOKED_UP, MINIFLOATS, OWN_LEVELS, levels

DENSE_DTYPES = ("fp32", "bf16", "fp16")
ACT_BITS = (4, 6, 8, 16)
_ACT_CODECS = ("fp16", "e8m0", "nv")
_NAME = re.compile(
    r"(?P<weight>e\dm\d|[a-z]+?(?P<bits>\d+))a(?P<act>\d+|e\dm\d)(?P<share>-token|-tensor|-super)?"
    rf"(?:-g(?P<group>\d+)|-b(?P<rows>\d+)x(?P<cols>\d+)|(?P<whole>-whole))?(?:-(?P<codec>{'|'.join(CODECS)}))?(?P<asym>-asym)?"
)
_DENSE = re.compile(rf"(?P<dense>{'|'.join(DENSE_DTYPES)})(?:-s(?P<zeros>\d+)|-(?P<few>\d+)of(?P<every>\d+)|-r(?P<rank>\d+))?")
_LATTICE = re.compile(r"iq[123]_\w+")
GRAMMAR = (
    "<element>a<act>[-token|-tensor|-super][-g<group>|-b<rows>x<group>|-whole][-<codec>][-asym] with the elements "
    "w2…w8, e4m3, e5m2, e3m2, e2m3, e2m1, nf3, nf4, nl4, tern2, bin1, bcq1…bcq4, lut2…lut4, the activations 16, 8, 6, 4 or a minifloat "
    f"and the scale codecs {', '.join(CODECS)}, e.g. w4a8-g64; or <dtype>[-s<per cent of zeros>|-<n>of<m>|-r<rank>], e.g. "
    "bf16-s90, bf16-2of4, bf16-r64"
)


@dataclass(frozen=True, order=True)
class Format:
    """A number format of a linear layer: value = scale * level[code] (+ offset).

    dense: the dtype of an unquantized weight (`fp32`, `bf16`, `fp16`) or "" for a grid.
    bits: stored bits of a weight code (16 or 32 for dense).
    group: consecutive inputs that share a scale; -1 is all of them. rows: consecutive outputs that share it; -1 is all of them.
    symmetric: there is no offset; an integer grid is then `scale * (u - 2**(bits-1))`, otherwise `scale * u + offset`.
    element: what codes stand for, of `methods.formats.elements.BITS`. codec: how scales are stored, of `methods.formats.codecs.CODECS`.
    act_bits: 16 leaves activations alone; fewer round them, by default dynamically and symmetrically.
    act_group: inputs that share an activation scale; -1 is all of them. act_rows: 1, a scale a token, or -1, one for all tokens at
    hand. act_element: `int` or a minifloat.
    zeros: of a dense dtype, the per cent of its weights, at least, that are zero, wherever they lie, or with `every` that share of so
    many neighbouring inputs: zeros=50, every=4 is 2:4. rank: of a dense dtype, that of a
    weight which is kept as the product of two factors; 0 is one matrix.
    """

    bits: int
    group: int = -1
    symmetric: bool = True
    act_bits: int = 16
    act_group: int = -1
    dense: str = ""
    element: str = "int"
    rows: int = 1
    codec: str = "bf16"
    act_element: str = "int"
    act_rows: int = 1
    zeros: int = 0
    rank: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        _check_thinned(self)
        if self.dense:
            return
        _check_element(self)
        _check_layout(self)
        _check_activations(self)

    @property
    def name(self) -> str:
        """`bf16`, `w4a8-g64`, `w8a8-token`, `w4a16-g32-asym`, `nvfp4a16`, `q4_k`, `bf16-s90`, …; `parse_format` reads it back.

        `w4a8-g64` rounds activations per token and group of 64; `w4a8-token-g64` per token; `w8a8-tensor` all tokens alike.
        """
        if self.dense:
            zeros = f"-{self.kept(1, self.every)}of{self.every}" if self.every else f"-s{self.zeros}" if self.zeros else ""
            return f"{self.dense}{zeros}{f'-r{self.rank}' if self.rank else ''}"
        return _NAME_OF.get(self) or _written(self)

    @property
    def levels(self) -> int:
        """How many values a weight can take within its group, a few of which may coincide or be no numbers."""
        return len(levels(self.element, self.bits)) or int(2**self.bits)

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code; symmetric 8 bits leave out -128, which int8 kernels that use |u| cannot hold."""
        return int(self.symmetric and self.bits == 8 and self.element == "int"), self.levels - 1

    @property
    def integer(self) -> bool:
        """Whether weights lie on integer grids with bf16 scales a channel or a group."""
        return not self.dense and (self.element, self.codec, self.rows) == ("int", "bf16", 1)

    @property
    def lopsided(self) -> bool:
        """Whether a symmetric grid has a longer side, which a scale's sign turns to where a group reaches furthest."""
        longer = (self.element == "int" and self.bits < 8) or self.element == "nl"
        return self.symmetric and self.scales.signed and longer

    @property
    def plain(self) -> bool:
        """Whether it is integer, of 2, 3, 4 or 8 bits, with inputs left alone or rounded to int8 by token: what our kernels know."""
        return (
            self.integer
            and self.bits in (2, 3, 4, 8)
            and self.act_bits in (8, 16)
            and (self.act_element, self.act_rows) == ("int", 1)
        )

    @property
    def looked_up(self) -> bool:
        """Whether codes are places in a fixed table of at most 16 levels, by row, with inputs as in `plain`: what our look-up kernels know.

        Scales are bf16 numbers; where they are stored as powers of two, those of the inputs would be as well, so that these are left alone.
        """
        rounded = (self.act_bits, self.act_element, self.act_rows, self.codec) == (8, "int", 1, "bf16")
        table = self.element in LOOKED_UP and self.bits in (2, 3, 4)
        return (
            not self.dense and table and self.rows == 1 and self.codec in ("bf16", "e8m0") and (self.act_bits == 16 or rounded)
        )

    @property
    def thinned(self) -> bool:
        """Whether it is a dense dtype of fewer numbers than the weight has places: with zeros, or of low rank."""
        return bool(self.zeros or self.rank)

    @property
    def by_rows(self) -> bool:
        """Whether rows are stored apart, so that weights can be fitted and kept one below the other."""
        if self.dense:
            return not self.rank
        return self.rows == 1 and self.scales.by_rows

    @property
    def lifts(self) -> bool:
        """Whether every row can be multiplied by a power of two of its own, in what it stores beside its codes."""
        return self.by_rows or bool(self.rank)

    @property
    def scales(self) -> Codec:
        """The codec of the scales."""
        return CODECS[self.codec]

    @property
    def act_codec(self) -> str:
        """How an activation's scale is stored: as the weight's where that is `fp16`, `e8m0` or `nv`, otherwise in fp32."""
        return self.codec if self.codec in _ACT_CODECS else "fp32"

    @property
    def activation(self) -> tuple[str, int, int, int, str]:
        """The rule by which inputs are rounded: formats with equal ones round them alike."""
        return self.act_element, self.act_bits, self.act_group, self.act_rows, self.act_codec

    @property
    def widths(self) -> dict[str, int]:
        """Bits of the payload parts that are uint8 codes of fewer than eight, by part."""
        narrow = {"codes": self.bits}
        if not self.dense and self.scales.width < 8:
            narrow |= {"scale": self.scales.width, "offset": self.scales.width}
        return narrow

    @property
    def unit(self) -> int:
        """What the number of inputs has to be a multiple of."""
        if self.dense:
            return self.every or 1
        return math.lcm(*(size for size in (self.group, self.act_group, self.scales.inputs) if size > 0))

    def groups(self, d_in: int) -> int:
        """Number of groups of a row; raises ValueError where the group does not divide it."""
        size = self.group_size(d_in)
        return d_in // size

    def group_size(self, d_in: int) -> int:
        """The group in inputs, with -1 resolved; raises ValueError where it does not divide `d_in`."""
        if not self.divides(d_in):
            divisors = [g for g in (16, 32, 48, 64, 96, 128, 192, 256) if d_in % g == 0]
            way = f"use one of {divisors or [-1]}" if self.unit == self.group else "use another format"
            raise ValueError(f"{self.name}: group={self.unit} does not divide d_in={d_in}; {way}")
        return d_in if self.dense or self.group == -1 else self.group

    def divides(self, d_in: int) -> bool:
        """Whether groups and super-blocks divide a row of `d_in` inputs."""
        return d_in % self.unit == 0

    def blocks(self, d_out: int) -> int:
        """How many sets of rows share scales; the last may be smaller."""
        return 1 if self.rows == -1 else -(-d_out // self.rows)

    def overhead_bits(self, d_out: int, d_in: int) -> int:
        """Bits that a weight's scales, offsets and levels take, of every level of storage; of zeros, what tells where the others are.

        That is, as the `csr` kernel has it, 16 bits for the column of each and 32 for where a row begins; with `every`, its place there.
        """
        if self.every:
            return math.ceil(math.log2(self.every)) * self.kept(d_out, d_in)
        if self.dense:
            return 16 * self.kept(d_out, d_in) + 32 * (d_out + 1) if self.zeros else 0
        n_blocks, n_groups = self.blocks(d_out), self.groups(d_in)
        sets = n_blocks * n_groups
        offset = 0 if self.symmetric else 1
        if self.element in OWN_LEVELS:
            return sets * 16 * ((self.bits if self.element == "bcq" else self.levels) + offset)
        return (sets * self.scales.width + self.scales.second_bits(n_blocks, n_groups, d_in)) * (1 + offset)

    def bits_per_weight(self, d_in: int, d_out: int | None = None) -> float:
        """Stored bits a weight, scales and offsets of every level included.

        d_out: the number of outputs matters where they share scales; None is a weight of very many.
        """
        n_rows = d_out or (1 if self.by_rows and not self.zeros else 2**30)
        places = n_rows * d_in
        return self.bits * (self.kept(n_rows, d_in) / places) + self.overhead_bits(n_rows, d_in) / places

    def kept(self, d_out: int, d_in: int) -> int:
        """Numbers stored for the weights themselves: those of both factors, or as many as may be other than zero."""
        if self.rank:
            return self.rank * (d_out + d_in)
        return d_out * d_in * (100 - self.zeros) // 100


def _check_thinned(fmt: Format) -> None:
    if fmt.dense and fmt.dense not in DENSE_DTYPES:
        raise ValueError(f"format: dense={fmt.dense!r}; use one of {DENSE_DTYPES}")
    if not fmt.dense and fmt.thinned:
        raise ValueError(
            f"format: zeros={fmt.zeros}, rank={fmt.rank} with a grid; only {', '.join(DENSE_DTYPES)} have zeros or a rank"
        )
    if fmt.zeros and fmt.rank:
        raise ValueError(f"format: zeros={fmt.zeros} with rank={fmt.rank}; use one of them")
    if fmt.every and (fmt.every < 2 or not fmt.zeros or fmt.every * fmt.zeros % 100):
        raise ValueError(
            f"format: zeros={fmt.zeros} of every={fmt.every}; use a whole number of some neighbouring inputs, such as 2of4"
        )
    if not 0 <= fmt.zeros < 100 or fmt.rank < 0:
        raise ValueError(f"format: zeros={fmt.zeros}, rank={fmt.rank}; use 1 to 99 per cent, or a rank above 0")


def _check_element(fmt: Format) -> None:
    if fmt.element not in BITS:
        raise ValueError(f"format: element={fmt.element!r}; use one of {', '.join(BITS)}")
    if fmt.bits not in BITS[fmt.element]:
        kind = "integer grids" if fmt.element == "int" else f"{fmt.element} codes"
        raise ValueError(f"format: bits={fmt.bits}; {kind} have {BITS[fmt.element]} bits")
    if fmt.codec not in CODECS:
        raise ValueError(f"format: codec={fmt.codec!r}; use one of {', '.join(CODECS)}")
    if fmt.element in OWN_LEVELS and fmt.codec != "bf16":
        raise ValueError(f"format: codec={fmt.codec!r}; {fmt.element} stores levels in bf16 and no scales")
    if not fmt.symmetric and (fmt.element not in ("int", "bcq") or not fmt.scales.offsets):
        raise ValueError(f"format: {fmt.element} with {fmt.codec} scales has no offset; leave -asym out")


def _check_layout(fmt: Format) -> None:
    if fmt.group != -1 and (fmt.group < 16 or fmt.group % 16):
        raise ValueError(f"format: group={fmt.group}; use a multiple of 16, or -1 for one scale a channel")
    if fmt.rows < 1 and fmt.rows != -1:
        raise ValueError(f"format: rows={fmt.rows}; use 1, a number of rows that share a scale, or -1 for all of them")
    if fmt.rows == -1 and fmt.group != -1:
        raise ValueError(
            f"format: rows=-1 with group={fmt.group}; one scale for all rows is one for the whole weight, group=-1"
        )
    if fmt.rows != 1 and (fmt.scales.span or fmt.element == "bcq"):
        raise ValueError(f"format: rows={fmt.rows}; {fmt.element} with {fmt.codec} scales has scales of its own in every row")
    if fmt.scales.inputs and (fmt.group == -1 or fmt.scales.inputs % fmt.group):
        raise ValueError(f"format: group={fmt.group} with {fmt.codec} scales; use a divisor of {fmt.scales.inputs}")


def _check_activations(fmt: Format) -> None:
    if fmt.act_element not in ("int", *MINIFLOATS):
        raise ValueError(f"format: act_element={fmt.act_element!r}; use int or one of {', '.join(MINIFLOATS)}")
    allowed = ACT_BITS if fmt.act_element == "int" else BITS[fmt.act_element]
    if fmt.act_bits not in allowed:
        raise ValueError(f"format: act_bits={fmt.act_bits}; use one of {allowed} with {fmt.act_element}")
    if fmt.act_group not in (-1, fmt.group, fmt.scales.inputs or -1):
        raise ValueError(f"format: act_group={fmt.act_group}; use -1 (a token) or the weight's group={fmt.group}")
    if fmt.act_rows not in (1, -1) or (fmt.act_rows == -1 and fmt.act_group != -1):
        raise ValueError(f"format: act_rows={fmt.act_rows}; use 1 (a token), or -1 (all tokens) with act_group=-1")
    if fmt.act_bits == 16 and (fmt.act_group, fmt.act_rows) != (-1, 1):
        raise ValueError(f"format: act_group={fmt.act_group}, act_rows={fmt.act_rows} mean nothing with act_bits=16")


def _written(fmt: Format) -> str:
    weight = fmt.element if fmt.element in MINIFLOATS else f"{'w' if fmt.element == 'int' else fmt.element}{fmt.bits}"
    act = str(fmt.act_bits) if fmt.act_element == "int" else fmt.act_element
    share = ""
    if fmt.act_bits != 16:
        share = "-tensor" if fmt.act_rows == -1 else "-token" if fmt.act_group == -1 else ""
        share = share or ("" if fmt.act_group == fmt.group else "-super")
    layout = "" if fmt.group == -1 else f"-g{fmt.group}" if fmt.rows == 1 else f"-b{fmt.rows}x{fmt.group}"
    layout = "-whole" if fmt.rows == -1 else layout
    codec = "" if fmt.codec == "bf16" else f"-{fmt.codec}"
    return f"{weight}a{act}{share}{layout}{codec}{'' if fmt.symmetric else '-asym'}"


def parse_format(name: str) -> Format:
    """The format of a name; raises ValueError with the grammar on anything else."""
    if name in NAMED:
        return NAMED[name]
    if dense := _DENSE.fullmatch(name):
        return _spelled(_read_dense(dense), name)
    if _LATTICE.fullmatch(name):
        raise ValueError(
            f"format {name!r}: its codes are points of a lattice, one for eight weights, which no format here has; use q2_k, q3_k or iq4_xs"
        )
    match = _NAME.fullmatch(name)
    if not match or (match["share"] and match["act"] == "16"):
        near = difflib.get_close_matches(name, NAMED, 4) or list(NAMED)[:4]
        raise ValueError(
            f"unknown format {name!r}; write {', '.join(DENSE_DTYPES)}, a name such as {', '.join(near)}, or {GRAMMAR}"
        )
    return _spelled(_read(match), name)


def _spelled(fmt: Format, name: str) -> Format:
    if fmt.name != name:
        raise ValueError(f"format {name!r} is written {fmt.name!r}")
    return fmt


def _read_dense(match: re.Match[str]) -> Format:
    dense, every = match["dense"], int(match["every"] or 0)
    zeros, over = divmod(100 * (every - int(match["few"] or 0)), every) if every else (int(match["zeros"] or 0), 0)
    if over:
        raise ValueError(f"format {match[0]!r}: {match['few']} of {every} is no whole per cent; use such as 2of4, 1of4 or 4of8")
    return Format(32 if dense == "fp32" else 16, dense=dense, zeros=zeros, rank=int(match["rank"] or 0), every=every)


def _read(match: re.Match[str]) -> Format:
    weight, act, share = match["weight"], match["act"], match["share"]
    element = weight if weight in MINIFLOATS else weight.rstrip("0123456789")
    bits = BITS[weight][0] if weight in MINIFLOATS else int(match["bits"] or 0)
    group, codec = int(match["group"] or match["cols"] or -1), match["codec"] or "bf16"
    act_group = group if act != "16" and share is None else -1
    return Format(
        bits,
        group,
        not match["asym"],
        BITS[act][0] if act in MINIFLOATS else int(act) if act.isdigit() else 0,
        CODECS[codec].inputs if share == "-super" else act_group,
        element="int" if element == "w" else element,
        rows=-1 if match["whole"] else int(match["rows"] or 1),
        codec=codec,
        act_element="int" if act.isdigit() else act,
        act_rows=-1 if share == "-tensor" else 1,
    )


def _gguf() -> dict[str, Format]:
    """llama.cpp's types: its products round activations to int8, 32 inputs and an fp16 scale, or 256 and an fp32 one for K-quants."""
    table = {f"q{bits}_0": Format(bits, 32, True, 8, 32, codec="fp16") for bits in (4, 5, 8)}
    table |= {f"q{bits}_1": Format(bits, 32, False, 8, 32, codec="fp16") for bits in (4, 5)}
    table["q2_k"] = Format(2, 16, False, 8, 256, codec="k4")
    table["q3_k"] = Format(3, 16, True, 8, 256, codec="k6s")
    table |= {f"q{bits}_k": Format(bits, 32, False, 8, 256, codec="k6") for bits in (4, 5)}
    table["q6_k"] = Format(6, 16, True, 8, 256, codec="k8s")
    table["iq4_nl"] = Format(4, 32, True, 8, 32, element="nl", codec="fp16")
    table["iq4_xs"] = Format(4, 32, True, 8, 256, element="nl", codec="k6s")
    return table


def _microscaling() -> dict[str, Format]:
    """OCP's block formats and NVIDIA's: weights alone (`a16`) and with activations in the same kind of blocks, rounded dynamically."""
    names = {"e2m1": "mxfp4", "e2m3": "mxfp6e2m3", "e3m2": "mxfp6e3m2", "e4m3": "mxfp8", "e5m2": "mxfp8e5m2"}
    table = {}
    for element, name in names.items():
        bits = BITS[element][0]
        table[f"{name}a16"] = Format(bits, 32, element=element, codec="e8m0")
        table[f"{name}a{bits}"] = Format(bits, 32, True, bits, 32, element=element, codec="e8m0", act_element=element)
    table["mxfp4a8"] = Format(4, 32, True, 8, 32, element="e2m1", codec="e8m0", act_element="e4m3")
    table["nvfp4a16"] = Format(4, 16, element="e2m1", codec="nv")
    table["nvfp4a4"] = Format(4, 16, True, 4, 16, element="e2m1", codec="nv", act_element="e2m1")
    return table


NAMED: Mapping[str, Format] = {
    "fp8-tensor": Format(8, -1, True, 8, element="e4m3", rows=-1, codec="fp32", act_element="e4m3", act_rows=-1),
    "fp8-token": Format(8, -1, True, 8, element="e4m3", act_element="e4m3"),
    "fp8-block": Format(8, 128, True, 8, 128, element="e4m3", rows=128, codec="fp32", act_element="e4m3"),
    **_microscaling(),
    "nf4": Format(4, 64, element="nf", codec="fp32"),
    "nf4-dq": Format(4, 64, element="nf", codec="dq"),
    **_gguf(),
}
"""Formats that are known by a name of their own: FP8 as it is served, MX and NV blocks, bitsandbytes' NF4, llama.cpp's types."""

_NAME_OF = {fmt: name for name, fmt in NAMED.items()}
