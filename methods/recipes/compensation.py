"""Recipes that repair a rounded weight in closed form: a low-rank correction, or further terms of the format. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from methods.formats.format import Format, parse_format
from methods.method import Source
from methods.policy import Knob
from methods.recipes.gptq import FEEDBACK_KNOBS, FIRST
from methods.recipes.recipe import KnobSpec, Limit, Recipe, grid_format
from methods.recipes.rtn import FITTER

RANK = KnobSpec(32, low=0, high=4096, kind=int)
"""Of the correction; a weight with fewer rows or columns gets as many as it has."""

ZEROQUANT_V2 = Source(
    "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
    2023,
    "arXiv 2303.08302",
    "section 5",
)
QERA_SOURCE = Source(
    "QERA: an Analytical Framework for Quantization Error Reconstruction", 2025, "arXiv 2410.06040", "theorem 1"
)


def rank_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Bits a weight of the two factors of a layer's correction, 16 bits each of their values."""
    return 16 * min(int(knobs["rank"]), d_out, d_in) * (1 / d_out + 1 / d_in)


def residual_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Bits a weight of the terms after the first, and of the rows they stand for (32 bits each)."""
    fmt = parse_format(str(knobs["format"]))
    return (int(knobs["terms"]) - 1) * float(knobs["rows"]) * (fmt.bits_per_weight(d_in) + 32 / d_in)


def integer_grid(fmt: Format) -> str | None:
    """Integer grids with bf16 scales, whose further terms can be read without the format."""
    return (
        None
        if fmt.integer
        else f"{fmt.name} is no integer grid with bf16 scales, of which a further term could be made; use w4a16-g64"
    )


def _low_rank(name: str, summary: str, source: Source, compensator: str, *, feedback: bool = False) -> Recipe:
    own = FEEDBACK_KNOBS if feedback else {"first": FIRST} if compensator == "qera" else {}
    return Recipe(
        name=name,
        summary=summary,
        source=source,
        family="compensation",
        rounder="feedback" if feedback else "nearest",
        compensator=compensator,
        stacks=False,
        formats=grid_format,
        knobs={"rank": RANK, "fitter": FITTER, **own},
        side_bits=rank_bits,
        simulated="no kernel adds a low-rank product in 16 bits to that of the codes",
        limits=(Limit({"rank": 0}, "gptq" if feedback else "rtn"),),
    )


LORC = _low_rank("lorc", "rounds to nearest and adds the low-rank matrix nearest to the weight's error", ZEROQUANT_V2, "lorc")
LORC_GPTQ = _low_rank(
    "lorc-gptq",
    "rounds with error feedback and adds the low-rank matrix nearest to the weight's error",
    ZEROQUANT_V2,
    "lorc",
    feedback=True,
)
LQER = _low_rank(
    "lqer",
    "rounds to nearest and adds the low-rank matrix nearest to the error, columns counted by their inputs' mean magnitude",
    Source("LQER: Low-Rank Quantization Error Reconstruction for LLMs", 2024, "arXiv 2402.02446", "section 3.2"),
    "lqer",
)
QERA = _low_rank(
    "qera", "rounds to nearest and adds the low-rank matrix that repairs most of the layer's output", QERA_SOURCE, "qera"
)
QERA_GPTQ = _low_rank(
    "qera-gptq",
    "rounds with error feedback and adds the low-rank matrix that repairs most of the layer's output",
    Source("a combination of QERA and GPTQ, not a published method", 2025, "arXiv 2410.06040 with arXiv 2210.17323"),
    "qera",
    feedback=True,
)

REX = Recipe(
    name="rex",
    summary="rounds to nearest, then what is left of the worst rows again in the same format, term by term",
    source=Source("REx: Data-Free Residual Quantization Error Expansion", 2023, "arXiv 2203.14645", "section 3"),
    family="compensation",
    compensator="residual",
    formats=integer_grid,
    knobs={"terms": KnobSpec(2, low=1, high=8, kind=int), "rows": KnobSpec(1.0, low=0.0, high=1.0)},
    side_bits=residual_bits,
    simulated="no kernel adds the products of several terms of codes",
    limits=(Limit({"terms": 1}, "rtn"), Limit({"rows": 0.0}, "rtn")),
)
