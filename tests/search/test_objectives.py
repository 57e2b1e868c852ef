"""What can be asked for: units, workloads, several at once; and that a solver keeps all of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from methods.policy import DENSE, Decision, Policy
from predictors.assumed import AssumedMap
from profilers.workload import Workload, parse_workload
from search.config import ConfigError, RunConfig, from_arguments
from search.finalists import Finalist, Met
from search.limits import binding, median_limit, reached_bytes, tightened, under
from search.objectives import ByteLimit, Objectives, file_name, parse_bytes, parse_objective
from search.outcome import told_of
from search.prepared import Option, Prepared, SiteOptions, WorkloadCost
from search.progress import Progress
from search.run import settled
from search.strategies.presets import within_budget
from search.strategies.price import shadow_price
from search.strategies.problem import Infeasible
from search.strategies.solve import solve
from tests.search.problems import every, middle, problem

DECODE, PREFILL = parse_workload("decode:batch=4,context=128"), parse_workload("prefill:tokens=64")


def of(*workloads: Workload, **given: str) -> Objectives:
    found = Objectives.of({kind.replace("_", "-"): value for kind, value in given.items()}, workloads or (DECODE,))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("ttft", "200", "--ttft '200' has no unit"),
        ("tpot-p95", "0.8x", "x is no unit of it; write 40ms"),
        ("throughput", "50", "no unit"),
        ("throughput", "50ms", "not tokens a second"),
        ("latency", "3MB", "no unit of it"),
    ],
)
def test_times_need_their_units(kind: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_objective(text, kind)


@pytest.mark.parametrize("text", ["100", "1.5G", "-3MB", "0MB", "big", "30ms"])
def test_bytes_need_their_units(text: str) -> None:
    with pytest.raises(ValueError, match="--size"):
        parse_bytes(text, "size")


def test_amounts() -> None:
    assert parse_bytes("1.5GiB", "memory") == 1.5 * 2**30 and parse_bytes("100MB", "size") == 10**8
    assert parse_objective("1.5s", "ttft").value == 1500
    assert of(throughput="50tok/s").main.value == pytest.approx(1e3 * 4 / 50)


@pytest.mark.parametrize(
    "given",
    [
        {"latency": "0.6x"},
        {"latency": "30ms", "ttft": "200ms", "size": "100MB", "memory": "3MiB"},
        {"tpot_p95": "40ms", "throughput": "50tok/s"},
        {"ttft": "0.5x"},
    ],
)
def test_the_text_is_read_back(given: dict[str, str]) -> None:
    workloads = (DECODE, PREFILL)
    found = of(*workloads, **given)
    assert Objectives.parse(found.text, workloads) == found
    assert "/" not in file_name(found.text)


def test_a_latency_is_asked_of_every_stated_workload() -> None:
    both = of(DECODE, PREFILL, latency="0.7x")
    assert [time.workload for time in both.times] == [DECODE, PREFILL] and both.text == "0.7x"
    with_ttft = of(DECODE, PREFILL, latency="30ms", ttft="200ms")
    assert [(time.kind, time.workload) for time in with_ttft.times] == [("latency", DECODE), ("ttft", PREFILL)]


def test_a_phase_that_is_not_stated_has_the_size_of_the_one_that_is() -> None:
    assert of(DECODE, ttft="200ms").main.workload == Workload("prefill", 4, prompt=128)
    assert of(PREFILL, tpot_p95="20ms").main.workload == Workload("decode", 1, context=64)
    with pytest.raises(ValueError, match="both are asked of a prefill"):
        of(PREFILL, latency="1s", ttft="1s")


def test_bytes_alone_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="--latency 1x"):
        of(size="100MB")


def test_the_flags_and_the_saved_run_agree(tmp_path: Path) -> None:
    flags = SimpleNamespace(latency="30ms", size="100MB", workload=["decode:batch=2,context=8", "prefill:prompt=16"])
    config = from_arguments(flags)  # type: ignore[arg-type]
    assert config.objectives.text == "30ms,size=100MB" and len(config.workloads) == 2 and config.load == config.workloads[0]
    with pytest.raises(ConfigError, match="--memory"):
        RunConfig(latency="30ms", memory="lots")
    with pytest.raises(ConfigError, match="--latency is missing"):
        _ = RunConfig().objectives
    assert RunConfig(workload="prefill:prompt=16").load.phase == "prefill"


@pytest.mark.parametrize("seed", range(6))
def test_a_solver_keeps_every_limit(seed: int) -> None:
    """Against all policies, under a latency budget, a second workload's and a size."""
    p = problem(seed, n_sites=5)
    generator = np.random.default_rng(seed)
    costs = tuple(np.exp(generator.normal(0, 1, len(c))) for c in p.choices)
    budget = middle(p, 0.6)
    from search.strategies.problem import Limit

    second = Limit("prefill", costs, 0.5 * sum(c.min() for c in costs) + 0.5 * sum(c.max() for c in costs))
    limited = p.limited([second, p.size_limit(0.9 * sum(float(s.max()) for s in p.size_bytes))])
    fitting = [loss for i, (loss, ms, _) in every(p) if ms <= budget and limited.meets(i)]
    found = solve(limited, budget)
    assert limited.meets(found.indices) and found.latency_ms <= budget * (1 + 1e-9)
    assert found.loss == pytest.approx(min(fitting), rel=1e-6)
    assert found.shadow_price >= 0
    free = [loss for _, (loss, ms, _) in every(p) if ms <= budget]
    assert found.loss >= min(free)


def test_the_price_under_limits_is_the_one_without_where_they_do_not_bind() -> None:
    p = problem(3, n_sites=30)
    loose = p.limited([p.size_limit(2 * sum(float(s.max()) for s in p.size_bytes))])
    assert shadow_price(loose, middle(p)) == pytest.approx(shadow_price(p, middle(p)), rel=1e-6)
    tight = p.limited([p.size_limit(sum(float(s.min()) for s in p.size_bytes))])
    assert shadow_price(tight, p.slowest_ms) == 0.0


def test_a_limit_that_cannot_be_kept_is_named() -> None:
    p = problem(1)
    with pytest.raises(Infeasible) as caught:
        solve(p.limited([p.size_limit(1.0)]), p.slowest_ms)
    assert (caught.value.name, caught.value.unit) == ("size", "bytes")


def test_simple_policies_keep_limits_too() -> None:
    p = problem(2, n_sites=6)
    sites = {site: 0 for site in p.sites}
    everything = within_budget(p, sites, dict.fromkeys(p.sites, "o"), p.slowest_ms)
    sizes = sorted(p.totals(p.indices(preset.policy))[2] for preset in everything)
    limited = p.limited([p.size_limit(sizes[0])])
    kept = within_budget(limited, sites, dict.fromkeys(p.sites, "o"), p.slowest_ms)
    assert 0 < len(kept) < len(everything) and all(limited.meets(limited.indices(preset.policy)) for preset in kept)


def prepared(tail: float = 1.5) -> Prepared:
    """Two sites, dense or 4 bits; decode takes 2 ms outside of them, prefill 10."""
    w4 = Decision.of("rtn", format="w4a16-g64").label

    def site(name: str) -> SiteOptions:
        dense = Option(DENSE.label, "bf16", 16, 1600, 4.0, "k", model_ms=4.0)
        return SiteOptions(name, "o", 0, 800, (dense, Option(w4, "w4a16-g64", 4, 400, 1.0, "k", model_ms=1.0, loss=0.1)))

    outside, prefill = AssumedMap(2, 1, 3, 0.9, 1.2).to_dict(), AssumedMap(10, 9, 11, 0.9, 1.2).to_dict()
    also = WorkloadCost(PREFILL.name, ((20.0, 25.0), (20.0, 25.0)), prefill, (50.0, 45.0, 60.0), math.nan)
    target = {"name": "box", "description": "a box", "fingerprint": "0", "threads": 1}
    facts = {"model": {"label": "m", "digest": "0", "notes": []}, "target": target, "data": {}}
    return Prepared(
        sites=(site("a"), site("b")),
        latency=outside,
        dense_ms=(10.0, 9.0, 12.0),
        dense_name="dense",
        other_bytes=1000,
        **facts,
        tail=tail,
        also=(also,),
        kv_bytes=500,
        workload=DECODE.name,
        label="interpolated",
    )


def test_objectives_become_budgets_of_kernel_time_and_bytes() -> None:
    found = under(prepared(), of(DECODE, PREFILL, latency="8ms", ttft="57ms", size="4kB", memory="3700B"))
    prefill, memory, size = found.limits
    assert prefill.budget == pytest.approx(57 - 10) and prefill.costs[0].tolist() == [20.0, 25.0]
    assert (memory.budget, size.budget) == (3700 - 1000 - 500, 4000 - 1000)
    best = solve(found.problem, 6.0)
    assert best.indices in ((0, 1), (1, 0)) and found.problem.meets(best.indices)
    assert not found.problem.meets((0, 0)) and not found.problem.meets((1, 1))
    assert reached_bytes(found, "memory", best.policy) == 1000 + 2000 + 500
    assert found.to_json() == prepared().to_json() | {"tail": 1.5}
    assert Prepared.from_json(prepared().to_json()).also == prepared().also


def test_an_objective_that_binds_lies_between_the_best_simple_policy_and_the_fastest() -> None:
    """Dense takes 10 ms, uniform 8 bits, of which hardly any loss comes, 8 ms, and 4 bits 4 ms."""
    w8 = Option(Decision.of("rtn", format="w8a16-g64").label, "w8a16-g64", 8, 800, 3.0, "k", model_ms=3.0, loss=0.01)
    sites = tuple(replace(site, options=(*site.options, w8)) for site in prepared().sites)
    assert binding(replace(prepared(), sites=sites)) == "0.70x"
    assert binding(prepared()) == "0.40x", "with one simple policy, which is the fastest, that one"
    asked = of(DECODE, latency="auto")
    assert asked.main.auto and asked.text == "auto" and Objectives.parse("auto", (DECODE,)) == asked
    with pytest.raises(ValueError, match="not a ttft"):
        parse_objective("auto", "ttft")


def test_auto_is_replaced_by_what_binds_in_the_configuration_that_is_kept(tmp_path: Path) -> None:
    config = RunConfig(latency="auto", results=str(tmp_path), study="s", store="postgresql+psycopg://me:secret@host/name")
    chosen = settled(config, prepared(), Progress(quiet=True))
    assert chosen.objectives.text == "0.4x" and chosen == replace(config, latency="0.40x")
    kept = (tmp_path / "s" / "config.toml").read_text()
    assert 'latency = "0.40x"' in kept and "secret" not in kept
    assert settled(chosen, prepared(), Progress(quiet=True)) is chosen


def test_a_percentile_is_a_median_with_the_measured_tail() -> None:
    assert median_limit(prepared(), of(tpot_p95="12ms").main) == pytest.approx(8.0)
    with pytest.raises(ConfigError, match="tail of its steps is not known"):
        under(prepared(tail=math.nan), of(tpot_p95="12ms"))


def test_a_workload_that_was_not_prepared_is_no_guess() -> None:
    other = parse_workload("decode:batch=1,context=9")
    with pytest.raises(ConfigError, match=r"prepared for decode:batch=4,context=128, prefill:batch=1,prompt=64, not for"):
        under(prepared(), of(other, latency="5ms"))


def test_what_was_exceeded_is_narrowed() -> None:
    found = under(prepared(), of(DECODE, PREFILL, latency="8ms", ttft="60ms", size="4kB"))
    narrower = tightened(found, {found.limits[0].name: 1.1, found.limits[1].name: 2.0})
    assert narrower.limits[0].budget == pytest.approx(50 * 0.99 / 1.1)
    assert narrower.limits[1].budget == found.limits[1].budget


def test_a_finalist_keeps_what_it_reached() -> None:
    met = (Met("0.7x (w)", 0.6, 0.5, 0.65, 0.7, "x", True), Met("size=1MB", 2e6, 2e6, 2e6, 1e6, "bytes", False))
    finalist = Finalist("a", Policy(), False, 1, 1, 1, 1, 1, 1, 1, False, 10, met=met, label="transferred")
    assert Finalist.from_json(finalist.to_json()) == finalist
    assert finalist.over == pytest.approx(0.65 / 0.7)
    assert ByteLimit(10**8, "size").text == "size=100MB" and ByteLimit(3 * 2**20, "memory").text == "memory=3MiB"


def test_what_is_met_is_told_in_the_words_that_were_asked() -> None:
    one = Met("0.6x (decode:batch=1,context=8)", 0.5, 0.5, 0.55, 0.6, "x", True)
    two = Met("0.6x (prefill:batch=1,prompt=8)", 0.7, 0.7, 0.75, 0.6, "x", False)
    size = Met("size=100MB", 90e6, 90e6, 90e6, 100e6, "bytes", True)
    finalist = Finalist("a", Policy(), False, 5, 4, 6, 1, 1, 1, 1, False, 10, met=(one, size))
    assert told_of(finalist, (one, size), "0.6x,size=100MB", None) == (("0.6x", True), ("size=100MB", True))
    assert [name for name, _ in told_of(finalist, (one, two), "0.6x", None)[:2]] == [one.name, two.name]
    assert told_of(finalist, (one, size), "", 6.5) == (("0.6x", True), ("size=100MB", None))
    assert told_of(finalist, (one, size), "", 5.5) == (("0.6x", False), ("size=100MB", None))
    assert told_of(replace(finalist, met=()), (), "5ms", None) == (("5ms", False),)
