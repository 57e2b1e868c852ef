"""`gptq`: rounding with error feedback. Imports no torch."""

from methods.method import Source
from methods.recipes.recipe import KnobSpec, Recipe, grid_format
from methods.recipes.rtn import FITTER

FIRST = KnobSpec("auto", options=("auto",), low=1.0, high=1e6)
"""How often what the first tokens share counts where keys and values are computed (`methods.quant.first`)."""

FEEDBACK_KNOBS = {
    "damping": KnobSpec("auto", options=("auto",), low=0.0, high=100.0),
    "act_order": KnobSpec(True, options=(True, False)),
    "first": FIRST,
}

GPTQ = Recipe(
    name="gptq",
    summary="rounds column by column; the columns still to come make up for the error in the layer's output",
    source=Source(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        2023,
        "arXiv 2210.17323",
        "algorithm 1",
    ),
    rounder="feedback",
    knobs={"fitter": FITTER, **FEEDBACK_KNOBS},
    formats=grid_format,
)
