"""What the parts of a recipe are given and give: one weight on its way to codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.method import Need, SiteView, Stats
from methods.policy import Knob
from methods.quant.grid import Grid

Knobs = Mapping[str, Knob]


@dataclass(frozen=True)
class Task:
    """One weight (d_out, d_in) fp32, as the transform left it, with the statistics of its inputs as the transform left them.

    name: of the layer, or of the first of several that share their inputs and are stacked by rows.
    kept: (d_out, d_in) bool, the elements that the partition takes off the grid and stores beside it; None where there is none.
    """

    name: str
    view: SiteView
    weight: Tensor
    stats: Stats
    fmt: Format
    knobs: Knobs
    kept: Tensor | None = None

    def statistic(self, need: Need) -> Tensor:
        """A statistic; raises ValueError where it was not collected."""
        return statistic(self.stats, self.name, need)

    def number(self, knob: str) -> float:
        """The value of a numeric knob."""
        return float(self.knobs[knob])


def statistic(stats: Stats, name: str, need: Need) -> Tensor:
    """A tensor statistic of the layer `name`; raises ValueError where it was not collected."""
    value: Tensor | None = getattr(stats, need.value)
    if value is None:
        raise ValueError(f"the calibration statistics of {name} lack {need.value}; collect what the method's `needs` declares")
    return value


@dataclass(frozen=True)
class Rounded:
    """What a rounder gives: codes (d_out, d_in) uint8, and the values that `kept` elements have at the end, (d_out, d_in) fp32.

    values is None where elements kept their weight, or none is kept; grid: where the rounder fitted it anew; kept: the elements off the
    grid at the end, where the rounder took more of them off than the task says.
    """

    codes: Tensor
    values: Tensor | None = None
    grid: Grid | None = None
    kept: Tensor | None = None


class Turn(Protocol):
    """An invertible linear map around one weight, `W -> U W V^T`, undone by whoever decodes the payload."""

    def weight(self, weight: Tensor) -> Tensor:
        """(d_out, d_in) -> (d_out, d_in)."""
        ...

    def stats(self, stats: Stats) -> Stats:
        """Statistics of the inputs `V x`; those that do not carry over are dropped."""
        ...

    def parts(self) -> Mapping[str, Tensor]:
        """What `methods.formats.sides` reads to undo it."""
        ...


@dataclass(frozen=True)
class Change:
    """What a transform does to a site, as an exact identity of the model before rounding.

    ratio: (d_in,) by which inputs are divided and columns multiplied; tensors: new parameters of the norm, or biases, by full name;
    turns: by layer name.
    """

    ratio: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    turns: Mapping[str, Turn] = field(default_factory=dict)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """The weight (d_out, d_in) of a layer after the change."""
        weight = weight if self.ratio is None else weight * self.ratio
        return self.turns[name].weight(weight) if name in self.turns else weight

    def stats(self, name: str, stats: Stats) -> Stats:
        """The statistics of a layer's inputs after the change."""
        stats = stats if self.ratio is None else scaled(stats, self.ratio)
        return self.turns[name].stats(stats) if name in self.turns else stats


def scaled(stats: Stats, ratio: Tensor) -> Stats:
    """The statistics of inputs divided by `ratio` (d_in,) > 0, from those of the inputs."""
    outer = torch.outer(ratio, ratio)

    def divided(value: Tensor | None, by: Tensor) -> Tensor | None:
        return None if value is None else value / by

    return replace(
        stats,
        hessian=divided(stats.hessian, outer),
        abs_max=divided(stats.abs_max, ratio),
        abs_mean=divided(stats.abs_mean, ratio),
        range=divided(stats.range, ratio),
        sample=divided(stats.sample, ratio),
        drift=divided(stats.drift, outer),
        first=divided(stats.first, ratio),
        first_drift=divided(stats.first_drift, ratio),
        fisher=divided(stats.fisher, ratio.square()),
    )
