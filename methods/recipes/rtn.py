"""`rtn`: round to nearest. Imports no torch."""

from methods.method import Source
from methods.recipes.recipe import KnobSpec, Recipe, any_format

FITTER = KnobSpec("minmax", options=("minmax", "mse", "kl"))
CLIPPER = KnobSpec("minmax", options=(*FITTER.options, "output-clip"))
"""For methods that collect a sample of inputs anyhow."""

RTN = Recipe(
    name="rtn",
    summary="rounds every weight to the nearest value of its grid, or casts it to a dense dtype",
    source=Source("A White Paper on Neural Network Quantization", 2021, "arXiv 2106.08295", "sections 2.1-2.2"),
    knobs={"fitter": FITTER},
    formats=any_format,
)
