"""The frontier: dominance, no mixing of kinds, files."""

import csv
from pathlib import Path
from typing import Any

import pytest

from methods.policy import Decision, Policy
from search.frontier import Candidate, Fidelity, MixedKnowledge, frontier, hypervolume, write_csv


def candidate(kl: float, latency: float, **other: Any) -> Candidate:
    fields: dict[str, Any] = {
        "policy": Policy({"a": (Decision.of("rtn", kl=kl, latency=latency),)}),
        "name": f"{kl}@{latency}",
        "fidelity": Fidelity.PROXY,
        "kl_stderr": 0.01,
        "latency_lo": latency - 0.1,
        "latency_hi": latency + 0.1,
        "size_bytes": 1000,
        "role": "search",
    }
    return Candidate(kl=kl, latency_ms=latency, **{**fields, **other})


def test_keeps_what_nothing_beats_or_equals() -> None:
    points = [(0.5, 1.0), (0.3, 2.0), (0.3, 3.0), (0.4, 2.5), (0.1, 4.0), (0.1, 4.0), (0.6, 0.9), (0.2, 2.0)]
    found = [(c.kl, c.latency_ms) for c in frontier([candidate(*point) for point in points])]
    assert found == [(0.6, 0.9), (0.5, 1.0), (0.2, 2.0), (0.1, 4.0)]
    assert frontier([]) == []


def test_hypervolume_by_hand() -> None:
    points = [candidate(0.5, 1.0), candidate(0.2, 3.0), candidate(0.9, 0.5), candidate(0.1, 9.0), candidate(0.4, 3.5)]
    assert hypervolume(points, kl=0.8, latency_ms=5.0) == pytest.approx((5 - 1) * (0.8 - 0.5) + (5 - 3) * (0.5 - 0.2))
    assert hypervolume([], kl=1.0, latency_ms=1.0) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        {"fidelity": Fidelity.PREDICTED},
        {"role": "validate"},
        {"latency_label": "measured"},
        {"latency_label": "measured", "fidelity": Fidelity.MEASURED},
    ],
)
def test_kinds_of_knowledge_do_not_mix(other: dict[str, Any], tmp_path: Path) -> None:
    mixed = [candidate(0.1, 2.0), candidate(0.2, 1.0, **other)]
    for compare in (frontier, lambda c: hypervolume(c, 1.0, 9.0), lambda c: write_csv(c, tmp_path / "f.csv")):
        with pytest.raises(MixedKnowledge, match="cannot be compared"):
            compare(mixed)
    assert list(tmp_path.iterdir()) == []


def test_measured_means_that_the_latency_is_too() -> None:
    with pytest.raises(ValueError, match="not measured"):
        candidate(0.1, 2.0, fidelity=Fidelity.MEASURED, latency_label="transferred")


@pytest.mark.parametrize("other", [{"latency_lo": 3.0}, {"latency_hi": 1.0}, {"kl_stderr": -1.0}, {"kl_stderr": float("nan")}])
def test_impossible_numbers_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="candidate"):
        candidate(0.1, 2.0, **other)


def test_csv_says_what_is_known_how(tmp_path: Path) -> None:
    path = tmp_path / "new" / "frontier.csv"
    write_csv([candidate(0.1, 2.0, scores={"perplexity": 20.5}), candidate(0.2, 1.0)], path)
    rows = list(csv.DictReader(path.open()))
    assert [row["kl_nats_proxy"] for row in rows] == ["0.2", "0.1"]
    assert [row["perplexity"] for row in rows] == ["", "20.5"]
    assert rows[0]["latency_ms_modelled"] == "1.0"
    write_csv([candidate(0.3, 1.0)], path)
    assert len(list(csv.DictReader(path.open()))) == 1
    with pytest.raises(ValueError, match="no candidates"):
        write_csv([], path)
