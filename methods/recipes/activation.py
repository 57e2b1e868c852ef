"""Recipes about how the inputs of a linear are rounded: scales fixed in advance, groups of inputs, minifloats. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from methods.formats.format import Format
from methods.method import Source
from methods.policy import Knob
from methods.recipes.compensation import RANK, rank_bits
from methods.recipes.gptq import GPTQ
from methods.recipes.recipe import KnobSpec, Limit, Recipe, grid_format, norm_site
from methods.recipes.rtn import FITTER, RTN
from methods.recipes.scaling import FPTQ
from methods.recipes.smoothquant import SMOOTHQUANT

_SIMULATED = "no kernel rounds inputs with scales that were fixed in advance"
_STATIC = "w8a8-tensor"
"""The format of the limits: static scales leave the weights what they are."""


def rounded_inputs(fmt: Format) -> str | None:
    """Formats with a grid that round their inputs."""
    return grid_format(fmt) or (f"{fmt.name} leaves the inputs as they are; use w8a8-tensor" if fmt.act_bits == 16 else None)


def static_format(fmt: Format) -> str | None:
    """Formats with one scale for all inputs of all tokens, which a payload can fix."""
    reason = rounded_inputs(fmt)
    return reason or (None if fmt.act_rows == -1 else f"{fmt.name} finds a scale for every token; use w8a8-tensor")


def static_integers(fmt: Format) -> str | None:
    """Those whose inputs become integers, which can have an offset."""
    reason = static_format(fmt)
    return reason or (
        None if fmt.act_element == "int" else f"{fmt.name} rounds inputs to {fmt.act_element}, which has no offset"
    )


def static_floats(fmt: Format) -> str | None:
    """Those whose inputs become minifloats."""
    reason = static_format(fmt)
    return reason or (f"{fmt.name} rounds inputs to integers; use e2m1ae2m1-tensor" if fmt.act_element == "int" else None)


def joint_inputs(fmt: Format) -> str | None:
    """Those that round all inputs of a token with one scale, so that the parts of an input are rounded alike."""
    reason = rounded_inputs(fmt)
    return reason or (None if fmt.act_group == -1 else f"{fmt.name} has a scale for each group of inputs; use w4a4-token")


def tensor_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Bits a weight of a layer's one scale and, at most, one offset, in fp32."""
    return 64 / (d_out * d_in)


def shifted_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Those, and a power of two in 16 bits for every input where no norm takes it."""
    return tensor_bits(d_out, d_in, knobs) + (16 / d_out if knobs["limit"] else 0.0)


def input_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Bits a weight of a scale and an offset in fp32 for every input of a layer."""
    return 64 / d_out


def slot_bits(d_out: int, d_in: int, knobs: Mapping[str, Knob]) -> float:
    """Bits a weight of three 32-bit indices for every part that is added to the inputs."""
    return 96 * (int((1 + float(knobs["growth"])) * d_in) - d_in) / (d_out * d_in)


STATIC = replace(
    RTN,
    name="static",
    summary="rounds to nearest, and inputs with one scale fixed from the range they had in calibration",
    family="activation",
    compensator="static-range",
    knobs={"offset": KnobSpec(False, options=(False, True)), "fitter": FITTER},
    formats=static_integers,
    side_bits=tensor_bits,
    simulated=_SIMULATED,
    limits=(Limit({}, "rtn", format=_STATIC),),
)

SMOOTHQUANT_STATIC = replace(
    SMOOTHQUANT,
    name="smoothquant-static",
    summary="smoothquant, and inputs rounded with one scale fixed from the range they had in calibration (its O3)",
    compensator="static-range",
    knobs={**SMOOTHQUANT.knobs, "offset": KnobSpec(False, options=(False, True))},
    formats=static_integers,
    side_bits=tensor_bits,
    simulated=_SIMULATED,
    limits=(Limit({"alpha": 0.25}, "smoothquant", {"alpha": 0.25}, format=_STATIC),),
)

FPTQ_STATIC = replace(
    FPTQ,
    name="fptq-static",
    summary="fptq, and inputs rounded with one fixed scale but for the sites with the largest of them",
    compensator="static-quiet",
    formats=static_integers,
    side_bits=tensor_bits,
    simulated=_SIMULATED,
    limits=(Limit({"loud": 0.0}, "rtn", format=_STATIC),),
)

OUTLIER_SUPPRESSION = Recipe(
    name="outlier-suppression",
    summary="moves the norm's weight into the layers, fixes the inputs' range where clipping the few largest tokens pays",
    source=Source(
        "Outlier Suppression: Pushing the Limit of Low-bit Transformer Language Models",
        2022,
        "arXiv 2209.13325",
        adapted="encoders and sequence-to-sequence models",
    ),
    family="activation",
    transform="gamma",
    compensator="token-clip",
    sites=norm_site,
    knobs={"points": KnobSpec(20, low=1, high=100, kind=int), "fitter": FITTER},
    formats=static_integers,
    side_bits=tensor_bits,
    simulated=_SIMULATED,
)

RPTQ = Recipe(
    name="rptq",
    summary="rounds inputs with a fixed scale and offset for each cluster of inputs with like ranges",
    source=Source("RPTQ: Reorder-based Post-training Quantization for Large Language Models", 2023, "arXiv 2304.01089"),
    family="activation",
    compensator="static-clusters",
    knobs={"clusters": KnobSpec(8, low=1, high=256, kind=int), "fitter": FITTER},
    formats=static_integers,
    side_bits=input_bits,
    simulated="no kernel rounds inputs with scales that were fixed in advance, a cluster of inputs at a time",
    limits=(Limit({"clusters": 1}, "static", {"offset": True}, format=_STATIC),),
)

PEG = Recipe(
    name="peg",
    summary="rounds inputs with a fixed scale and offset for each of equal groups of them, sorted by range",
    source=Source(
        "Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
        2021,
        "arXiv 2109.12948",
        adapted="encoders",
    ),
    family="activation",
    compensator="static-groups",
    knobs={"groups": KnobSpec(6, low=1, high=256, kind=int), "fitter": FITTER},
    formats=static_integers,
    side_bits=input_bits,
    simulated="no kernel rounds inputs with scales that were fixed in advance, a group of sorted inputs at a time",
    limits=(Limit({"groups": 1}, "static", {"offset": True}, format=_STATIC),),
)

DISASSEMBLY = Recipe(
    name="channel-disassembly",
    summary="splits the largest inputs into equal parts, so that one fixed scale rounds all of them finely",
    source=Source(
        "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models",
        2024,
        "arXiv 2310.08041",
        "the first of its three steps; nothing is merged again, so that the width grows, and nothing trained",
    ),
    family="activation",
    compensator="disassembly",
    knobs={"growth": KnobSpec(0.05, low=0.0, high=1.0), "fitter": FITTER},
    formats=static_format,
    side_bits=input_bits,
    simulated="no kernel multiplies by a weight with some columns taken several times",
    limits=(Limit({"growth": 0.0}, "static", format=_STATIC),),
)

QLLM = Recipe(
    name="qllm",
    summary="splits the largest inputs into equal parts and joins as many pairs of like ones, so that the width stays",
    source=Source(
        "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models",
        2024,
        "arXiv 2310.08041",
        "channel disassembly and assembly; the low-rank error correction of its third step is left out",
    ),
    family="activation",
    transform="reassembly",
    knobs={"growth": KnobSpec(0.1, low=0.0, high=0.3), "steps": KnobSpec(10, low=1, high=100, kind=int), "fitter": FITTER},
    formats=joint_inputs,
    side_bits=slot_bits,
    simulated="no kernel splits and joins inputs on their way into the product",
    limits=(
        Limit({"growth": 0.0}, "rtn", format="w8a8-token"),
        Limit({"growth": 0.0, "fitter": "mse"}, "rtn", {"fitter": "mse"}, format="w4a8-token-g16"),
    ),
)

LLM_FP4 = Recipe(
    name="llm-fp4",
    summary="inputs as minifloats, a power of two for each folded into the weights, one fixed scale that the outputs like best",
    source=Source("LLM-FP4: 4-Bit Floating-Point Quantized Transformers", 2023, "arXiv 2310.16836"),
    family="format",
    transform="pre-shift",
    fitter="mse",
    compensator="scale-search",
    knobs={
        "limit": KnobSpec(3, low=0, high=16, kind=int),
        "steps": KnobSpec(100, low=1, high=1000, kind=int),
        "fitter": replace(FITTER, default="mse"),
    },
    formats=static_floats,
    side_bits=shifted_bits,
    simulated=_SIMULATED,
    limits=(Limit({"limit": 0}, "rtn", {"fitter": "mse"}, format="e2m1ae2m1-tensor-g48"),),
)


def zeroquant_format(fmt: Format) -> str | None:
    """Integers in groups, inputs in eight bits token by token."""
    fits = fmt.integer and fmt.act_bits == 8 and fmt.act_group == -1
    return rounded_inputs(fmt) or (None if fits else f"{fmt.name} does not round inputs to eight bits a token; use w8a8-token")


def zeroquant_fp_format(fmt: Format) -> str | None:
    """Minifloats on both sides, inputs token by token, scales that can be any power of two."""
    fits = fmt.element[0] == fmt.act_element[0] == "e" and (fmt.act_group, fmt.act_rows, fmt.codec) == (-1, 1, "bf16")
    return rounded_inputs(fmt) or (None if fits else f"{fmt.name} is not e2m1ae4m3-token or another pair of minifloats like it")


ZEROQUANT = replace(
    RTN,
    name="zeroquant",
    summary="rounds to nearest in groups, and inputs to eight bits with a scale for every token",
    source=Source(
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers", 2022, "arXiv 2206.01861"
    ),
    family="activation",
    formats=zeroquant_format,
    limits=(Limit({}, "rtn", format="w8a8-token"),),
)

ZEROQUANT_FP = Recipe(
    name="zeroquant-fp",
    summary="minifloats on both sides with scales a power of two apart, rounded with error feedback, and a low-rank repair",
    source=Source("ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization", 2023, "arXiv 2307.09782"),
    family="format",
    fitter="pow2-m2",
    rounder="feedback",
    compensator="lorc",
    stacks=False,
    knobs={
        **GPTQ.knobs,
        "rank": replace(RANK, default=8),
        "fitter": KnobSpec("pow2-m2", options=("pow2-m2", "pow2-m1", "minmax", "mse")),
    },
    formats=zeroquant_fp_format,
    side_bits=rank_bits,
    simulated="no kernel adds a low-rank product in 16 bits to that of the codes",
    limits=(Limit({"rank": 0, "fitter": "minmax"}, "gptq", format="e2m1ae4m3-token-g48"),),
)
