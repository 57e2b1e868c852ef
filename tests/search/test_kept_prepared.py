"""What a study prepared serves every objective that it can: none is measured, calibrated or scored twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.apply import site_view
from methods.model.load import load
from methods.quant.format_choice import decide_mofq
from profilers.target import local_cpu
from search import maps, prepare, pricing, run, whole_model
from search.config import RunConfig
from search.explore import simple_policies
from search.prepared import Option, Prepared
from search.progress import Progress
from search.run import run_study
from search.session import Session
from tests.search.run_server import fixed_prices, one_core
from tests.tiny import save_tiny

SMALL = "w2a8-g32-asym"
"""Taken to be slower than 4 bits, so that bytes alone speak for it."""

FORMATS = ("w8a8-token", "w4a8-g32-asym", SMALL)


class Solved(Exception):
    """Ends a run where it is solved."""


class Study:
    """Runs of one study up to the solver, and what each had to do for it."""

    def __init__(self, folder: Path, did: list[str]) -> None:
        self._folder, self._did = folder, did
        self._model = save_tiny(folder / "model", "llama", 1)

    def solve(self, study: str = "s", **objectives: Any) -> tuple[Prepared, list[str]]:
        """The prepared study under the objectives, and what was done."""
        found: list[Prepared] = []

        def stop(prepared: Prepared, _: object) -> None:
            found.append(prepared)
            raise Solved

        sizes = {"sequence": 16, "calibration_tokens": 32, "search_tokens": 32, "validation_tokens": 32, "threads": 1}
        config = RunConfig(
            results=str(self._folder / "results"), cache=str(self._folder / "cache"), study=study,
            **{"model": str(self._model), "formats": FORMATS, "workload": "decode:batch=1,context=8", **sizes, **objectives},
        )  # fmt: skip
        self._did.clear()
        with pytest.raises(Solved):
            run_study(config, Progress(quiet=True), stop)
        return found[0], list(self._did)

    def steps(self, study: str = "s") -> dict[str, Any]:
        """The study's steps by name."""
        folder = self._folder / "results" / study / "steps"
        return {path.stem: json.loads(path.read_text())["value"] for path in folder.iterdir()}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Iterator[Study]:
    did: list[str] = []
    worth = pricing.worth_having

    def counted(module: Any, name: str, what: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            did.append(what(*arguments))
            return real(*arguments, **named)

        patch.setattr(module, name, call)

    def slow_small(options: list[Option]) -> list[Option]:
        return [option for option in worth(options) if option.format != SMALL]

    with pytest.MonkeyPatch.context() as patch, one_core(), fixed_prices():
        patch.setattr(pricing, "worth_having", slow_small)
        patch.setattr(whole_model, "MIXED_RUNS", 2)
        patch.setattr(whole_model, "MAP_ROUNDS", 2)
        counted(maps, "whole_model", lambda _s, _t, _o, workload: f"map {workload.phase}")
        counted(
            prepare, "score_choices", lambda _s, own: f"scores {sorted({d.knob('format') for v in own.values() for d in v})}"
        )
        counted(run, "prepare_study", lambda *_: "prepared")
        yield Study(tmp_path_factory.mktemp("kept"), did)


def test_a_limit_on_bytes_computes_only_what_it_adds_and_serves_all_from_then_on(study: Study) -> None:
    fast, did = study.solve(latency="0.9x")
    assert did == ["prepared", "map decode", "scores ['w4a8-g32-asym', 'w8a8-token']"]
    assert all(SMALL not in [option.format for option in site.options] for site in fast.sites)
    both, did = study.solve(latency="0.9x", size="1MB")
    assert did == ["prepared", f"scores ['{SMALL}']"]
    assert all(SMALL in [option.format for option in site.options] for site in both.sites)
    for objectives in (
        {"latency": "0.8x"},
        {"latency": "0.9x", "memory": "2MB"},
        {"latency": "0.9x"},
        {"latency": "50x", "size": "1MB"},
    ):
        again, did = study.solve(**objectives)
        assert did == []
        assert again.sites == (both if len(objectives) > 1 else fast).sites and again.latency == fast.latency


def test_what_was_prepared_does_not_depend_on_the_order(study: Study) -> None:
    """Scores and bank are the same as those that were made with the other options."""
    wide, _ = study.solve("t", latency="0.9x", size="1MB")
    narrow, did = study.solve("t", latency="0.9x")
    assert did == []
    fast, _ = study.solve("s", latency="0.9x")
    both, _ = study.solve("s", latency="0.9x", size="1MB")
    assert (narrow.sites, wide.sites) == (fast.sites, both.sites)


def test_objectives_of_other_workloads_are_kept_side_by_side(study: Study) -> None:
    decode, _ = study.solve(latency="0.9x")
    both, did = study.solve(latency="0.9x", ttft="50x")
    assert did[:3] == ["prepared", "map decode", "map prefill"] and not [what for what in did if what.startswith("scores")]
    for objectives, known in (({"latency": "0.8x"}, decode), ({"latency": "0.8x", "ttft": "40x"}, both)):
        again, did = study.solve(**objectives)
        assert did == [] and again.to_json() == known.to_json()
        assert study.steps()["prepared"]["workload"] == known.workload
        assert len(study.steps()["prepared"]["also"]) == len(known.also)


def test_integers_and_minifloats_of_equal_bits_are_judged_for_mofq(study: Study) -> None:
    """Each site's error of rounded weights is kept, and the simple policy takes the less of both; without a twin nothing is computed."""
    found, _ = study.solve("twins", latency="0.9x", formats=("w4a16-g32", "e2m1a16-g32", "w8a16"))
    loaded = load(str(study._model), study._folder / "cache")
    assert len(found.rounding_errors) == len(loaded.structure.sites)
    decided = {}
    for site in loaded.structure.sites:
        decided[site.name] = decide_mofq(site_view(loaded.model, loaded.structure, site), "w4a16-g32").knob("format")
        assert set(found.rounding_errors[site.name]) == {"w4a16-g32", "e2m1a16-g32"}
        assert min(found.rounding_errors[site.name], key=found.rounding_errors[site.name].__getitem__) == decided[site.name]
    first, *others = found.sites
    turned = {"w4a16-g32": 0.5, "e2m1a16-g32": 0.1} if decided[first.name] == "w4a16-g32" else {"w4a16-g32": 0.0}
    options = tuple(replace(o, rounding_error=turned.get(o.format, o.rounding_error)) for o in first.options)
    mixed = replace(found, sites=(replace(first, options=options), *others))
    (preset,) = (preset for preset in simple_policies(mixed, float("inf")) if preset.family == "mofq")
    chosen = {site: preset.policy.at(site)[0].knob("format") for site in decided}
    assert {site for site in decided if chosen[site] != decided[site]} == {first.name}
    assert preset.name == "mofq of w4a16-g32 and e2m1a16-g32"
    alone, _ = study.solve("alone", latency="0.9x", formats=("w4a16-g32", "w8a16"))
    assert not any(alone.rounding_errors.values()) and "twins" not in study.steps("alone")


def test_sites_of_a_model_in_fp16_may_be_multiplied_in_bf16(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the dense model is that is the baseline; priced and scored as any other, on whatever CPU this is."""
    machine = cached_property(lambda session: replace(local_cpu(1), compute_dtype="bf16"))
    machine.__set_name__(Session, "target")
    monkeypatch.setattr(Session, "target", machine)
    model = save_tiny(tmp_path / "half", "llama", 1, torch.float16)
    arguments: dict[str, Any] = {"model": str(model), "latency": "0.9x", "formats": ("w8a16", "w4a16-g32")}
    found, _ = study.solve("half", **arguments)
    assert found.dense_name == "dense bf16, rounded from fp16"
    for site in found.sites:
        stored, rounded, *others = site.options
        assert (stored.label, stored.format) == ("none", "fp16") and [o.format for o in others] == ["w8a16", "w4a16-g32"]
        assert (rounded.label, rounded.format, rounded.bits_per_weight) == ("rtn:format=bf16", "bf16", 16)
        assert rounded.size_bytes == stored.size_bytes and rounded.ms < stored.ms
        assert 0 < rounded.loss < min(o.loss for o in others)
    saved, predicted = map(float, re.findall(r"([\d.e-]+) ms (?:\[|by the map)", found.checked))
    assert predicted == pytest.approx(saved, rel=0.02)  # both from sites as they are stored
    exported, _ = study.solve("exported", **arguments, export=("compressed-tensors",))
    assert all("bf16" not in [o.format for o in site.options] for site in exported.sites)


def test_a_study_of_an_earlier_version_is_solved_as_it_is(study: Study) -> None:
    """Its options say nothing of being worth their time, and its latest step is all there is."""
    study.solve("old", latency="0.9x")
    folder = study._folder / "results" / "old" / "steps"
    for path in folder.glob("prepared-*"):
        path.unlink()
    data = json.loads((folder / "prepared.json").read_text())
    del data["sha256"]
    for site in data["value"]["sites"]:
        for option in site["options"]:
            del option["fast"]
    (folder / "prepared.json").write_text(json.dumps(data))
    assert study.solve("old", latency="0.8x")[1] == []
