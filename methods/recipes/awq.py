"""`awq`: activation-aware scaling, then rounding to nearest. Imports no torch."""

from dataclasses import replace

from methods.method import Source
from methods.recipes.gptq import FIRST
from methods.recipes.recipe import FOLD, KnobSpec, Recipe, fold_site, grid_format
from methods.recipes.rtn import CLIPPER

BY_ROWS = replace(FOLD, default="rows")
"""For scales that the error of the outputs chooses."""

AWQ = Recipe(
    name="awq",
    summary="scales up the columns that large inputs meet, folded into the norm or the rows before it, then rounds to nearest",
    source=Source(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        2024,
        "arXiv 2306.00978",
        "section 3.2",
    ),
    family="transform",
    transform="awq",
    formats=grid_format,
    sites=fold_site,
    knobs={"duo": KnobSpec(False, options=(False, True)), "fitter": CLIPPER, "fold": BY_ROWS, "first": FIRST},
)
