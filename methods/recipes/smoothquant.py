"""`smoothquant`: shares the range between inputs and weights. Imports no torch."""

from methods.method import Source
from methods.recipes.recipe import FOLD, KnobSpec, Recipe, fold_site, grid_format
from methods.recipes.rtn import FITTER

ALPHA = KnobSpec(0.5, low=0.0, high=1.0)

SMOOTHQUANT = Recipe(
    name="smoothquant",
    summary="moves range from the inputs into the weights, folded into the norm, then rounds to nearest",
    source=Source(
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        2023,
        "arXiv 2211.10438",
        "eq. 4",
    ),
    family="transform",
    transform="smooth",
    formats=grid_format,
    sites=fold_site,
    knobs={"alpha": ALPHA, "fitter": FITTER, "fold": FOLD},
)
