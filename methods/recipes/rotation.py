"""Rotations: of the whole model (`quarot`, `spinquant`), and around single weights (`block-hadamard`, `quip`). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from methods.formats.format import parse_format
from methods.method import Source
from methods.model.structure import Site
from methods.policy import Knob
from methods.recipes.gptq import FIRST
from methods.recipes.model_method import ModelMethod
from methods.recipes.recipe import KnobSpec, Limit, Recipe, grid_format
from methods.recipes.rounding import DAMPING, PASSES
from methods.recipes.rtn import FITTER

SEED = KnobSpec(0, low=0, high=2**31 - 1, kind=int)
ROTATE_KNOBS = {"seed": SEED, "heads": KnobSpec(True, options=(True, False))}

QUAROT = ModelMethod(
    name="quarot",
    summary="turns the residual stream and the value heads by random Hadamard matrices, fused into the weights; for rounded inputs:"
    " where weights alone are rounded, first tokens lose by it",
    source=Source("QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, "arXiv 2404.00456", "section 4, stage 1"),
    knobs=ROTATE_KNOBS,
    rotates=True,
)

SPINQUANT = ModelMethod(
    name="spinquant",
    summary="learns those rotations on the cross-entropy of the model with rounded weights and inputs",
    source=Source("SpinQuant: LLM Quantization with Learned Rotations", 2024, "arXiv 2405.16406", "section 3.2, R1 and R2"),
    knobs={
        **ROTATE_KNOBS,
        "steps": KnobSpec(100, low=0, high=100_000, kind=int),
        "rate": KnobSpec(1.5, low=1e-6, high=100.0),
        "batch": KnobSpec(1, low=1, high=1024, kind=int),
    },
    format="w4a8-token",
    rotates=True,
)

_ONLINE = "its inputs are rotated at run time, for which there is no kernel here"


def block_of(d_in: int, knobs: Mapping[str, Knob]) -> int:
    """The Hadamard block of a row of `d_in` inputs; `auto`: the largest power of two, at most 128, that divides it."""
    return min(d_in & -d_in, 128) if knobs["block"] == "auto" else int(knobs["block"])


def _block_site(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    block = block_of(site.d_in, knobs)
    if block & (block - 1) or site.d_in % block:
        divides = site.d_in & -site.d_in
        return f"block={block} is no power of two that divides d_in={site.d_in} of {site.name}; use one up to {divides}"
    return None


BLOCK_HADAMARD = Recipe(
    name="block-hadamard",
    summary="rotates blocks of inputs by a Hadamard matrix, which spreads outliers, then rounds to nearest",
    source=Source(
        "Bridging the Gap Between Promise and Performance for Microscaling FP4 Quantization",
        2025,
        "arXiv 2509.23202",
        "section 4",
    ),
    family="transform",
    transform="block-hadamard",
    formats=grid_format,
    sites=_block_site,
    knobs={"fitter": FITTER, "block": KnobSpec("auto", options=("auto",), low=1, high=65536, kind=int)},
    side_bits=lambda d_out, d_in, knobs: 32 / (d_out * d_in) if block_of(d_in, knobs) > 1 else 0.0,
    simulated=_ONLINE,
    limits=(
        Limit({"block": 1}, "rtn"),
        Limit({"block": 1, "fitter": "mse"}, "rtn", {"fitter": "mse"}),
        Limit({"block": 1}, "rtn", format="nvfp4a4"),
    ),
)


def factors(n: int) -> tuple[int, int]:
    """(p, q) with p q = n, p <= q and both as near to the square root as can be."""
    p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
    return p, n // p


def _quip_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    turned = sum(f * f for n in (d_out, d_in) for f in factors(n)) * 32 if knobs["rotate"] else 0
    return (turned + (16 * d_in if knobs["rescale"] else 0)) / (d_out * d_in)


def _quip_site(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    fmt = parse_format(str(knobs["format"]))
    if knobs["fitter"] == "rms" and fmt.bits > 4:
        return f"its range of 2.4 rms cuts off more than {fmt.bits} bits round away; use fitter=minmax or fitter=mse"
    return None


QUIP = Recipe(
    name="quip",
    summary="makes weight and Hessian incoherent by random rotations on both sides, then rounds with feedback"
    " and greedy passes",
    source=Source(
        "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", 2023, "arXiv 2307.13304", "algorithms 1-3"
    ),
    family="transform",
    transform="incoherence",
    fitter="rms",
    rounder="ldlq+greedy",
    sites=_quip_site,
    knobs={
        "fitter": KnobSpec("rms", options=("rms", "minmax", "mse")),
        "damping": DAMPING,
        "first": FIRST,
        "passes": PASSES,
        "seed": SEED,
        "rotate": KnobSpec(True, options=(True, False)),
        "rescale": KnobSpec(False, options=(True, False)),
    },
    side_bits=_quip_bits,
    simulated=_ONLINE,
    limits=(Limit({"rotate": False, "fitter": "minmax", "passes": 0}, "ldlq"),),
)
