"""Features of a policy: what a loss predictor sees of it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from methods.policy import Decision, Policy

Floats = NDArray[np.float64]

FLOOR = 1e-12
"""Scores are clipped here before a logarithm is taken, in nats per token."""

_LOW_BITS = 3.0


@dataclass(frozen=True)
class ChoiceFacts:
    """What is known of a decision at a site: additive loss score (nats per token, not negative), kernel time, stored bits a weight."""

    score: float
    latency_ms: float
    bits: float


@dataclass(frozen=True)
class SiteFacts:
    """A site's kind, its depth from 0 (first block) to 1 (last), its weights and what is known of its choices."""

    kind: str
    depth: float
    n_weights: int
    choices: Mapping[Decision, ChoiceFacts]


class Features:
    """Turns policies into numbers by table look-up.

    `names` are the columns: the log of the summed score; each kind's and each depth third's share of it; the greatest site's share; the
    share of weights stored in fewer than 3 bits, scales included; the kernel time; the mean stored bits a weight.
    """

    def __init__(self, sites: Mapping[str, SiteFacts]) -> None:
        if not sites or any(not facts.choices for facts in sites.values()):
            raise ValueError("features: needs at least one site, and a choice at every site")
        self._sites = dict(sites)
        self._position = {site: {d: j for j, d in enumerate(facts.choices)} for site, facts in sites.items()}
        width = max(len(facts.choices) for facts in sites.values())
        rows = [[(c.score, c.latency_ms, c.bits) for c in facts.choices.values()] for facts in sites.values()]
        self._facts = np.array([row + [(np.nan,) * 3] * (width - len(row)) for row in rows])
        known = self._facts[~np.isnan(self._facts)]
        if not np.isfinite(known).all() or (known < 0).any() or len(known) != 3 * sum(len(row) for row in rows):
            raise ValueError("features: scores, latencies and bits must be finite and not negative")
        self._weights = np.array([float(facts.n_weights) for facts in sites.values()])
        self._groups = _indicators(list(sites.values()))
        self.names = ("log_score", *self._groups, "max_share", "low_bit_share", "latency_ms", "bits")

    def indices(self, policies: Sequence[Policy]) -> NDArray[np.intp]:
        """(policies, sites) positions of the decisions; raises ValueError on a decision that no fact is known of."""
        found = np.zeros((len(policies), len(self._sites)), dtype=np.intp)
        for row, policy in zip(found, policies, strict=True):
            foreign = set(policy.sites) - set(self._sites)
            if foreign:
                raise ValueError(f"features: policy {policy.key()} decides {sorted(foreign)[:3]}, of which nothing is known")
            for i, (site, position) in enumerate(self._position.items()):
                decisions = policy.at(site)
                if len(decisions) != 1 or decisions[0] not in position:
                    label = " + ".join(d.label for d in decisions)
                    raise ValueError(
                        f"features: nothing is known of {label} at {site}; known are {[d.label for d in position]}"
                    )
                row[i] = position[decisions[0]]
        return found

    def score(self, policies: Sequence[Policy]) -> Floats:
        """The additive score of each policy, (policies,), at least `FLOOR`."""
        total: Floats = np.maximum(self._taken(policies)[..., 0].sum(axis=1), FLOOR)
        return total

    def latency_ms(self, policies: Sequence[Policy]) -> Floats:
        """The summed kernel time of each policy, (policies,)."""
        total: Floats = self._taken(policies)[..., 1].sum(axis=1)
        return total

    def matrix(self, policies: Sequence[Policy]) -> Floats:
        """(policies, len(names))."""
        taken = self._taken(policies)
        score, latency, bits = (taken[..., k] for k in range(3))
        total = np.maximum(score.sum(axis=1), FLOOR)
        share = score / total[:, None]
        weights = self._weights / self._weights.sum()
        groups = [share @ indicator for indicator in self._groups.values()]
        low = (bits < _LOW_BITS) @ weights
        return np.stack([np.log(total), *groups, share.max(axis=1), low, latency.sum(axis=1), bits @ weights], axis=1)

    def _taken(self, policies: Sequence[Policy]) -> Floats:
        """(policies, sites, 3): score, latency and bits of the decisions taken."""
        taken: Floats = self._facts[np.arange(len(self._sites)), self.indices(policies)]
        return taken


def _indicators(sites: Sequence[SiteFacts]) -> dict[str, Floats]:
    kinds = sorted({facts.kind for facts in sites})
    third = [min(int(facts.depth * 3), 2) for facts in sites]
    by_kind = {f"share:{kind}": np.array([float(facts.kind == kind) for facts in sites]) for kind in kinds}
    by_depth = {f"share:third{k}": np.array([float(own == k) for own in third]) for k in range(3)}
    return {**by_kind, **by_depth}
