"""The scaling transforms as parts of a recipe: each gives its function the statistics that it reads, and folds the scale it gets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.method import Need, SiteView, Stats
from methods.quant import first
from methods.quant.awq import awq
from methods.quant.fold import change, fold, gain, into
from methods.quant.incoherence import Rotation
from methods.quant.log_equalize import input_rule, log_equalize
from methods.quant.outlier_plus import outlier_plus
from methods.quant.pre_shift import pre_shift
from methods.quant.shift import move
from methods.quant.smooth import smooth
from methods.quant.task import Change, Knobs, Task, statistic


def by_smooth(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """SmoothQuant's scale; knob `alpha`."""
    abs_max = _of_inputs(view, stats, Need.ABS_MAX)
    return change(view, fold(into(view, abs_max), smooth(view.weights, abs_max, float(knobs["alpha"]))))


def by_awq(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """AWQ's scale; knobs `duo`, false where there is none, and `first`."""
    name, weight = next(iter(view.weights.items()))
    abs_mean, sample = _of_inputs(view, stats, Need.ABS_MEAN), first.sample(Task(name, view, weight, stats[name], fmt, knobs))
    largest = torch.cat([sample, _of_inputs(view, stats, Need.FIRST)]).abs().amax(0)
    taker = into(view, largest)
    return change(view, fold(taker, awq(view.weights, taker, abs_mean, sample, fmt, duo=bool(knobs.get("duo", False)))))


def by_log_equalize(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """FPTQ's scale, where the largest input is above the knob `quiet` and below `loud`."""
    abs_max = _of_inputs(view, stats, Need.ABS_MAX)
    rule = input_rule(float(abs_max.max()), float(knobs["quiet"]), float(knobs["loud"]))
    return change(view, fold(into(view, abs_max), log_equalize(abs_max))) if rule == "equalised" else Change()


def by_outlier_plus(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """Outlier Suppression+'s shift and scale; knob `steps`."""
    span, sample = (_of_inputs(view, stats, need) for need in (Need.RANGE, Need.SAMPLE))
    scale, shift = outlier_plus(view, span, sample, fmt, int(knobs["steps"]))
    return move(view, scale, shift, into(view, span.abs().amax(0)))


def by_gamma(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """Gamma migration: the norm keeps only the signs of its weight, whose size goes into the layers. Outlier Suppression (Wei 2022)."""
    return move(view, gain(view.fold_into).abs())


def by_pre_shift(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """LLM-FP4's powers of two; knob `limit`.

    Folded into the norm where there is one, which then costs nothing. Elsewhere whoever rounds the inputs divides each by its own, as
    the paper's quantiser does with its exponent bias: `turn.ratio` of the payload.
    """
    limit = int(knobs["limit"])
    if view.norm is not None:
        return change(view, fold(view.norm, pre_shift(_of_inputs(view, stats, Need.ABS_MAX), limit)))
    scales = {name: pre_shift(statistic(stats[name], name, Need.ABS_MAX), limit) for name in view.weights}
    turns = {name: Rotation({"turn.ratio": scale.bfloat16()}) for name, scale in scales.items() if bool((scale != 1).any())}
    return Change(turns=turns)


def _of_inputs(view: SiteView, stats: Mapping[str, Stats], need: Need) -> Tensor:
    """A statistic of the input that all layers of a site share."""
    name = next(iter(view.weights))
    return statistic(stats[name], name, need)
