"""Scales of the inputs that are fixed in advance: from the ranges met in calibration, or from the outputs that they give."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from methods.formats.elements import largest
from methods.formats.format import Format
from methods.formats.numerics import linear
from methods.method import Need
from methods.quant.clusters import like_ranges, range_of_label, sorted_ranges
from methods.quant.log_equalize import input_rule
from methods.quant.site_error import few
from methods.quant.task import Task


def static_parts(span: Tensor, fmt: Format, *, offset: bool) -> dict[str, Tensor]:
    """The payload parts that round inputs within `span` (2, n), least and largest, n = 1 or d_in; in fp32.

    offset: the codes span the range, and `act.offset` is a whole number of steps, so that zero stays zero. Half a step beside it, every
    input that is small against the step would move the same way, and such errors add up in the outputs. Otherwise the codes are
    symmetric about zero.
    """
    if offset:
        scale = (span[1] - span[0]) / (2**fmt.act_bits - 1)
    else:
        scale = span.abs().amax(0) / largest(fmt.act_element, fmt.act_bits)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return {"act.scale": scale} | ({"act.offset": (span[0] / scale).round() * scale} if offset else {})


def by_range(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """One scale for all inputs, from their range; knob `offset`."""
    return _parts(task, _whole(task.statistic(Need.RANGE)), offset=bool(task.knobs["offset"]))


def by_quiet_range(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """FPTQ's: one scale for all inputs where the largest is below the knob `loud`; none, so that it is found anew, where it is not."""
    span = _whole(task.statistic(Need.RANGE))
    rule = input_rule(float(span.abs().max()), task.number("quiet"), task.number("loud"))
    return {} if rule == "token" else _parts(task, span, offset=False)


def by_clusters(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """RPTQ's: a scale and an offset for every cluster of inputs with like ranges; knob `clusters`."""
    span = task.statistic(Need.RANGE)
    return _parts(task, range_of_label(span, like_ranges(span, int(task.number("clusters")))), offset=True)


def by_groups(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """PEG's: a scale and an offset for every one of equal groups of inputs in the order of their ranges; knob `groups`."""
    span = task.statistic(Need.RANGE)
    return _parts(task, range_of_label(span, sorted_ranges(span, int(task.number("groups")))), offset=True)


def by_token_clip(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """Outlier Suppression's: the range that a part of the tokens stay within, the part of least output error; knob `points`.

    The candidates are quantiles of the tokens' largest and least inputs, 1 - (k / points)**2 for k < points, the first of them the
    range of the sample. Deviations: the fine stage, which trains the scale, is left out; each layer of a site has a range of its own.
    """
    sample, points = task.statistic(Need.SAMPLE), int(task.number("points"))
    if not len(sample):
        return {}
    low, high = sample.aminmax(dim=1)
    parts = [1 - (point / points) ** 2 for point in range(points)]
    spans = [torch.stack([low.quantile(1 - part), high.quantile(part)])[:, None] for part in parts]
    return _searched(task, dense, spans, offset=True)


def by_scale_search(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """LLM-FP4's: the real exponent bias of all inputs, as a part 1 - k / steps of their largest magnitude; knob `steps`.

    The part of least output error, the first of equal ones, k = 0.
    """
    sample, steps = task.statistic(Need.SAMPLE), int(task.number("steps"))
    if not len(sample):
        return {}
    top = sample.abs().amax()
    ends = [top * (1 - step / steps) for step in range(steps)]
    return _searched(task, dense, [torch.stack([-end, end])[:, None] for end in ends], offset=False)


def _searched(task: Task, dense: Tensor, spans: Iterable[Tensor], *, offset: bool) -> dict[str, Tensor]:
    """The parts of the span (2, 1) with the least error of the outputs of the weight as it is stored, `dense`."""
    sample = few(task.statistic(Need.SAMPLE))
    wanted = sample @ task.weight.T

    def error(parts: dict[str, Tensor]) -> float:
        outputs = linear(sample, dense, task.fmt, payload=parts)
        return float((outputs - wanted).square().sum(dtype=torch.float64))

    return min((_parts(task, span, offset=offset) for span in spans), key=error)


def _parts(task: Task, span: Tensor, *, offset: bool) -> dict[str, Tensor]:
    """No parts where no token was met, as by an expert: then the scale is found as inputs come."""
    return static_parts(span, task.fmt, offset=offset) if task.stats.n_tokens else {}


def _whole(span: Tensor) -> Tensor:
    """The range of all inputs together, (2, 1)."""
    return torch.stack([span[0].amin(), span[1].amax()])[:, None]
