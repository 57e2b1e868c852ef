"""The contract of a method: what it needs to know, what it costs, what it does to a site. Imports no torch at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """A statistic of a linear over the calibration tokens: of its input, but for FISHER (its weight's gradient) and BLOCK."""

    HESSIAN = "hessian"
    FIRST = "first"
    ABS_MAX = "abs_max"
    ABS_MEAN = "abs_mean"
    RANGE = "range"
    SAMPLE = "sample"
    DRIFT = "drift"
    FIRST_DRIFT = "first_drift"
    FISHER = "fisher"
    BLOCK = "block"


class Stage(Enum):
    """Where a method stands in a legal sequence."""

    NONE = "none"
    TRANSFORM = "transform"
    QUANTIZE = "quantize"


@dataclass(frozen=True)
class Source:
    """Where a method was published.

    adapted: the kind of models it was published for, where those are no decoder-only language models; "" where they are.
    """

    title: str
    year: int
    ref: str
    where: str = ""
    adapted: str = ""


@dataclass(frozen=True)
class Cost:
    """What a decision costs to store and to compute, relative to the dense layer's multiply-adds."""

    bits_per_weight: float
    mac_ratio: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What a decision will do to a site, known without touching a tensor: this is what is priced.

    simulated: why no kernel runs it, so that it has no latency of its own; "" where the format's kernels do.
    """

    format: Format
    cost: Cost
    simulated: str = ""


@dataclass(frozen=True)
class BlockSample:
    """A decoder block as a function of its linears' weights, with inputs and the outputs to be kept.

    inputs, targets: hidden states (b, t, d) fp32 for each batch: what the block reads now, and what the dense model has behind it.
    run: (hidden, weights (d_out, d_in) by layer name, activation formats by layer name) -> hidden; layers that are absent are as they
    stand in the model, and weights may hold other parameters of the block, by full name. Differentiable in the weights; rounding of
    activations passes gradients straight through.
    """

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    run: Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Format]], Tensor]


@dataclass(frozen=True)
class Stats:
    """Statistics of one linear; only what was asked for is not None.

    hessian: (d_in, d_in), `X^T X / n_tokens`; abs_max, abs_mean: (d_in,); range: (2, d_in), least and largest; sample: (n_sample, d_in)
    input rows. drift: (d_in, d_in), `(X_dense - X)^T X / n_tokens`, zero where the blocks before are dense. fisher: (d_out, d_in), the
    mean squared gradient of the loss; layers then share no object. first: (n_sequences, d_in), the input rows of the first token of every
    sequence, and first_drift what these have lost, `X_dense - X`; no rows where tokens are routed, so that none is known for the first.
    All fp32. block: the block the linear stands in, to be reconstructed.
    """

    n_tokens: int
    hessian: Tensor | None = None
    abs_max: Tensor | None = None
    abs_mean: Tensor | None = None
    range: Tensor | None = None
    sample: Tensor | None = None
    drift: Tensor | None = None
    fisher: Tensor | None = None
    block: BlockSample | None = None
    first: Tensor | None = None
    first_drift: Tensor | None = None


@dataclass(frozen=True)
class NormView:
    """The norm before a site: `y = normalise(x) * (weight + unit_offset) + bias`; weight, bias: (d_in,) in their stored dtype."""

    name: str
    weight: Tensor
    bias: Tensor | None
    unit_offset: float


@dataclass(frozen=True)
class SiteView:
    """A site's tensors as a method sees them, by layer name: weights (d_out, d_in) fp32, biases (d_out,) of the layers that have one;
    and the norm that a scale can fold into.
    """

    site: Site
    weights: Mapping[str, Tensor]
    norm: NormView | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fold_into(self) -> NormView:
        """The norm; raises ValueError where the site follows none of its own."""
        if self.norm is None:
            raise ValueError(f"{self.site.name}: no norm that a scale could fold into (it names {self.site.norm})")
        return self.norm


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
