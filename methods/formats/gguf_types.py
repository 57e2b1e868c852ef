"""Which of GGML's tensor types holds the weights of a format bit for bit, so that llama.cpp computes with them. Imports no torch.

Types whose codes are points of a lattice (IQ1, IQ2, IQ3: one code for eight weights and their signs) are in no format here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from methods.formats.format import NAMED, Format

TYPES: Mapping[str, Format] = MappingProxyType(
    {
        **{
            name.upper(): NAMED[name]
            for name in (
                *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
                *("iq4_nl", "iq4_xs"),
            )
        },
        "MXFP4": NAMED["mxfp4a16"],
    }
)
"""A format that each type stores; its blocks are as wide as the group, or as the super-block of groups."""

DENSE_TYPES: Mapping[str, str] = MappingProxyType({"fp32": "F32", "fp16": "F16", "bf16": "BF16"})
"""The type of weights that are left alone, by their dtype."""

_INTEGERS = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
SMALLEST = 32
"""Inputs of a block of the types without super-blocks."""


def block_type(fmt: Format) -> str | None:
    """The name of the GGML type that stores the format's weights, or None; `refuses` says why.

    Integers with float scales are those of the 32-wide types: every block of a larger group repeats its scale. Their bf16 scales have to
    fit fp16, which only the weight can show (`methods.formats.gguf_blocks.pack_blocks`). Activation rules are not compared.
    """
    if fmt.dense:
        return None if fmt.thinned else DENSE_TYPES[fmt.dense]
    for name, own in TYPES.items():
        if _code(own) == _code(fmt):
            return name
    floats = (fmt.element, fmt.rows) == ("int", 1) and fmt.codec in ("bf16", "fp16")
    if floats and (fmt.group == -1 or fmt.group % SMALLEST == 0):
        return _INTEGERS.get((fmt.bits, fmt.symmetric))
    return None


def refuses(fmt: Format, d_in: int) -> str | None:
    """Why no type of GGML's stores rows of `d_in` inputs in the format, and what to use instead; None where one does."""
    name = block_type(fmt)
    if name:
        size = block_size(name)
        return f"{name} has blocks of {size} inputs, which {d_in} inputs do not fill" if d_in % size else None
    if (fmt.element, fmt.codec, fmt.rows) != ("int", "bf16", 1):
        return f"no GGML type stores {fmt.name}; use one of {', '.join(name.lower() for name in TYPES)}"
    if (fmt.bits, fmt.symmetric) not in _INTEGERS:
        grid = f"{'symmetric' if fmt.symmetric else 'asymmetric'} {fmt.bits}-bit integers"
        return f"no GGML type has {grid} with float scales; use 4 or 5 bits, symmetric 8 bits, or q2_k, q3_k, q6_k"
    return f"GGML's blocks are of {SMALLEST} inputs, which group={fmt.group} does not fill; use a multiple of {SMALLEST}"


def block_size(name: str) -> int:
    """Consecutive inputs of a type's block: rows have to be a multiple of it. 1 for the dense types."""
    if name in DENSE_TYPES.values():
        return 1
    own = TYPES[name]
    return max(own.group, own.scales.span)


def input_rounding(fmt: Format) -> str | None:
    """What llama.cpp's products do to the inputs where that is not the format's own rule; None where it is.

    On a CPU they round to int8, by 32 inputs with an fp16 scale, or by 256 with an fp32 one for types with super-blocks.
    """
    name = block_type(fmt)
    if fmt.dense or name is None:
        return None
    size, scale = (32, "fp16") if block_size(name) == SMALLEST else (256, "fp32")
    if fmt.activation == ("int", 8, size, 1, scale):
        return None
    return f"rounded to int8 with an {scale} scale for every {size}"


def _code(fmt: Format) -> tuple[object, ...]:
    return fmt.bits, fmt.group, fmt.symmetric, fmt.element, fmt.rows, fmt.codec
