"""`none`: the baseline. Imports no torch."""

from methods.method import Source, Stage
from methods.recipes.recipe import Recipe, any_format

NONE = Recipe(
    name="none",
    summary="leaves the site as the checkpoint stores it",
    source=Source("the baseline, no published method", 0, "-"),
    stage=Stage.NONE,
    formats=any_format,
)
