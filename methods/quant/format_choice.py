"""Which of several formats suits a layer, judged by what rounding to each of them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode, linear
from methods.method import Need, SiteView, Stats
from methods.policy import Decision
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.task import statistic

FLOATS: Mapping[int, str] = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
"""The minifloat that stands against integers of as many bits."""


def format_errors(weight: Tensor, formats: Sequence[Format], sample: Tensor | None = None) -> list[float]:
    """The mean squared error of a layer under each format, rounded to nearest on min-max grids.

    weight: (d_out, d_in); sample: (n_sample, d_in) inputs. Without a sample the error is that of the weights, with one it is that of
    the outputs, for which the inputs are rounded as the format says.
    """
    rounded = [decode(fmt, nearest(weight, fmt, minmax(weight, fmt))) for fmt in formats]
    if sample is None:
        pairs = [(dense, weight) for dense in rounded]
    else:
        wanted = sample @ weight.T
        pairs = [(linear(sample, dense, fmt), wanted) for dense, fmt in zip(rounded, formats, strict=True)]
    return [float((got - wanted).double().square().mean()) for got, wanted in pairs]


def choose_format(weight: Tensor, formats: Sequence[Format], sample: Tensor | None = None) -> Format:
    """The format of least `format_errors`, the first of equal ones: never worse than any of them alone.

    Raises ValueError where formats differ in their weights' bits, for then the widest is best and there is nothing to choose.
    MoFQ (Zhang 2023): integer or floating point of equal bits, by the error of the weights where inputs stay in 16 bits, by that of the
    outputs where they do not.
    """
    if len({fmt.bits for fmt in formats}) != 1:
        raise ValueError(f"choose_format: {', '.join(fmt.name for fmt in formats) or 'no format'}; give formats of equal bits")
    errors = format_errors(weight, formats, sample)
    return formats[errors.index(min(errors))]


def float_twin(fmt: Format) -> Format:
    """The format of equal bits and layout with minifloats for integers, in weights and, where they are rounded, in inputs.

    Both sides change, since products are of integers or of minifloats. Raises ValueError for formats that have no such twin.
    """
    if fmt.dense or (fmt.element, fmt.act_element) != ("int", "int"):
        raise ValueError(f"mofq: {fmt.name} is not made of integers; give the integer format, such as w4a16-g64 or w8a8-token")
    bits = {fmt.bits} if fmt.act_bits == 16 else {fmt.bits, fmt.act_bits}
    if not fmt.symmetric or not bits <= FLOATS.keys():
        raise ValueError(f"mofq: {fmt.name} has no minifloats beside it; use 4, 6 or 8 bits and no offset")
    act = "int" if fmt.act_bits == 16 else FLOATS[fmt.act_bits]
    return replace(fmt, element=FLOATS[fmt.bits], act_element=act)


def decide_mofq(
    view: SiteView, fmt: str, stats: Mapping[str, Stats] | None = None, metric: Literal["weight", "output"] = "weight"
) -> Decision:
    """`rtn` in the integer format `fmt` or in its `float_twin`, whichever has the smaller squared error over the layers of a site.

    metric: `weight`, the error of the weights, or `output`, that of the outputs on the sampled inputs, rounded as the format says; stats,
    by layer name, are read by the latter. Integers where the errors are equal. It is a decision and no recipe of the catalogue because
    the format of a site is priced before its weights are seen. Raises ValueError where there is no twin, a group does not divide the
    width, or no layer met a sampled token. MoFQ (Zhang 2023): `weight` where inputs stay in 16 bits, `output` where they do not.
    """
    formats = [parse_format(fmt), float_twin(parse_format(fmt))]
    if metric == "output" and stats is None:
        raise ValueError("mofq: metric=output reads the statistic sample; give stats, or use metric=weight")
    totals, n_values = [0.0, 0.0], 0
    for name, weight in view.weights.items():
        sample = statistic(stats[name], name, Need.SAMPLE) if metric == "output" and stats is not None else None
        n = weight.numel() if sample is None else len(weight) * len(sample)
        n_values += n
        # An expert that met no token has no outputs to be wrong.
        errors = format_errors(weight, formats, sample) if n else [0.0, 0.0]
        totals = [total + n * error for total, error in zip(totals, errors, strict=True)]
    if not n_values:
        raise ValueError(f"mofq: no layer of {view.site.name} met a sampled token; use metric=weight")
    return Decision.of("rtn", format=formats[totals[1] < totals[0]].name)


def input_rule(largest: float, quiet: float = 15.0, loud: float = 150.0) -> Literal["static", "equalised", "token"]:
    """How the inputs of a site are to be rounded, from the largest magnitude of them all.

    Up to `quiet` with one static scale; between the two also with one, behind `log_equalize`; from `loud` on with one scale a token.
    FPTQ (Li 2023).
    """
    if largest <= quiet:
        return "static"
    return "equalised" if largest < loud else "token"
