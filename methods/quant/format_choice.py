"""Which of two formats suits a site, judged by what rounding to each of them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from methods.formats.format import parse_format
from methods.formats.twins import float_twin
from methods.method import SiteView, Stats
from methods.policy import Decision
from methods.statistics import format_errors


def decide_mofq(
    view: SiteView, fmt: str, stats: Mapping[str, Stats] | None = None, metric: Literal["weight", "output"] = "weight"
) -> Decision:
    """`rtn` in the integer format `fmt` or in its `float_twin`, whichever has the smaller squared error over the layers of a site.

    metric: `weight`, the error of the weights, or `output`, that of the outputs on the sampled inputs, rounded as the format says; stats,
    by layer name, are read by the latter. Integers where the errors are equal. It is a decision and no recipe of the catalogue because
    the format of a site is priced before its weights are seen: what is decided names the format, for plan, price and export.
    Raises ValueError where there is no twin, a group does not divide the width, or no layer met a sampled token.
    MoFQ (Zhang 2023): `weight` where inputs stay in 16 bits, `output` where they do not.
    """
    names = [fmt, float_twin(parse_format(fmt)).name]
    if metric == "weight":
        stats = {name: Stats(0) for name in view.weights}
    elif stats is None:
        raise ValueError("mofq: metric=output reads the statistic sample; give stats, or use metric=weight")
    found = format_errors(view, stats, names)
    errors = [found[name].weight if metric == "weight" else found[name].rounded for name in names]
    if any(math.isnan(error) for error in errors):
        raise ValueError(f"mofq: no layer of {view.site.name} met a sampled token; use metric=weight")
    return Decision.of("rtn", format=names[errors[1] < errors[0]])
