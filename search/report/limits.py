"""Where an answer's loss and time sit, by the model that the search priced it with: what limits it, and what widening would buy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from methods.policy import Policy
from search.frontier import Candidate
from search.prepared import Option, Prepared

BUYS = "1 ms more buys"
"""The score of a predicted candidate: nats per token that a millisecond more buys, as far as the next one."""

MOST = 8
"""Sites that are told."""


@dataclass(frozen=True)
class Limit:
    """A site of the answer that costs much. loss, saved: predicted nats per token; ms, more_ms: modelled, of its kernels in the model.

    wider: the format that saves most for its time, "" where nothing better is left.
    """

    kind: str
    block: int
    format: str
    loss: float
    ms: float
    wider: str = ""
    saved: float = 0.0
    more_ms: float = 0.0


@dataclass(frozen=True)
class Share:
    """A part of a token's latency: the kernels of one kind of site, or what no decision changes; ms by the fitted map."""

    what: str
    ms: float


def limits(prepared: Prepared, policy: Policy, most: int = MOST) -> tuple[Limit, ...]:
    """The sites of largest predicted loss, that first."""
    found = []
    for site in prepared.sites:
        chosen = prepared.option(site.name, policy.at(site.name)[0])
        better = [option for option in site.options if option.loss < chosen.loss and option.model_ms > chosen.model_ms]
        limit = Limit(site.kind, site.block, chosen.format, chosen.loss, chosen.model_ms)
        if better:
            best = max(better, key=lambda option: _rate(option, chosen))
            limit = Limit(
                *(site.kind, site.block, chosen.format, chosen.loss, chosen.model_ms, best.format),
                saved=chosen.loss - best.loss,
                more_ms=best.model_ms - chosen.model_ms,
            )
        found.append(limit)
    return tuple(sorted(found, key=lambda limit: -limit.loss)[:most])


def _rate(option: Option, chosen: Option) -> float:
    return (chosen.loss - option.loss) / (option.model_ms - chosen.model_ms)


def shares(prepared: Prepared, policy: Policy, pace: float = 1.0) -> tuple[Share, ...]:
    """A policy's modelled latency, times `pace`, by kind of site, the largest first, and last the rest that no decision changes.

    Where the map takes more for the kernels than the whole, so that the rest would be negative, the kernels share the whole.
    """
    by_kind: dict[str, float] = {}
    for site in prepared.sites:
        ms = prepared.option(site.name, policy.at(site.name)[0]).model_ms
        by_kind[site.kind] = by_kind.get(site.kind, 0.0) + prepared.map.b1 * ms
    whole, kernels = prepared.map.predict(prepared.sum_ms(policy)).mean, sum(by_kind.values())
    if kernels > whole > 0:
        by_kind, kernels = {kind: ms * whole / kernels for kind, ms in by_kind.items()}, whole
    rest = whole - kernels
    ordered = sorted(by_kind.items(), key=lambda item: -item[1])
    ordered.append(("all else: attention, norms, embeddings, head, framework", rest))
    return tuple(Share(what, ms * pace) for what, ms in ordered)


def slopes(curve: Sequence[Candidate]) -> list[float]:
    """Nats per token that one more millisecond buys at each candidate of a frontier in order of latency, up to the next; 0 at the last."""
    pairs = itertools.pairwise(curve)
    return [*((a.kl - b.kl) / (b.latency_ms - a.latency_ms) for a, b in pairs), 0.0][: len(curve)]
