"""What is refused before it is measured, and what is left to the measurement: only the map's certainty refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from methods.policy import DENSE, Decision
from predictors.assumed import AssumedMap
from predictors.latency import Run, fit_latency
from profilers.kernels import build
from profilers.kernels.catalogue import why_none
from profilers.target import local_cpu
from profilers.workload import parse_workload
from search.config import ConfigError, RunConfig
from search.limits import Unreachable, check_bytes, check_faster, under
from search.prepared import Option, Prepared, SiteOptions, WorkloadCost
from search.progress import Progress
from search.resolved import describe_solution, resolve, solved
from search.run import run_study
from spaces.space import Choice, Space

W4 = Decision.of("rtn", format="w4a16-g64").label
W2 = Decision.of("rtn", format="w2a16-g64").label
DECODE = "decode:batch=1,context=16"
PREFILL = parse_workload("prefill:prompt=64")


def fitted(error: float) -> dict[str, object]:
    """A map of `2 ms + kernels` from runs that lie off it by so much, in turns."""
    runs = [
        Run(f"p{k}", s, t := (2 + s) * (1 + error * (-1) ** k), t * 0.999, t * 1.001)
        for k, s in enumerate(np.linspace(2.0, 8.0, 20))
    ]
    return fit_latency(runs).to_dict()


def prepared(map_: dict[str, object], label: str = "measured", prefill: dict[str, object] | None = None) -> Prepared:
    """Two sites: dense 4 ms, 4 bits 1 ms, and 2 bits, which are slower than 4 bits but smaller."""

    def site(name: str) -> SiteOptions:
        options = (
            Option(DENSE.label, "bf16", 16, 1600, 4.0, "k", model_ms=4.0),
            Option(W4, "w4a16-g64", 4, 400, 1.0, "k", model_ms=1.0, loss=0.1),
            Option(W2, "w2a16-g64", 2, 200, 1.5, "k", model_ms=1.5, loss=0.4, fast=False),
        )
        return SiteOptions(name, "o", 0, 800, options)

    also = WorkloadCost(PREFILL.name, ((20.0, 25.0, 26.0),) * 2, prefill or map_, (50.0, 45.0, 60.0), 1.5)
    facts = {"model": {}, "target": {"name": "box"}, "data": {}}
    return Prepared(
        (site("a"), site("b")), map_, (10.0, 9.9, 10.1), "dense", 1000, **facts, also=(also,), workload=DECODE, label=label
    )  # type: ignore[arg-type]


def asked(**flags: str) -> RunConfig:
    return RunConfig(workload=(DECODE, PREFILL.name) if "ttft" in flags else DECODE, **flags)  # type: ignore[arg-type]


def test_without_limits_on_bytes_only_fast_options_are_solved_among() -> None:
    study = prepared(fitted(0.01))
    narrow, wide = (under(study, asked(latency="0.6x", **more).objectives) for more in ({}, {"size": "100kB"}))
    assert [[option.label for option in site.options] for site in narrow.sites] == [[DENSE.label, W4]] * 2
    assert narrow.also[0].model_ms == ((20.0, 25.0),) * 2
    assert wide.sites == study.sites and wide.also == study.also


def test_an_objective_that_a_sure_map_excludes_is_refused() -> None:
    config = asked(latency="0.3x")
    with pytest.raises(
        Unreachable, match=r"--latency 0.3x \(3 ms\) cannot be met on box: the fastest legal policy takes about 4.01 ms"
    ):
        solved(under(prepared(fitted(0.01)), config.objectives), config.objective, config)


def test_an_objective_that_the_maps_error_leaves_open_is_measured() -> None:
    config = asked(latency="0.3x")
    study = under(prepared(fitted(0.39)), config.objectives)
    assert study.map.predict(2.0).lo < 3 < study.map.predict(2.0).mean
    _, found = solved(study, config.objective, config)
    assert found.solution.latency_ms == 2.0 and found.limit_ms == pytest.approx(3.0)
    assert "it will be measured" in describe_solution(study, found, config)


def test_with_a_size_the_nearest_policy_that_keeps_it_is_measured() -> None:
    """The time is expected to be met by 4 bits everywhere; the size takes 2 bits at one site, whose time is expected to miss it."""
    study = prepared(fitted(0.39))
    ms = f"{study.map.predict(2.25).mean:.3f}ms"
    alone, both = asked(latency=ms), asked(latency=ms, size="1600B")
    assert resolve(under(study, alone.objectives), alone.objective, alone).solution.latency_ms == 2.0
    with pytest.raises(Unreachable, match=r"--size 1600B cannot be met on box together with --latency"):
        resolve(under(study, both.objectives), both.objective, both)
    kept, found = solved(under(study, both.objectives), both.objective, both)
    assert found.solution.latency_ms == 2.5 and kept.problem.meets(found.solution.indices)


def test_bytes_are_exact_and_refused_whatever_the_map_says() -> None:
    config = asked(latency="0.9x", size="1200B")
    with pytest.raises(Unreachable, match="--size 1200B cannot be met"):
        solved(under(prepared(fitted(0.39)), config.objectives), config.objective, config)


def test_another_workloads_time_is_refused_only_where_its_map_is_sure() -> None:
    config = asked(latency="0.9x", ttft="35ms")
    for error, possible in ((0.39, True), (0.005, False)):
        study = under(prepared(fitted(0.01), prefill=fitted(error)), config.objectives)
        if possible:
            kept, found = solved(study, config.objective, config)
            assert kept.problem.meets(found.solution.indices)
        else:
            with pytest.raises(Unreachable, match="--ttft 35ms cannot be met"):
                solved(study, config.objective, config)


def test_where_nothing_will_be_measured_the_expectation_decides() -> None:
    config = asked(latency="0.3x")
    study = under(prepared(AssumedMap(2, 0, 4, 0.5, 1.5).to_dict(), "interpolated"), config.objectives)
    with pytest.raises(Unreachable, match=r"Ask for 0.4x or more\."):
        solved(study, config.objective, config)


@pytest.mark.parametrize(
    ("flags", "asking"),
    [
        ({"latency": "3ms"}, "--latency 3ms"),
        ({"throughput": "400tok/s"}, "--throughput 400tok/s"),
        ({"tpot_p95": "3ms"}, "--tpot-p95 3ms"),
    ],
)
def test_the_flag_that_was_given_is_blamed_and_the_way_out_is_in_its_unit(flags: dict[str, str], asking: str) -> None:
    config = asked(**flags)
    study = under(replace(prepared(fitted(0.005)), tail=1.5), config.objectives)
    with pytest.raises(Unreachable) as error:
        solved(study, config.objective, config)
    assert str(error.value).startswith(f"{asking} (")
    ask = str(error.value).rpartition("Ask for ")[2].split(" ")[0]
    again = asked(**{name: ask for name in flags})
    assert solved(under(study, again.objectives), again.objective, again)[1].solution.latency_ms == 2.0


def test_that_no_format_is_faster_than_dense_is_said_as_such() -> None:
    config = asked(latency="0.9x")
    study = prepared(fitted(0.01))
    dense = tuple(replace(site, options=site.options[:1]) for site in study.sites)
    with pytest.raises(Unreachable, match="no format here is faster than dense bf16, which takes 10 ms"):
        solved(under(replace(study, sites=dense, also=()), config.objectives), config.objective, config)
    with pytest.raises(
        Unreachable, match=r"--latency 0.9x cannot be met on box: no format here is faster than dense bf16 in decode"
    ):
        check_faster(config.objectives, dense, "box")
    check_faster(config.objectives, study.sites, "box")
    for latency in ("1x", "50x", "20ms", "auto"):
        with pytest.raises(
            Unreachable, match=r"there is nothing to search on box: no format .* at none of 2 sites\. Use the dense"
        ):
            check_faster(asked(latency=latency).objectives, dense, "box")


def test_a_size_below_everything_is_refused_from_the_space_alone() -> None:
    sites = tuple(SimpleNamespace(name=name, n_weights=800) for name in "ab")
    structure = SimpleNamespace(sites=sites, n_parameters=2600)
    choices = (Choice(DENSE, None, 16.0, 1600), Choice(Decision.parse(W4), None, 4.0, 400))  # type: ignore[arg-type]
    space = Space({site.name: choices for site in sites}, {})
    about = structure, space, 16, 500
    least = 2 * 400 + 1000 * 2
    for flags, value in (({"size": f"{least}B"}, least), ({"memory": f"{least + 500}B"}, least + 500)):
        check_bytes(asked(latency="1x", **flags).objectives, *about)  # type: ignore[arg-type]
        (name,) = flags
        with pytest.raises(Unreachable, match=f"--{name} {value - 1}B cannot be met: the smallest legal policy takes"):
            check_bytes(asked(latency="1x", **{name: f"{value - 1}B"}).objectives, *about)  # type: ignore[arg-type]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(build, "compiler", lambda: None)
    build._loaded.cache_clear()
    yield
    build._loaded.cache_clear()


def test_no_compiler_is_the_first_thing_that_is_said(no_compiler: object, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler found.*nothing here computes in w8a8-g64, w4a8"):
        run_study(RunConfig(model="nobody/nothing", latency="0.9x", results=str(tmp_path)), Progress(quiet=True))
    assert not list(tmp_path.iterdir())


def test_no_compiler_is_the_reason_where_a_kernel_only_lacks_that(no_compiler: object) -> None:
    from methods.formats.format import parse_format

    target = local_cpu(1)
    assert why_none(parse_format("w4a8-g32-asym"), 64, 64, 1, target) == build.MISSING
    assert "dense formats only" not in why_none(parse_format("e4m3a16"), 64, 64, 1, target)
