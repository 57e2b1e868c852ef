"""Rounders beside `gptq`, and fitters of the range with a knob of their own, each as a method. Imports no torch."""

from collections.abc import Mapping

from methods.method import Source
from methods.model.structure import Site
from methods.policy import Knob
from methods.recipes.gptq import FEEDBACK_KNOBS, FIRST
from methods.recipes.recipe import KnobSpec, Limit, Recipe, grid_format, integer_format
from methods.recipes.rtn import FITTER

DAMPING = FEEDBACK_KNOBS["damping"]
PASSES = KnobSpec(10, low=0, high=100, kind=int)
OBQ_INPUTS = 2048

_QUIP = ("QuIP: 2-Bit Quantization of Large Language Models With Guarantees", 2023, "arXiv 2307.13304")


def narrow_site(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    """Sites of few inputs: the method costs d_in**3 a row."""
    if site.d_in <= OBQ_INPUTS:
        return None
    return f"{site.name} has d_in={site.d_in}, and the cost is d_in**3 a row; use gptq above {OBQ_INPUTS} inputs"


GPTAQ = Recipe(
    name="gptaq",
    summary="gptq that also makes up for what the inputs lost in the blocks before, as far as they are compressed",
    source=Source("GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, "arXiv 2504.02692"),
    rounder="feedback-drift",
    formats=grid_format,
    knobs={"fitter": FITTER, **FEEDBACK_KNOBS, "alpha": KnobSpec(0.25, low=0.0, high=1.0)},
    limits=(Limit({"alpha": 0.0}, "gptq"), Limit({"alpha": 0.0, "act_order": False}, "gptq", {"act_order": False})),
)

LDLQ = Recipe(
    name="ldlq",
    summary="rounds each column plus the errors of those before it, from the last to the first",
    source=Source(*_QUIP, "equation 2"),
    rounder="ldlq",
    formats=grid_format,
    knobs={
        "fitter": FITTER,
        "damping": DAMPING,
        "first": FIRST,
        "order": KnobSpec("last-first", options=("last-first", "first-last")),
    },
    limits=(Limit({"order": "first-last"}, "gptq", {"act_order": False}),),
)

OBQ = Recipe(
    name="obq",
    summary="every row rounds its cheapest weight first, and the rest make up for the error; at most 2048 inputs",
    source=Source(
        "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        2022,
        "arXiv 2208.11580",
        "section 5",
        adapted="vision models and encoders",
    ),
    rounder="obq",
    knobs={
        "fitter": FITTER,
        "damping": DAMPING,
        "first": FIRST,
        "order": KnobSpec("cheapest", options=("cheapest", "first-last")),
    },
    formats=integer_format,
    sites=narrow_site,
    limits=(Limit({"order": "first-last"}, "gptq", {"act_order": False}),),
)

GREEDY = Recipe(
    name="greedy",
    summary="rounds to nearest, then moves codes one column at a time to where the layer's output error is least",
    source=Source(*_QUIP, "supplement, greedy updates"),
    rounder="nearest+greedy",
    formats=grid_format,
    knobs={"fitter": FITTER, "damping": DAMPING, "first": FIRST, "passes": PASSES},
    limits=(Limit({"passes": 0}, "rtn"),),
)

GPTQ_GREEDY = Recipe(
    name="gptq-greedy",
    summary="gptq, then moves codes one column at a time to where the layer's output error is least",
    source=Source(
        "a combination of GPTQ and QuIP's greedy updates, not a published method", 2023, "arXiv 2210.17323 with 2307.13304"
    ),
    rounder="feedback+greedy",
    formats=grid_format,
    knobs={"fitter": FITTER, **FEEDBACK_KNOBS, "passes": PASSES},
    limits=(Limit({"passes": 0}, "gptq"), Limit({"passes": 0, "act_order": False}, "gptq", {"act_order": False})),
)

STOCHASTIC = Recipe(
    name="stochastic",
    summary="rounds up or down by chance, so that a weight is right on average",
    source=Source(
        "Deep Learning with Limited Numerical Precision",
        2015,
        "arXiv 1502.02551",
        "equation 1",
        adapted="the training of vision models",
    ),
    rounder="stochastic",
    knobs={
        "fitter": FITTER,
        "noise": KnobSpec(1.0, low=0.0, high=1.0),
        "seed": KnobSpec(0, low=0, high=2**31 - 1, kind=int),
    },
    formats=integer_format,
    limits=(Limit({"noise": 0.0}, "rtn"),),
)

PERCENTILE = Recipe(
    name="percentile",
    summary="rounds to nearest on grids that leave out each group's most extreme weights",
    source=Source("A White Paper on Neural Network Quantization", 2021, "arXiv 2106.08295", "section 3.1, range setting"),
    fitter="percentile",
    knobs={"percent": KnobSpec(99.9, low=75.0, high=100.0)},
    formats=integer_format,
    limits=(Limit({"percent": 100.0}, "rtn"), Limit({"percent": 100.0}, "rtn", format="w3a16-g16-asym")),
)

OUTPUT_CLIP = Recipe(
    name="output-clip",
    summary="rounds to nearest on grids clipped where the layer's output suffers least; the second half of awq",
    source=Source(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2024, "arXiv 2306.00978", "clipping"
    ),
    fitter="output-clip",
    knobs={"least": KnobSpec(0.5, low=0.1, high=1.0), "steps": KnobSpec(20, low=0, high=100, kind=int), "first": FIRST},
    formats=integer_format,
    limits=(Limit({"steps": 0}, "rtn"), Limit({"steps": 0}, "rtn", format="w4a16-g48-asym")),
)
