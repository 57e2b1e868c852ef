"""`hqq`: a robust fit of float offsets, without data. Imports no torch."""

from methods.method import Source
from methods.recipes.recipe import KnobSpec, Limit, Recipe, offset_format

HQQ = Recipe(
    name="hqq",
    summary="fits float offsets to a robust norm of the rounding error; needs no calibration",
    source=Source(
        "Half-Quadratic Quantization of Large Machine Learning Models",
        2023,
        "Badri and Shaji, Mobius Labs",
        "half-quadratic solver",
    ),
    fitter="hqq",
    knobs={"iterations": KnobSpec(20, low=0, high=100, kind=int)},
    formats=offset_format,
    limits=(Limit({"iterations": 0}, "rtn", format="w4a16-g48-asym"),),
)
