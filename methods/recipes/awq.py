"""`awq`: activation-aware scaling, then rounding to nearest. Imports no torch."""

from methods.method import Source
from methods.recipes.recipe import Recipe, norm_site
from methods.recipes.rtn import FITTER

AWQ = Recipe(
    name="awq",
    summary="scales up the columns that large inputs meet, folded into the norm, then rounds to nearest",
    source=Source(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        2024,
        "arXiv 2306.00978",
        "section 3.2",
    ),
    family="transform",
    transform="awq",
    sites=norm_site,
    knobs={"fitter": FITTER},
)
