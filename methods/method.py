"""The contract of a method: what it needs to know, what it costs, what it does to a site. Imports no torch at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from methods.formats.format import Format
from methods.model.structure import Site
from methods.policy import Knob

if TYPE_CHECKING:
    from torch import Tensor

    from methods.formats.numerics import Compressed


class Need(Enum):
    """A statistic of a linear's input over the calibration tokens."""

    HESSIAN = "hessian"
    ABS_MAX = "abs_max"
    ABS_MEAN = "abs_mean"
    SAMPLE = "sample"


class Stage(Enum):
    """Where a method stands in a legal sequence."""

    NONE = "none"
    TRANSFORM = "transform"
    QUANTIZE = "quantize"


@dataclass(frozen=True)
class Source:
    """Where a method was published."""

    title: str
    year: int
    ref: str
    where: str = ""


@dataclass(frozen=True)
class Cost:
    """What a decision costs to store and to compute, relative to the dense layer's multiply-adds."""

    bits_per_weight: float
    mac_ratio: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What a decision will do to a site, known without touching a tensor: this is what is priced."""

    format: Format
    cost: Cost


@dataclass(frozen=True)
class Stats:
    """Statistics of the inputs of one linear; only what was asked for is not None.

    hessian: (d_in, d_in), `X^T X / n_tokens`; abs_max, abs_mean: (d_in,); sample: (n_sample, d_in) input rows. All fp32.
    """

    n_tokens: int
    hessian: Tensor | None = None
    abs_max: Tensor | None = None
    abs_mean: Tensor | None = None
    sample: Tensor | None = None


@dataclass(frozen=True)
class NormView:
    """The norm before a site: `y = normalise(x) * (weight + unit_offset) + bias`; weight, bias: (d_in,) in their stored dtype."""

    name: str
    weight: Tensor
    bias: Tensor | None
    unit_offset: float


@dataclass(frozen=True)
class SiteView:
    """A site's tensors as a method sees them: weights (d_out, d_in) fp32 by layer name, and the norm that a scale can fold into."""

    site: Site
    weights: Mapping[str, Tensor]
    norm: NormView | None = None


@dataclass(frozen=True)
class Edit:
    """What a method does to a model: compressed linears by layer name, and other parameters replaced by full name."""

    linears: Mapping[str, Compressed] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """A named method. `apply` is pure: it modifies nothing and is deterministic."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def source(self) -> Source: ...

    def refuses(self, site: Site, knobs: Mapping[str, Knob]) -> str | None:
        """Why the method cannot stand at this site with these knobs, or None."""
        ...

    def plan(self, site: Site, knobs: Mapping[str, Knob]) -> Plan:
        """Format and cost; raises ValueError with `refuses`' reason."""
        ...

    def apply(self, view: SiteView, stats: Mapping[str, Stats], knobs: Mapping[str, Knob]) -> Edit:
        """The edit; `stats` by layer name, layers that share an input share one object."""
        ...
