"""`Prepared`: everything a solver needs to know of a study, as plain values. Imports no torch, so that re-solving is instant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from methods.formats.format import Format, parse_format
from methods.policy import DENSE, Decision, Policy
from methods.typed import Count, Finite, NonNegative, Positive, WrongValue, read
from predictors.assumed import KIND as ASSUMED
from predictors.assumed import AssumedMap
from predictors.latency import LatencyModel
from profilers.label import Label
from search.strategies.problem import Limit, Problem


@dataclass(frozen=True)
class Option:
    """One choice at one site: its price and its predicted loss.

    ms: measured cold latency of the site's kernels at the workload's tokens in flight; model_ms: the same as it counts in a whole
    model, where some kernels meet warmer caches than others; kernel: the one that is fastest there; loss: nats per token, predicted,
    with its standard error; rounding_error: of weights rounded to nearest in the format, relative to their energy, where it stands
    against a twin (`methods.formats.twins`); fast: whether its time speaks for it in some workload, no option with more bits being as
    fast: the others are for limits on bytes alone.
    """

    label: str
    format: str
    bits_per_weight: NonNegative
    size_bytes: Count
    ms: NonNegative
    kernel: str
    model_ms: NonNegative = 0.0
    loss: Finite = 0.0
    loss_stderr: NonNegative = 0.0
    fast: bool = True
    rounding_error: NonNegative | None = None

    def __post_init__(self) -> None:
        Decision.parse(self.label)
        parse_format(self.format)


@dataclass(frozen=True)
class SiteOptions:
    """A site with its options, the dense one first."""

    name: str
    kind: str
    block: Count
    n_weights: Count
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or self.options[0].label != DENSE.label:
            raise ValueError(f"site {self.name}: the first option is not the dense one")

    @property
    def fast(self) -> SiteOptions:
        """The site with the options that are worth their time."""
        return replace(self, options=tuple(option for option in self.options if option.fast))


@dataclass(frozen=True)
class WorkloadCost:
    """What the options cost in another workload than the main one.

    model_ms: by site and option; latency: its map; dense_ms, tail, checked: as in `Prepared`.
    """

    workload: str
    model_ms: tuple[tuple[NonNegative, ...], ...]
    latency: Mapping[str, Any]
    dense_ms: tuple[Positive, Positive, Positive]
    tail: float
    checked: str = ""

    @cached_property
    def map(self) -> LatencyModel | AssumedMap:
        """The whole-model latency map of this workload."""
        return read_map(self.latency)


def read_map(data: Mapping[str, Any]) -> LatencyModel | AssumedMap:
    """A map from its plain values, whichever it is; raises ValueError where they are those of no map."""
    return AssumedMap.from_dict(data) if data.get("kind") == ASSUMED else LatencyModel.from_dict(data)


class ModelFacts(TypedDict):
    """The model that a study was prepared for, as results name it."""

    label: str
    digest: str
    notes: list[str]
    source: NotRequired[str]
    architecture: NotRequired[str]
    n_parameters: NotRequired[int]
    dtype: NotRequired[str]


class TargetFacts(TypedDict):
    """The machine that a study was prepared for."""

    name: str
    description: str
    fingerprint: str
    threads: int
    compute_dtype: NotRequired[str]
    facts: NotRequired[Mapping[str, Any]]


class TextFacts(TypedDict):
    """The text of one role; generated: the model wrote it."""

    source: str
    sha256: str
    sequences: int
    length: int
    generated: bool
    role: NotRequired[str]


WAY_OUT = "the file is damaged, or of another version of this program: remove it and repeat `search run`"
"""Of a study's own file that does not hold what this program writes."""


@dataclass(frozen=True)
class Prepared:
    """A study before its objective: sites with priced and scored options, and the map from their sum to the whole model.

    dense_ms: median latency of the dense reference with its 95 % interval; tail: its 95th percentile over its median, interruptions
    included, nan where nothing was run; checked: what repeated blocks say of the map, "" where nothing was run; other_bytes:
    everything outside the sites; also: the costs in the other workloads; kv_bytes: the largest one's cache; workload: the main one;
    label: of all latencies here; limits: what a policy has to keep besides.
    """

    sites: tuple[SiteOptions, ...]
    latency: Mapping[str, Any]
    dense_ms: tuple[Positive, Positive, Positive]
    dense_name: str
    other_bytes: int
    model: ModelFacts
    target: TargetFacts
    data: Mapping[str, TextFacts]
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    tail: float = math.nan
    also: tuple[WorkloadCost, ...] = ()
    kv_bytes: Count = 0
    workload: str = ""
    label: Label = "measured"
    limits: tuple[Limit, ...] = ()
    checked: str = ""

    @classmethod
    def from_json(cls, data: object, file: Path | str = "prepared.json") -> Prepared:
        """Inverse of `to_json`; raises WrongValue, which names the file and the place in it."""
        prepared = read(cls, data, file, WAY_OUT)
        shape = [len(site.options) for site in prepared.sites]
        if not shape:
            raise WrongValue(file, "sites", "expected sites, found none", WAY_OUT)
        costs: list[Prepared | WorkloadCost] = [prepared, *prepared.also]
        for index, cost in enumerate(costs):
            place = f"also[{index - 1}]." if index else ""
            try:
                _ = cost.map
            except ValueError as error:
                raise WrongValue(file, f"{place}latency", str(error), WAY_OUT) from None
            if isinstance(cost, WorkloadCost) and [len(own) for own in cost.model_ms] != shape:
                raise WrongValue(file, f"{place}model_ms", "expected a number for each option of each site", WAY_OUT)
        return prepared

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the limits: they belong to an objective."""
        return {name: value for name, value in asdict(replace(self, limits=())).items() if name != "limits"}

    @property
    def fast(self) -> Prepared:
        """The study with the options that are worth their time: all that matter where no bytes are limited."""
        kept = [[j for j, option in enumerate(site.options) if option.fast] for site in self.sites]
        also = tuple(
            replace(cost, model_ms=tuple(tuple(own[j] for j in js) for own, js in zip(cost.model_ms, kept, strict=True)))
            for cost in self.also
        )
        return replace(self, sites=tuple(site.fast for site in self.sites), also=also)

    @cached_property
    def map(self) -> LatencyModel | AssumedMap:
        """The whole-model latency map of the main workload."""
        return read_map(self.latency)

    @cached_property
    def problem(self) -> Problem:
        """The multiple-choice problem of all sites."""
        return Problem(
            tuple(site.name for site in self.sites),
            tuple(tuple(Decision.parse(option.label) for option in site.options) for site in self.sites),
            tuple(np.array([option.loss for option in site.options]) for site in self.sites),
            tuple(np.array([option.model_ms for option in site.options]) for site in self.sites),
            tuple(np.array([option.size_bytes for option in site.options], dtype=np.float64) for site in self.sites),
            self.limits,
        )

    @cached_property
    def rounding_errors(self) -> dict[str, dict[str, float]]:
        """`Option.rounding_error` by site and format, of those that have one."""
        return {
            site.name: {o.format: o.rounding_error for o in site.options if o.rounding_error is not None} for site in self.sites
        }

    @cached_property
    def kind(self) -> dict[str, str]:
        """Kind by site."""
        return {site.name: site.kind for site in self.sites}

    @cached_property
    def block(self) -> dict[str, int]:
        """Block by site."""
        return {site.name: site.block for site in self.sites}

    @cached_property
    def depth(self) -> dict[str, float]:
        """Depth by site: 0 in the first block, 1 in the last."""
        last = max(1, max(self.block.values()))
        return {name: block / last for name, block in self.block.items()}

    def option(self, site: str, decision: Decision) -> Option:
        """The option of a decision at a site; raises KeyError where it is none."""
        return self._options[site, decision.label]

    @cached_property
    def _options(self) -> dict[tuple[str, str], Option]:
        return {(site.name, option.label): option for site in self.sites for option in site.options}

    def covers(self, policy: Policy) -> bool:
        """Whether every decision of the policy is an option here, as none need be of a policy from an earlier, larger space."""
        return all((site.name, policy.at(site.name)[0].label) in self._options for site in self.sites)

    def sum_ms(self, policy: Policy) -> float:
        """Sum of the sites' kernel latencies, as they count in a whole model."""
        return sum(self.option(site.name, policy.at(site.name)[0]).model_ms for site in self.sites)

    def also_ms(self, cost: WorkloadCost, policy: Policy) -> float:
        """`sum_ms` in another workload."""
        indices = self.problem.indices(policy)
        return sum(own[j] for own, j in zip(cost.model_ms, indices, strict=True))

    def loss(self, policy: Policy) -> float:
        """Additive predicted loss, nats per token."""
        return sum(self.option(site.name, policy.at(site.name)[0]).loss for site in self.sites)

    def size_bytes(self, policy: Policy) -> int:
        """Stored bytes of the whole model."""
        return self.other_bytes + sum(self.option(site.name, policy.at(site.name)[0]).size_bytes for site in self.sites)

    def bits_per_weight(self, policy: Policy) -> float:
        """Mean stored bits of a weight of the sites."""
        weights = sum(site.n_weights for site in self.sites)
        bits = sum(self.option(s.name, policy.at(s.name)[0]).bits_per_weight * s.n_weights for s in self.sites)
        return bits / weights

    def format_at(self, policy: Policy, site: str) -> Format:
        """The format that a policy gives a site."""
        return parse_format(self.option(site, policy.at(site)[0]).format)

    def mix(self, policy: Policy) -> dict[str, int]:
        """How many sites take each format, the commonest first."""
        counts: dict[str, int] = {}
        for site in self.sites:
            name = self.option(site.name, policy.at(site.name)[0]).format
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def by_format(policy: Policy) -> Policy:
    """The policy with plain rounding to the same formats in place of its methods: what its speed depends on."""
    return Policy(
        {
            site: tuple(d if d == DENSE else Decision.of("rtn", format=str(d.knob("format"))) for d in decisions)
            for site, decisions in policy.sites.items()
        }
    )


def is_mixed(prepared: Prepared, policy: Policy) -> bool:
    """Whether a policy gives different sites different formats."""
    return len(prepared.mix(policy)) > 1
