"""What the report says of where loss and time sit, of a millisecond's price, and of predictions that were put to the test."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from methods.policy import Policy
from predictors.latency import LatencyModel, Run, fit_latency
from predictors.loss import PredictorReport
from search.config import RunConfig, to_toml
from search.frontier import Candidate
from search.prepared import ModelFacts, Option, Prepared, SiteOptions, TargetFacts
from search.report.honesty import Pair, draw_pairs, latency_panel, loss_panel
from search.report.limits import Limit, limits, shares, slopes
from search.report.page import page, write_page
from search.results import saved_prepared
from tests.search.reports import data, predicted

W4, W8 = "gptq:format=w4a8-g64", "gptq:format=w8a8-g64"


def prepared() -> Prepared:
    """Two kinds in three blocks: the dense choice, 8 bits and 4 bits; later blocks mind more."""
    sites = tuple(
        SiteOptions(
            f"{block}.{kind}",
            kind,
            block,
            100,
            (
                Option("none", "bf16", 16.0, 200, 4.0 * size, "dense", 4.0 * size),
                Option(W8, "w8a8-g64", 8.25, 103, 2.0 * size, "grouped", 2.0 * size, 0.01 * (block + 1)),
                Option(W4, "w4a8-g64", 4.25, 53, 1.0 * size, "grouped", 1.0 * size, 0.1 * (block + 1) * size),
            ),
        )
        for block in range(3)
        for kind, size in (("o", 1.0), ("down", 2.0))
    )
    runs = [Run(str(i), ms, 5 + 1.5 * ms, 5 + 1.5 * ms, 5 + 1.5 * ms) for i, ms in enumerate((9.0, 12.0, 18.0, 27.0, 36.0))]
    model: LatencyModel = fit_latency(runs)
    target: TargetFacts = {"name": "cpu", "description": "a box", "fingerprint": "0", "threads": 1}
    facts: ModelFacts = {"label": "m", "digest": "0", "notes": []}
    return Prepared(sites, model.to_dict(), (59.0, 58.0, 60.0), "dense bf16", 10, facts, target, {})


def policy(**labels: str) -> Policy:
    own = {site.name: next(o.label for o in site.options) for site in prepared().sites}
    return prepared().problem.policy(
        [[o.label for o in site.options].index(labels.get(site.kind, own[site.name])) for site in prepared().sites]
    )


def test_the_costliest_layers_come_first_with_what_pays_best() -> None:
    found = limits(prepared(), policy(o=W8, down=W4), most=4)
    assert [(limit.kind, limit.block) for limit in found] == [("down", 2), ("down", 1), ("down", 0), ("o", 2)]
    # From 0.6 nats at 2 ms: 8 bits save 0.57 for 2 ms, dense 0.6 for 6 ms.
    assert found[0] == Limit("down", 2, "w4a8-g64", pytest.approx(0.6), 2.0, "w8a8-g64", pytest.approx(0.57), 2.0)
    assert found[3] == Limit("o", 2, "w8a8-g64", pytest.approx(0.03), 2.0, "bf16", pytest.approx(0.03), 2.0)
    assert limits(prepared(), Policy())[0].wider == ""


def test_the_shares_add_up_to_the_predicted_latency() -> None:
    own = policy(o=W8, down=W4)
    found = shares(prepared(), own, pace=2.0)
    assert [share.what for share in found[:2]] == ["o", "down"] and found[2].what.startswith("all else")
    assert [share.ms for share in found] == pytest.approx([2 * 1.5 * 6, 2 * 1.5 * 6, 2 * 5], rel=1e-3)
    assert sum(share.ms for share in found) == pytest.approx(2 * prepared().map.predict(prepared().sum_ms(own)).mean)


def test_no_share_is_above_the_whole() -> None:
    """A map whose line starts below zero gives the kernels more than the whole takes."""
    map_ = prepared().map
    assert isinstance(map_, LatencyModel)
    own = policy(o=W8, down=W4)
    below = replace(prepared(), latency={**prepared().latency, "b0": -4.0})
    found, whole = shares(below, own), below.map.predict(below.sum_ms(own)).mean
    assert [share.ms for share in found] == pytest.approx([whole / 2, whole / 2, 0.0])


def test_a_milliseconds_price_is_the_slope_to_the_next() -> None:
    curve: list[Candidate] = [predicted(0.5, 4.0), predicted(0.1, 6.0), predicted(0.05, 6.5)]
    assert slopes(curve) == pytest.approx([0.2, 0.1, 0.0])
    assert slopes([]) == []


def test_a_policy_of_another_space_is_not_covered() -> None:
    assert prepared().covers(policy(o=W8, down=W4))
    narrow = replace(prepared(), sites=tuple(replace(site, options=site.options[:2]) for site in prepared().sites))
    assert not narrow.covers(policy(o=W8, down=W4)) and narrow.covers(policy(o=W8))


def test_pairs_are_told_by_whether_they_held() -> None:
    assert Pair(1.0, 0.9, 1.1, 1.1).held and not Pair(1.0, 0.9, 1.1, 1.2).held
    one = draw_pairs([latency_panel("decode", [Pair(0.6, 0.5, 0.7, 0.65)])])
    assert one.startswith(b"\x89PNG") and one == draw_pairs(
        [latency_panel("decode", [Pair(0.6, 0.5, 0.7, 0.65)]), loss_panel([])]
    )
    assert one != draw_pairs([latency_panel("decode", [Pair(0.6, 0.5, 0.7, 0.75)])])


@pytest.mark.parametrize(
    ("pairs", "ticks"),
    [
        ([Pair(0.00001, 0.00001, 0.00003, 0.00001), Pair(0.02, 0.01, 0.03, 0.015)], ["1e-5", "0.0001", "0.001", "0.01"]),
        ([Pair(0.012, 0.01, 0.02, 0.013), Pair(0.02, 0.01, 0.03, 0.02)], ["0.01", "0.02"]),
    ],
)
def test_axes_of_losses_have_numbers_and_no_mathematics(pairs: list[Pair], ticks: list[str]) -> None:
    svg = draw_pairs([loss_panel(pairs)], "svg").decode()
    assert "$" not in svg and "mathdefault" not in svg
    assert all(svg.count(f"<!-- {tick} -->") == 2 for tick in ticks), [tick for tick in ticks if f"<!-- {tick} -->" not in svg]


def test_the_page_tells_them_and_does_without() -> None:
    text = page(data())
    for words in ("What limits it", "a token&#x27;s time", "w8a8-token: 0.045 nats for 20 µs", "nothing wider helps", "25%"):
        assert words in text, words
    bare = page(
        data(limits=(), shares=(), latency_pairs={}, predictor=PredictorReport(6, 0.9, 0.9, None, 0, 0.1, 0.9, 0.9, ()))
    )
    assert "What limits it" not in bare and "against measured" not in bare
    assert "Modelled against measured: decode" in text and "Predicted against measured: KL" in text


def _scaled(candidate: Candidate, scale: float) -> Candidate:
    return replace(candidate, kl=candidate.kl * scale, kl_stderr=candidate.kl_stderr * scale)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_overflow(width: int, scale: float, tmp_path: Path) -> None:
    """The script runs, the controls appear, the plot has every policy, and nothing but tables scrolls sideways."""
    shown = data()
    entries = tuple(replace(entry, candidate=_scaled(entry.candidate, scale)) for entry in shown.measured)
    predicted = tuple(_scaled(candidate, scale) for candidate in shown.predicted)
    write_page(replace(shown, measured=entries, predicted=predicted), tmp_path / "report.html")
    probe = (
        "<script>document.body.dataset.probe = [document.documentElement.scrollWidth - innerWidth, "
        "document.querySelectorAll('#plot circle').length, document.getElementById('explorer').hidden, "
        "document.getElementById('best').textContent.length > 20, touching].join()</script></body>"
    )
    # Of the letters in the plot: those of an axis must not run into each other or into its title.
    boxes = (
        "<script>const texts = [...document.querySelectorAll('#plot text')].map((each) => each.getBoundingClientRect()); "
        "const touching = texts.filter((a, i) => texts.some((b, j) => i !== j && a.left < b.right && b.left < a.right && "
        "a.top < b.bottom && b.top < a.bottom)).length;</script>"
    )
    path = tmp_path / "probed.html"
    path.write_text((tmp_path / "report.html").read_text().replace("</body>", boxes + probe))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(["chromium", *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    overflow, circles, hidden, told, touching = done.stdout.split('data-probe="')[1].split('"')[0].split(",")
    assert (circles, hidden, told) == ("6", "false", "true")
    assert int(overflow) <= 0 and touching == "0"


def test_a_study_of_an_earlier_version_takes_its_workload_from_the_configuration(tmp_path: Path) -> None:
    old = {name: value for name, value in prepared().to_json().items() if name != "workload"}
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "prepared.json").write_text(json.dumps({"key": "", "value": old}))
    (tmp_path / "config.toml").write_text(to_toml(RunConfig(workload="decode:batch=2,context=64")))
    assert saved_prepared(tmp_path).workload == "decode:batch=2,context=64"
