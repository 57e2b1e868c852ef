"""Recipes whose rounding, clipping or scales are learned from a layer's or a block's output. Imports no torch."""

from dataclasses import replace

from methods.method import Source
from methods.recipes.gptq import FIRST
from methods.recipes.recipe import KnobSpec, Limit, Recipe, integer_format
from methods.recipes.rtn import FITTER

STEPS = KnobSpec(200, low=0, high=100_000, kind=int)
DRAWN = {"batch": KnobSpec(4, low=1, high=1024, kind=int), "seed": KnobSpec(0, low=0, high=2**31 - 1, kind=int)}
"""Batches of calibration text a step, and the order in which they are drawn."""


def rate(default: float | str) -> KnobSpec:
    """A learning rate."""
    return KnobSpec(default, options=("auto",) if default == "auto" else (), low=0.0, high=10.0)


PENALTY = KnobSpec(100.0, low=0.0, high=1e6)
"""What drives every weight to one of its two codes, relative to the loss of rounding to nearest."""

ADAROUND = Recipe(
    name="adaround",
    summary="learns for each weight whether to round down or up, so that the layer's output stays",
    source=Source(
        "Up or Down? Adaptive Rounding for Post-Training Quantization",
        2020,
        "arXiv 2004.10568",
        "section 4",
        adapted="vision models",
    ),
    formats=integer_format,
    learner="adaround",
    knobs={"fitter": FITTER, "steps": replace(STEPS, default=500), "rate": rate(0.05), "penalty": PENALTY, "first": FIRST},
    limits=(Limit({"steps": 0}, "rtn"), Limit({"steps": 0, "fitter": "mse"}, "rtn", {"fitter": "mse"}, "w3a16-g16-asym")),
)

ADAROUND_BLOCK = Recipe(
    name="adaround-block",
    summary="learns whether each weight rounds down or up, so that the output of the whole block stays",
    source=Source(
        "Up or Down? Adaptive Rounding for Post-Training Quantization",
        2020,
        "arXiv 2004.10568",
        "section 4, with the reconstruction unit of arXiv 2102.05426 (section 3.2) and its loss unweighted",
        adapted="vision models",
    ),
    formats=integer_format,
    learner="adaround-block",
    knobs={"fitter": FITTER, "steps": STEPS, "rate": rate(0.05), "penalty": PENALTY, **DRAWN},
    limits=(Limit({"steps": 0}, "rtn"),),
)

FLEXROUND = Recipe(
    name="flexround",
    summary="learns a divisor for each weight before rounding, so that large weights may move several codes",
    source=Source(
        "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization",
        2023,
        "arXiv 2306.00317",
        "section 3",
    ),
    formats=integer_format,
    learner="flexround",
    knobs={"fitter": FITTER, "steps": STEPS, "rate": rate(0.01), **DRAWN},
    limits=(Limit({"steps": 0}, "rtn"),),
)

SIGNROUND = Recipe(
    name="signround",
    summary="learns offsets before rounding and the ends of each group's range by signed gradient descent",
    source=Source(
        "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
        2023,
        "arXiv 2309.05516",
        "section 3",
    ),
    formats=integer_format,
    learner="signround",
    knobs={"steps": STEPS, "rate": rate("auto"), **DRAWN},
    limits=(Limit({"steps": 0}, "rtn"), Limit({"steps": 0}, "rtn", format="w2a16-g16-asym")),
)

OMNIQUANT = Recipe(
    name="omniquant",
    summary="learns to clip each group's range, and a scale folded into the norm where the site follows one",
    source=Source(
        "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
        2023,
        "arXiv 2308.13137",
        "sections 3.2-3.3",
    ),
    family="transform",
    formats=integer_format,
    learner="omniquant",
    knobs={
        "transform": KnobSpec(True, options=(True, False)),
        "clip_init": KnobSpec("auto", options=("auto",), low=0.0, high=100.0),
        "steps": STEPS,
        "rate": rate(0.01),
        "scale_rate": rate(0.005),
        **DRAWN,
    },
    limits=(
        Limit({"steps": 0, "transform": False, "clip_init": 100.0}, "rtn"),
        Limit({"steps": 0, "clip_init": 100.0}, "smoothquant", {"alpha": 0.5}, "w4a8-g48"),
    ),
)

ZEROQUANT_LKD = Recipe(
    name="zeroquant-lkd",
    summary="trains the weights through the rounding, block by block, to keep the dense block's output",
    source=Source(
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        2022,
        "arXiv 2206.01861",
        "section 4, layer-by-layer knowledge distillation",
    ),
    formats=integer_format,
    learner="lkd",
    knobs={"fitter": FITTER, "steps": STEPS, "rate": rate(0.001), **DRAWN},
    limits=(Limit({"steps": 0}, "rtn"),),
)
