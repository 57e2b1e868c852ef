"""Candidates and their frontier: one kind of knowledge at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from methods.atomic import write_text
from methods.policy import Policy
from profilers.label import Label


class Fidelity(Enum):
    """How a candidate is known.

    PREDICTED: from scores and kernel times; PROXY: true KL on some tokens, latency from the fitted map; MEASURED: the materialised
    model's KL on held-out text and its end-to-end latency.
    """

    PREDICTED = "predicted"
    PROXY = "proxy"
    MEASURED = "measured"


@dataclass(frozen=True)
class Candidate:
    """A policy with what is known of it.

    kl: nats per token against the dense model, with its standard error (0 where it is predicted); latency_lo, latency_hi: interval
    in ms; size_bytes: the decided weights as stored; scores: further numbers by name (perplexity, task scores);
    role: the data that the KL was computed on (`search`, `validate`, `report`), "" where it is predicted;
    latency_label: where the latency comes from; a MEASURED candidate has a measured one.
    """

    policy: Policy
    name: str
    fidelity: Fidelity
    kl: float
    kl_stderr: float
    latency_ms: float
    latency_lo: float
    latency_hi: float
    size_bytes: int
    scores: Mapping[str, float] = field(default_factory=dict)
    role: str = ""
    latency_label: Label = "modelled"

    def __post_init__(self) -> None:
        numbers = (self.kl, self.kl_stderr, self.latency_lo, self.latency_ms, self.latency_hi)
        if (
            not np.isfinite(numbers).all()
            or self.kl_stderr < 0
            or not 0 <= self.latency_lo <= self.latency_ms <= self.latency_hi
        ):
            raise ValueError(
                f"candidate {self.name!r}: kl={self.kl} ± {self.kl_stderr}, latency {self.latency_lo} <= {self.latency_ms} <= "
                f"{self.latency_hi} ms; all must be finite, errors not negative, the interval around its value"
            )
        if self.fidelity is Fidelity.MEASURED and self.latency_label != "measured":
            raise ValueError(f"candidate {self.name!r}: its latency is {self.latency_label}, so it is a proxy, not measured")


class MixedKnowledge(ValueError):
    """Candidates that are known in different ways were to be compared."""


def check_one_kind(candidates: Sequence[Candidate]) -> None:
    """Raises `MixedKnowledge` unless all share fidelity, data role and the origin of their latency."""
    kinds = sorted({f"{c.fidelity.value} ({c.role or 'no data'}, latency {c.latency_label})" for c in candidates})
    if len(kinds) > 1:
        raise MixedKnowledge(f"these candidates cannot be compared: {', '.join(kinds)}; make one frontier for each kind")


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats or equals in KL and latency, the fastest first. Raises `MixedKnowledge`."""
    check_one_kind(candidates)
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.latency_ms, c.kl, c.policy.key())):
        if not kept or candidate.kl < kept[-1].kl:
            kept.append(candidate)
    return kept


def hypervolume(candidates: Sequence[Candidate], kl: float, latency_ms: float) -> float:
    """Area in nats * ms that the candidates dominate below the reference point (kl, latency_ms); those beyond it add nothing."""
    area, ceiling = 0.0, kl
    for candidate in frontier(candidates):
        if candidate.latency_ms < latency_ms and candidate.kl < ceiling:
            area += (latency_ms - candidate.latency_ms) * (ceiling - candidate.kl)
            ceiling = candidate.kl
    return area


def write_csv(candidates: Sequence[Candidate], path: Path) -> None:
    """Writes `csv_text` in one step."""
    write_text(path, csv_text(candidates))


def csv_text(candidates: Sequence[Candidate]) -> str:
    """Candidates of one kind as CSV, the fastest first; the KL column carries the kind in its name.

    Raises `MixedKnowledge`, and ValueError on no candidate.
    """
    if not candidates:
        raise ValueError("frontier: no candidates to write")
    check_one_kind(candidates)
    kind = candidates[0].fidelity.value
    scores = sorted({name for candidate in candidates for name in candidate.scores})
    latency = f"latency_ms_{candidates[0].latency_label}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "name",
            "policy",
            "role",
            f"kl_nats_{kind}",
            "kl_stderr",
            latency,
            "latency_lo_ms",
            "latency_hi_ms",
            "size_bytes",
            *scores,
        ]
    )
    for c in sorted(candidates, key=lambda c: (c.latency_ms, c.kl, c.name)):
        row = [c.name, c.policy.key(), c.role, c.kl, c.kl_stderr, c.latency_ms, c.latency_lo, c.latency_hi, c.size_bytes]
        writer.writerow([*row, *(c.scores.get(name, "") for name in scores)])
    return text.getvalue()
