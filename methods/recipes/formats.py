"""Published names for a number format with the part that fits it. Imports no torch."""

from methods.formats.format import Format
from methods.method import Source
from methods.recipes.recipe import KnobSpec, Limit, Recipe, grid_format
from methods.recipes.rtn import FITTER

_SIMULATED = "the project has no kernel for these formats; it computes with the decoded weights"


def vector_format(fmt: Format) -> str | None:
    """Integers whose groups have integer scales, multiplied by one number a channel."""
    reason = None if (fmt.element, fmt.codec) in (("int", "u4"), ("int", "u6")) else f"{fmt.name} has no scales of two levels"
    return grid_format(fmt) or (reason and f"{reason}; use w4a16-g16-u4 or w4a16-g16-u6")


def binary_format(fmt: Format) -> str | None:
    """Sums of signed terms, without an offset."""
    reason = None if fmt.element == "bcq" and fmt.symmetric else f"{fmt.name} is no sum of signed terms; use bcq3a16-g64"
    return grid_format(fmt) or reason


def shifted_binary_format(fmt: Format) -> str | None:
    """Sums of signed terms and an offset."""
    reason = None if fmt.element == "bcq" and not fmt.symmetric else f"{fmt.name} is no sum of signed terms with an offset"
    return grid_format(fmt) or (reason and f"{reason}; use bcq3a16-g64-asym")


def block_e2m1_format(fmt: Format) -> str | None:
    """E2M1 whose scales are no powers of two."""
    reason = None if fmt.element == "e2m1" and fmt.codec != "e8m0" else f"{fmt.name} has no E2M1 codes with fine scales"
    return grid_format(fmt) or (reason and f"{reason}; use nvfp4a16")


def integer_rows_format(fmt: Format) -> str | None:
    """Integers, however their scales are stored, with scales of its own in every row."""
    reason = (
        None if fmt.element == "int" and fmt.rows == 1 else f"{fmt.name} has no integers with scales in every row; use q4_k"
    )
    return grid_format(fmt) or reason


_ROUNDS = {"rounds": KnobSpec(15, low=0, high=100, kind=int)}

VS_QUANT = Recipe(
    name="vs-quant",
    summary="a scale for every 16 or so inputs, kept as a small integer times one number a channel",
    source=Source(
        "VS-Quant: Per-vector Scaled Quantization for Accurate Low-Precision Inference",
        2021,
        "arXiv 2102.04503",
        "section 4",
        adapted="vision models and encoders",
    ),
    family="format",
    knobs={"fitter": FITTER},
    formats=vector_format,
    simulated=_SIMULATED,
    limits=(Limit({}, "rtn", format="w4a16-g16-u4"),),
)

BCQ = Recipe(
    name="bcq",
    summary="weights as sums of a few signed terms a group, by alternating least squares",
    source=Source(
        "Alternating Multi-bit Quantization for Recurrent Neural Networks",
        2018,
        "arXiv 1802.00150",
        "algorithm 2",
        adapted="recurrent language models",
    ),
    family="format",
    fitter="bcq",
    knobs=_ROUNDS,
    formats=binary_format,
    simulated=_SIMULATED,
    limits=(Limit({"rounds": 0}, "rtn", format="bcq3a16-g48"),),
)

LUT_GEMM = Recipe(
    name="lut-gemm",
    summary="sums of signed terms and an offset a group, which its kernel multiplies by looking up partial sums",
    source=Source(
        "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in Large-Scale Generative Language Models",
        2022,
        "arXiv 2206.09557",
        "section 3",
    ),
    family="format",
    fitter="bcq",
    knobs=_ROUNDS,
    formats=shifted_binary_format,
    simulated=_SIMULATED,
    limits=(Limit({"rounds": 0}, "rtn", format="bcq2a16-g48-asym"),),
)

FOUR_SIX = Recipe(
    name="four-six",
    summary="ends every block of FP4 weights at 6 or at 4, whichever rounds it better",
    source=Source("Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling", 2025, "arXiv 2512.02010"),
    family="format",
    fitter="four-six",
    knobs={"end": KnobSpec(4, options=(4, 6))},
    formats=block_e2m1_format,
    simulated=_SIMULATED,
    limits=(Limit({"end": 6}, "rtn", format="nvfp4a16"),),
)

IMATRIX = Recipe(
    name="imatrix",
    summary="least squares scales, each weight counting as much as its inputs are large; for llama.cpp's types",
    source=Source(
        "llama.cpp: quantization with an importance matrix", 2024, "github.com/ggml-org/llama.cpp, pull request 4861"
    ),
    family="format",
    fitter="imatrix",
    knobs={"steps": KnobSpec(10, low=0, high=100, kind=int)},
    formats=integer_rows_format,
    limits=(Limit({"steps": 0}, "rtn", format="w4a16-g48-asym"),),
)
