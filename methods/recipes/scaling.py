"""Recipes that scale or move the inputs of a site, folded into the norm or the rows before it, and round to nearest. Imports no torch."""

from __future__ import annotations

from methods.method import Source
from methods.recipes.recipe import FOLD, KnobSpec, Limit, Recipe, fold_site, grid_format, scaled_format
from methods.recipes.rtn import FITTER

OUTLIER_SUPPRESSION_PLUS = Recipe(
    name="outlier-suppression-plus",
    summary="centres the inputs where biases can take it, presses outliers down to the threshold that the outputs like best",
    source=Source(
        "Outlier Suppression+: Accurate quantization of large language models by equivalent and optimal shifting and scaling",
        2023,
        "arXiv 2304.09145",
    ),
    family="transform",
    transform="outlier-plus",
    sites=fold_site,
    formats=grid_format,
    knobs={"steps": KnobSpec(100, low=1, high=1000, kind=int), "fitter": FITTER, "fold": FOLD},
    # One step is the threshold that changes nothing; where there are biases, the inputs are centred still.
    limits=(Limit({"steps": 1}, "rtn"),),
)

FPTQ = Recipe(
    name="fptq",
    summary="equalises the inputs by their logarithms at sites whose largest input lies between two bounds",
    source=Source("FPTQ: Fine-grained Post-Training Quantization for Large Language Models", 2023, "arXiv 2308.15987"),
    family="transform",
    transform="log-equalize",
    sites=fold_site,
    formats=scaled_format,
    knobs={
        "quiet": KnobSpec(15.0, low=0.0, high=1e9),
        "loud": KnobSpec(150.0, low=0.0, high=1e9),
        "fitter": FITTER,
        "fold": FOLD,
    },
    limits=(Limit({"loud": 0.0}, "rtn"),),
)
