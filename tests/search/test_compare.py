"""Studies side by side: what is shown, what is left out, and what a reader is warned of."""

from dataclasses import replace
from pathlib import Path

import pytest

from search.report.compare import cautions, compare, write_comparison
from search.report.content import DataUse, Entry
from tests.search.reports import candidate, data


def test_every_study_is_shown_relative_to_its_own_dense_model() -> None:
    slower = data(measured=tuple(_slower(entry) for entry in data().measured))
    table = compare({"a": data(), "b": slower})
    rows = [(row["study"], row["name"], row["ratio"]) for row in table.rows if row["group"] == "the answer"]
    assert rows == [("a", "the mix", pytest.approx(0.55)), ("b", "the mix", pytest.approx(0.55))]
    assert "of dense" in table.text() and "perplexity" in table.text()


def test_policies_that_another_beats_are_left_out_on_request() -> None:
    beaten = Entry(candidate("beaten", 0.5, 5.6), "search")
    study = data(measured=(*data().measured, beaten))
    shown = [row["name"] for row in compare({"a": study, "b": data()}).rows if row["study"] == "a"]
    every = [row["name"] for row in compare({"a": study, "b": data()}, frontier_only=False).rows if row["study"] == "a"]
    assert "beaten" not in shown and "beaten" in every and "other mix" in shown


def test_one_study_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="1 studies; give two or more"):
        compare({"a": data()})


def test_readers_are_warned_of_what_does_not_compare() -> None:
    assert cautions({"a": data(), "b": data()}) == []
    other = data(
        target="another machine",
        data=(DataUse("report", "x", 1, "ffff"),),
        provenance=(("model digest", "1234"),),
    )
    found = cautions({"a": data(provenance=(("model digest", "5678"),)), "b": other})
    assert [text.split(": ")[1].split(" differs")[0] for text in found] == ["model", "target", "report text"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_written(tmp_path: Path, suffix: str) -> None:
    write_comparison({"a": data(), "b": data()}, tmp_path / f"c.{suffix}")
    head = (tmp_path / f"c.{suffix}").read_bytes()[:8]
    assert head.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
        write_comparison({"a": data(), "b": data()}, tmp_path / "c.gif")


def _slower(entry):
    c = entry.candidate
    slow = replace(c, latency_ms=c.latency_ms * 3, latency_lo=c.latency_lo * 3, latency_hi=c.latency_hi * 3)
    return replace(entry, candidate=slow)
