"""`Prepared`: everything a solver needs to know of a study, as plain values. Imports no torch, so that re-solving is instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from methods.formats.format import Format, parse_format
from methods.policy import Decision, Policy
from predictors.latency import LatencyModel
from search.strategies.problem import Problem


@dataclass(frozen=True)
class Option:
    """One choice at one site: its price and its predicted loss.

    ms: measured cold latency of the site's kernels at the workload's tokens in flight; model_ms: the same as it counts in a whole
    model, where some kernels meet warmer caches than others; kernel: the one that is fastest there; loss: nats per token, predicted,
    with its standard error.
    """

    label: str
    format: str
    bits_per_weight: float
    size_bytes: int
    ms: float
    kernel: str
    model_ms: float = 0.0
    loss: float = 0.0
    loss_stderr: float = 0.0


@dataclass(frozen=True)
class SiteOptions:
    """A site with its options, the dense one first."""

    name: str
    kind: str
    block: int
    n_weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Prepared:
    """A study before its objective: sites with priced and scored options, and the map from their sum to the whole model.

    fixed_ms: cost of what no decision changes but the table has measured (the output projection); dense_ms: median latency of the
    dense reference with its 95 % interval; other_bytes: everything outside the sites.
    """

    sites: tuple[SiteOptions, ...]
    latency: Mapping[str, Any]
    dense_ms: tuple[float, float, float]
    dense_name: str
    other_bytes: int
    model: Mapping[str, Any]
    target: Mapping[str, Any]
    data: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prepared:
        """Inverse of `to_json`."""
        sites = tuple(
            SiteOptions(**{**site, "options": tuple(Option(**option) for option in site["options"])}) for site in data["sites"]
        )
        return cls(**{**data, "sites": sites, "dense_ms": tuple(data["dense_ms"]), "notes": tuple(data["notes"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @cached_property
    def map(self) -> LatencyModel:
        """The whole-model latency map."""
        return LatencyModel.from_dict(self.latency)

    @cached_property
    def problem(self) -> Problem:
        """The multiple-choice problem of all sites."""
        return Problem(
            tuple(site.name for site in self.sites),
            tuple(tuple(Decision.parse(option.label) for option in site.options) for site in self.sites),
            tuple(np.array([option.loss for option in site.options]) for site in self.sites),
            tuple(np.array([option.model_ms for option in site.options]) for site in self.sites),
            tuple(np.array([option.size_bytes for option in site.options], dtype=np.float64) for site in self.sites),
        )

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


def is_mixed(prepared: Prepared, policy: Policy) -> bool:
    """Whether a policy gives different sites different formats."""
    return len(prepared.mix(policy)) > 1
