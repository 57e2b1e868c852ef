"""The report: what it says, that it is self-contained, and that nothing from outside gets in unescaped."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from methods.policy import Decision, Policy
from predictors.intervals import Interval
from search.frontier import Fidelity, MixedKnowledge
from search.report.content import TOP1, Entry, Guard, Objective, answer
from search.report.page import page, write_page
from search.report.picture import draw, write_picture
from search.report.table import Column, Table, candidate_table, predicted_table
from search.report.terminal import WIDTH, measured_text, wrapped
from tests.search.reports import EVIL, candidate, data, predicted


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "source"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.stack:
            self.scripts.append(data)
        elif "style" not in self.stack:
            self.words += data + "\n"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(page(data()))


def test_the_page_is_whole_and_self_contained(reader: Reader) -> None:
    assert reader.stack == []
    names = {tag for tag, _ in reader.tags}
    assert not names & {"link", "iframe", "object"}
    assert all("src" not in attributes for tag, attributes in reader.tags if tag == "script")
    for _, attributes in reader.tags:
        assert "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "srcset"} & set(attributes):
            assert str(attributes[name]).startswith("data:image/svg+xml;base64,")
    assert not re.search(r"https?://|@import|url\(", page(data()))


def test_what_comes_from_outside_is_escaped(reader: Reader) -> None:
    text = page(data())
    assert EVIL not in text and text.count("<script") == 2 and 'alert("x")</script>' not in text
    assert reader.words.count(EVIL) >= 5


def test_the_page_says_all(reader: Reader) -> None:
    for words in (
        "The objective is met",
        "at most 6 ms per output token (0.6x the dense model)",
        "perplexity goes from 20.00 to 22.50 (+12.5%)",
        "the dense model's at 97.5% of positions",
        "standard error 0.01, report data",
        "The search wins beyond the noise",
        "Predicted, not measured",
        "Nobody has run these",
        "leave-one-out error 1.0% on average",
        "rank correlation 0.97 overall, not known inside",
        "KL, measured (nats/token)",
        "KL, predicted (nats/token)",
        "4,096",
    ):
        assert words in reader.words, words
    measured, separate = reader.words.split("Predicted, not measured")
    assert "solved 4.0" in separate and "solved" not in measured


def test_the_frontier_is_drawn_for_a_telephone_and_for_a_desk(reader: Reader) -> None:
    """Vectors that show at most a tenth smaller than drawn on a page of 390 px; axes and legend are in words."""
    (source,) = [attributes for tag, attributes in reader.tags if tag == "source"]
    assert source["media"] == "(max-width: 640px)"
    narrow = drawing(str(source["srcset"]))
    wide = drawing(next(str(a["src"]) for tag, a in reader.tags if tag == "img"))
    assert width_px(narrow) * 0.9 < 390 - 32 < width_px(narrow) * 1.1 and 700 < width_px(wide) < 1000
    for text in (narrow, wide):
        words = re.sub(r"\s+", " ", text)
        for said in (
            "latency (ms per output token)",
            "KL divergence from the dense model (nats per token)",
            "the answer, measured",
        ):
            assert f"<!-- {said} -->" in words, said
    assert page(data()) == page(data())


def drawing(source: str) -> str:
    """The SVG of a data URL; matplotlib notes every text that it draws in a comment."""
    return base64.b64decode(source.partition("base64,")[2]).decode()


def width_px(svg: str) -> float:
    """Of a drawing, at 96 px an inch."""
    (points,) = re.findall(r'<svg [^>]*width="([\d.]+)pt"', svg)
    return float(points) * 96 / 72


def test_the_zero_of_the_frontier_has_its_place_alone() -> None:
    """Of losses over many powers of ten the smallest lie in a linear part, whose ticks would stand on the zero."""
    entries = [Entry(candidate("dense", 0.0, 10.0), "dense"), Entry(candidate("a", 0.5, 4.0), "chosen")]
    entries += [Entry(candidate("b", 4e-6, 9.0), "search"), Entry(candidate("c", 2e-3, 6.0), "search")]
    svg = draw(data(measured=tuple(entries), predicted=()), "svg").decode()
    ticks = re.findall(r"<!-- (0|0\.0*1|1e-\d+) -->", svg)
    assert ticks == ["0", "1e-5", "0.0001", "0.001", "0.01", "0.1"]


def test_names_from_outside_are_no_mathematics() -> None:
    entries = (*data().measured[:1], Entry(candidate("a $x_{$ b", 0.2, 5.0), "chosen"))
    assert draw(data(measured=entries, model="m $\\frac$ n", predicted=()))


def test_the_map_shows_every_site(reader: Reader) -> None:
    titles = [attributes["title"] for tag, attributes in reader.tags if tag == "td" and "title" in attributes]
    assert titles == [
        "block 0: w4a8-g64",
        "block 1: bf16",
        "block 2: bf16",
        "block 0: bf16",
        "block 1: w8a8-token",
        "block 2: w4a8-g64",
    ]
    assert "w4a8-g64 (2)" in reader.words and "bf16 (3)" in reader.words
    colours = {
        str(attributes["title"]).split(": ")[1]: attributes["style"]
        for tag, attributes in reader.tags
        if tag == "td" and "title" in attributes
    }
    assert len(set(colours.values())) == 3
    other = Policy({"0.o": (Decision.of("svd"),)})
    text = page(
        data(
            sites=(("0.o", "o", 1),), measured=(*data().measured[::2], Entry(candidate("x", 0.2, 5.0, policy=other), "chosen"))
        )
    )
    assert "svd (1)" in text and 'class="none"' in text


def test_the_script_gets_every_policy_with_its_map(reader: Reader) -> None:
    study = json.loads(reader.scripts[0])
    assert [policy["name"] for policy in study["policies"]][:2] == ["other mix", "the mix"]
    assert [policy["known"] for policy in study["policies"]] == ["evaluated"] * 4 + ["predicted"] * 2
    assert f"uniform {EVIL}" in [policy["name"] for policy in study["policies"]]
    names = [form["name"] for form in study["formats"]]
    mix = study["policies"][1]["cells"]
    assert [[names[cell] for cell in row] for row in mix] == [["w4a8-g64", "bf16", "bf16"], ["bf16", "w8a8-token", "w4a8-g64"]]
    assert all(policy["stderr"] is None for policy in study["policies"] if policy["known"] == "predicted")


def test_the_script_never_calls_a_modelled_latency_measured() -> None:
    def elsewhere(entry: Entry) -> Entry:
        return replace(entry, candidate=replace(entry.candidate, latency_label="modelled", fidelity=Fidelity.PROXY))

    modelled = data(measured=tuple(map(elsewhere, data().measured)), verdict="unvalidated", latency_pairs={})
    for shown, label in ((modelled, "latency modelled and loss measured, report"), (data(), "measured, report")):
        policies = json.loads(Reader(page(shown)).scripts[0])["policies"]
        assert {policy["label"] for policy in policies if policy["known"] == "evaluated"} == {label}
        assert len([policy for policy in policies if policy["known"] == "evaluated"]) == 4


def test_other_verdicts() -> None:
    measured = tuple(entry for entry in data().measured if entry.group != "chosen")
    text = page(data(verdict="not met", measured=measured, guard=None, predicted=(), predictor=None, latency_fits=(), data=()))
    assert "The objective is not met" in text and "the fastest, other mix, takes 5 ms [4.9, 5.1]" in text
    assert "No text was used" in text and "No loss predictor was evaluated" in text and "Predicted, not measured" not in text
    assert "Not validated" in page(data(verdict="unvalidated"))
    lost = Guard(False, "uniform w4", Interval(0.0, -0.1, 0.1), 3)
    assert "does not win beyond the noise" in " ".join(answer(data(guard=lost)))
    assert "none to compare" in " ".join(answer(data(guard=Guard(False, "", None, 0))))


def test_no_perplexity_without_a_reason() -> None:
    bare = tuple(replace(entry, candidate=replace(entry.candidate, scores={})) for entry in data().measured)
    text = " ".join(answer(data(measured=bare, perplexity_note="text generated by the model")))
    assert "perplexity is not reported: text generated by the model" in text
    assert "perplexity" not in candidate_table(bare).text()


def test_measured_and_predicted_do_not_mix() -> None:
    entries = data().measured
    with pytest.raises(ValueError, match="never mixed"):
        data(predicted=(entries[2].candidate,))
    with pytest.raises(ValueError, match="never mixed"):
        data(measured=(*entries, Entry(predicted(0.1, 3.0), "search")))
    with pytest.raises(MixedKnowledge):
        candidate_table([*entries, Entry(predicted(0.1, 3.0), "search")])


def test_one_dense_and_one_answer() -> None:
    entries = data().measured
    with pytest.raises(ValueError, match="one dense entry"):
        data(measured=entries[1:])
    with pytest.raises(ValueError, match="one dense entry"):
        data(measured=(*entries, entries[1]))
    with pytest.raises(ValueError, match="needs a chosen"):
        data(measured=(entries[0], entries[2]))


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture_is_written_and_repeats(format: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"frontier.{format}"
    write_picture(data(), path)
    assert path.read_bytes().startswith(start) and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        write_picture(data(), tmp_path / "frontier.pdf")


def test_the_picture_shows_what_it_is_given() -> None:
    whole = draw(data())
    assert whole == draw(data())
    changed = [
        data(predicted=(predicted(0.5, 4.0), predicted(0.1, 5.0), predicted(0.1, 7.0))),
        data(objective=Objective("5ms", 5.2, "ms per output token", "decode:batch=1,context=8")),
        data(measured=data().measured[:3]),
        data(measured=(*data().measured, Entry(candidate("tiny", 0.001, 9.0), "search"))),
    ]
    assert len({whole, *map(draw, changed)}) == 5


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(data())
    assert dict(matplotlib.rcParams) == before


def test_the_page_is_written(tmp_path: Path) -> None:
    write_page(data(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == page(data())


def test_tables_align_and_keep_full_precision() -> None:
    columns = (
        Column("name", "policy"),
        Column("t", "latency", "ms", 3),
        Column("size", "size", "MiB", divisor=2**20),
        Column("ok", "met"),
    )
    rows = (
        {"name": "a", "t": Interval(5.0, 4.5, 5.25), "size": 3 * 2**20, "ok": True},
        {"name": "longer", "t": None, "size": 2**19, "ok": False},
    )
    table = Table(columns, rows)
    assert table.text().splitlines() == [
        "policy       latency (ms)  size (MiB)  met",
        "──────  ─────────────────  ──────────  ───",
        "a       5.00 [4.50, 5.25]       3.000  yes",
        "longer                  –      0.5000  no",
    ]
    assert json.loads(json.dumps(table.json()))[0] == {
        "name": "a",
        "t": {"mean": 5.0, "lo": 4.5, "hi": 5.25},
        "size": 3 * 2**20,
        "ok": True,
    }
    with pytest.raises(ValueError, match="lacks"):
        Table(columns, ({"name": "a"},))


def test_candidate_tables() -> None:
    lines = candidate_table(data().measured).text().splitlines()
    assert "latency, measured (ms)" in lines[0] and "KL, measured (nats/token)" in lines[0] and "perplexity" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["other", "the", "uniform", "dense"]
    assert "of dense (x)" in lines[0] and "± standard error" in lines[0] and "top-1 agreement (%)" in lines[0]
    assert "meets 0.6x" in lines[0] and [line.split().count("yes") for line in lines[2:]] == [1, 1, 1, 0]
    assert [row["ratio"] for row in candidate_table(data().measured).rows] == [0.5, 0.55, pytest.approx(0.57), 1.0]
    assert "measured, report" in lines[2]
    row = predicted_table(data().predicted).json()[0]
    assert "kl_stderr" not in row and row["label"] == "predicted" and row["size_bytes"] == 4 * 2**20


def test_a_latency_that_another_run_measured_says_so() -> None:
    own, other = Entry(candidate("own", 0.1, 5.0), "search"), Entry(candidate("other", 0.2, 4.0), "search", rescaled=True)
    labels = {row["name"]: row["label"] for row in candidate_table([own, other]).rows}
    assert labels == {"own": "measured, report", "other": "measured, report, ratio of another run"}


def test_the_terminal_shows_a_study_in_100_columns() -> None:
    long = "74 w4a8-g64-asym + 46 w8a8-token #3fa2 and whatever else there is to say of it in a name"
    met = (("0.6x", True), ("ttft=200ms", None), ("size=100MB", False))
    extra = Entry(candidate(long, 0.0213, 5.2, kl_stderr=0.0001, scores={"perplexity": 21.0, TOP1: 0.95}), "search", True, met)
    lines = measured_text(data(measured=(*data().measured, extra))).splitlines()
    assert max(map(len, lines[:-2])) <= WIDTH == 100
    table = {line.split("  ")[0].strip(): line for line in lines[3:8]}
    assert set(table) == {"1", "2", "3*", "4", "5"}
    assert re.search(r"74 w4a8.*…\s+5\.20 ±2%\s+0\.52x\s+0\.0213 ±0\.5%\s+95\.0%\s+\+5\.0%\s+5\.2\s+yes\s+–\s+no$", table["2"])
    assert re.search(r"the mix\s+5\.50 ±2%\s+0\.55x\s+0\.123 ±8%\s+97\.5%\s+\+12\.5%", table["3*"])
    assert "half its 95 % interval" in lines[-2] and "standard error" in lines[-2]
    assert lines[-1] == "* the answer; ° of another run of this study, by its ratio to dense"
    assert all(len(line) <= WIDTH for line in wrapped(["word " * 60, "one"]).splitlines())
