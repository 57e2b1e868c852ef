"""Recipes that take a few columns or elements off the grid and keep them in 16 bits. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from methods.formats.format import Format
from methods.method import Source
from methods.model.structure import Site
from methods.policy import Knob
from methods.recipes.gptq import FEEDBACK_KNOBS
from methods.recipes.recipe import KnobSpec, Limit, Recipe, grid_format, scaled_format
from methods.recipes.rtn import FITTER

NEVER = 1e9
"""A threshold that nothing reaches."""


def rounded_inputs(fmt: Format) -> str | None:
    """Formats that round inputs: else there is nothing to keep loud inputs from."""
    return grid_format(fmt) or (f"{fmt.name} leaves inputs alone; use owq to keep columns" if fmt.act_bits == 16 else None)


def column_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Bits a weight of the share `columns` of a layer's columns, and of their places (32 bits each)."""
    return float(knobs["columns"]) * (16 + 32 / d_out)


def element_bits(share: float, d_in: int) -> float:
    """Bits a weight of a share of a layer's elements, of their columns and of each row's count, 16 bits each or 32 in wide layers."""
    place = 16 if d_in < 2**15 else 32
    return share * (16 + place) + place / d_in


def _sensitive_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    return element_bits(float(knobs["sensitive"]) + float(knobs["large"]), d_in)


def _outlier_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    return element_bits(float(knobs["outliers"]), d_in)


def spanned_groups(fmt: Format) -> str | None:
    """Grids that span the range of a group or row of its own, which its extreme values carry."""
    reason = scaled_format(fmt)
    spanned = fmt.rows == 1 and fmt.element not in ("tern", "bin")
    return reason or (
        None if spanned else f"{fmt.name} spans no range that a single weight of a row could spoil; use w3a16-g16"
    )


def group_tables(fmt: Format) -> str | None:
    """Look-up tables of a group or a row."""
    return (
        None
        if fmt.element == "lut" and fmt.rows == 1
        else f"{fmt.name} has no levels of every row's own; use lut3a16 or lut4a16"
    )


def whole_tables(fmt: Format) -> str | None:
    """Look-up tables of a whole weight."""
    return (
        None if fmt.element == "lut" and fmt.rows == -1 else f"{fmt.name} has no levels that all rows share; use lut3a16-whole"
    )


def signed_four_bits(fmt: Format) -> str | None:
    """Integers of four bits about zero, of whose codes one can be spared."""
    allowed = fmt.integer and fmt.bits == 4 and fmt.symmetric
    return (
        None if allowed else f"{fmt.name} has no code to mark the victim of a pair with; use w4a16-g64 or another symmetric w4"
    )


def even_inputs(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    """Sites whose inputs can be paired."""
    return f"d_in={site.d_in} of {site.name} is odd, and pairs are of neighbours; use rtn" if site.d_in % 2 else None


LLM_INT8 = Recipe(
    name="llm-int8",
    summary="keeps inputs that become large, and their columns, in 16 bits; rounds the rest of both to nearest",
    source=Source("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, "arXiv 2208.07339", "section 3.2"),
    family="partition",
    partition="loud-columns",
    formats=rounded_inputs,
    knobs={
        "threshold": KnobSpec(6.0, low=0.0, high=NEVER),
        "columns": KnobSpec(0.1, low=0.0, high=1.0),
        "fitter": FITTER,
    },
    side_bits=column_bits,
    simulated="no kernel adds the product of a few inputs in 16 bits to that of the codes",
    limits=(
        Limit({"threshold": NEVER}, "rtn", format="w8a8-token"),
        Limit({"columns": 0.0}, "rtn", format="w8a8-token"),
    ),
)

OWQ = Recipe(
    name="owq",
    summary="keeps the columns most sensitive to rounding in 16 bits, where they make up for the feedback of all others",
    source=Source(
        "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
        2024,
        "arXiv 2306.02272",
        "section 3",
    ),
    family="partition",
    partition="sensitive-columns",
    rounder="feedback",
    stacks=False,
    formats=scaled_format,
    knobs={"columns": KnobSpec(0.01, low=0.0, high=0.5), "fitter": FITTER, **FEEDBACK_KNOBS},
    side_bits=column_bits,
    simulated="no kernel adds the product of columns in 16 bits to that of the codes",
    limits=(Limit({"columns": 0.0}, "gptq"),),
)

SPQR = Recipe(
    name="spqr",
    summary="keeps single weights that spoil their group's grid, or round badly in the sweep, in 16 bits; for groups of 16 with scales"
    " and zero points of 3 bits",
    source=Source(
        "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
        2023,
        "arXiv 2306.03078",
        "section 4",
    ),
    family="partition",
    partition="leave-one-out",
    rounder="feedback-outliers",
    stacks=False,
    format="w3a16-g16-bi3-asym",
    formats=spanned_groups,
    knobs={
        "threshold": KnobSpec(0.2, low=0.0, high=NEVER),
        "outliers": KnobSpec(0.01, low=0.0, high=0.1),
        "fitter": FITTER,
        **FEEDBACK_KNOBS,
    },
    side_bits=_outlier_bits,
    simulated="no kernel adds a sparse product in 16 bits to that of the codes",
    limits=(Limit({"threshold": NEVER}, "gptq"), Limit({"outliers": 0.0}, "gptq")),
)

ITERATIONS = KnobSpec(50, low=0, high=1000, kind=int)
"""Of k-means, at most; 0 leaves the levels evenly spaced."""

SQUEEZELLM = Recipe(
    name="squeezellm",
    summary="each row's levels by k-means weighted with sensitivity; the most sensitive and the largest weights in 16 bits",
    source=Source("SqueezeLLM: Dense-and-Sparse Quantization", 2024, "arXiv 2306.07629", "section 4"),
    family="partition",
    partition="sensitive-or-large",
    fitter="fisher",
    stacks=False,
    formats=group_tables,
    knobs={
        "sensitive": KnobSpec(0.0005, low=0.0, high=0.05),
        "large": KnobSpec(0.004, low=0.0, high=0.05),
        "iterations": ITERATIONS,
    },
    side_bits=_sensitive_bits,
    simulated="no kernel adds a sparse product in 16 bits to that of looked-up levels",
    limits=(Limit({"sensitive": 0.0, "large": 0.0, "iterations": 0}, "rtn", format="lut3a16"),),
)

GOBO = Recipe(
    name="gobo",
    summary="keeps weights far out in the layer's Gaussian in 16 bits; the rest share one small set of levels",
    source=Source(
        "GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference",
        2020,
        "arXiv 2005.03842",
        "section 4",
        adapted="encoders",
    ),
    family="partition",
    partition="unlikely",
    fitter="gobo",
    formats=whole_tables,
    knobs={"outliers": KnobSpec(0.01, low=0.0, high=0.1), "iterations": ITERATIONS},
    side_bits=_outlier_bits,
    simulated="no kernel adds a sparse product in 16 bits to that of looked-up levels",
    limits=(Limit({"outliers": 0.0, "iterations": 0}, "rtn", format="lut3a16-whole"),),
)

OLIVE = Recipe(
    name="olive",
    summary="gives both codes of two neighbours to the one that is an outlier, and prunes the other",
    source=Source(
        "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization",
        2023,
        "arXiv 2304.07493",
        "sections 3-4",
    ),
    family="format",
    fitter="pairs",
    rounder="pairs",
    compensator="pairs",
    formats=signed_four_bits,
    sites=even_inputs,
    knobs={"pairs": KnobSpec(True, options=(True, False))},
    simulated="no kernel decodes two codes together",
    limits=(Limit({"pairs": False}, "rtn"),),
)
