"""Combinations of published parts that carry no paper's name. Imports no torch."""

from methods.method import Source
from methods.recipes.awq import BY_ROWS
from methods.recipes.gptq import FEEDBACK_KNOBS
from methods.recipes.recipe import FOLD, Recipe, fold_site, grid_format
from methods.recipes.rtn import CLIPPER, FITTER
from methods.recipes.smoothquant import ALPHA

AWQ_GPTQ = Recipe(
    name="awq-gptq",
    summary="the scales of awq, then the rounding of gptq on the scaled inputs",
    source=Source("a combination of AWQ and GPTQ, not a published method", 2024, "arXiv 2306.00978 with arXiv 2210.17323"),
    family="transform",
    transform="awq",
    formats=grid_format,
    sites=fold_site,
    rounder="feedback",
    knobs={"fitter": CLIPPER, "fold": BY_ROWS, **FEEDBACK_KNOBS},
)

SMOOTH_GPTQ = Recipe(
    name="smooth-gptq",
    summary="the scales of smoothquant, then the rounding of gptq on the scaled inputs",
    source=Source(
        "a combination of SmoothQuant and GPTQ, not a published method", 2023, "arXiv 2211.10438 with arXiv 2210.17323"
    ),
    family="transform",
    transform="smooth",
    formats=grid_format,
    sites=fold_site,
    rounder="feedback",
    knobs={"alpha": ALPHA, "fitter": FITTER, "fold": FOLD, **FEEDBACK_KNOBS},
)
