"""What is worth calibrating, which policies span the space, and the map's parts in an additive cost."""

import pytest

from methods.policy import DENSE, Decision, Policy
from predictors.latency import Run, fit_latency
from search.files import Steps, content_key
from search.prepared import Option, SiteOptions
from search.pricing import worth_having
from search.whole_model import map_policies


def option(fmt: str, ms: float, bits: float) -> Option:
    label = DENSE.label if fmt == "bf16" else Decision.of("gptq", format=fmt).label
    return Option(label, fmt, bits, int(bits * 100), ms, "kernel")


def test_slower_and_narrower_options_are_dropped() -> None:
    options = [option("bf16", 5, 16), option("w8a8-g64", 3, 8.25), option("w4a8-g64", 2, 4.25), option("w3a8-g64", 2.5, 3.25)]
    assert [o.format for o in worth_having(options)] == ["bf16", "w8a8-g64", "w4a8-g64"]


def test_rounded_activations_do_not_replace_exact_ones() -> None:
    options = [option("bf16", 5, 16), option("w8a8-g64", 3, 8.25), option("w4a16-g64", 4, 4.25)]
    assert len(worth_having(options)) == 3


@pytest.mark.parametrize(
    ("ms", "kept"), [(4.0, ["fp16", "bf16", "w8a8-g64"]), (5.0, ["fp16", "w8a8-g64"]), (6.0, ["fp16", "w8a8-g64"])]
)
def test_dense_weights_of_another_dtype_have_to_be_faster_than_those_as_stored(ms: float, kept: list[str]) -> None:
    stored = Option(DENSE.label, "fp16", 16, 1600, 5.0, "kernel")
    rounded = Option(Decision.of("rtn", format="bf16").label, "bf16", 16, 1600, ms, "kernel")
    options = [stored, rounded, option("w8a8-g64", 3, 8.25), option("w4a8-g64", 4.5, 4.25)]
    assert [o.format for o in worth_having(options)] == kept


def test_the_dense_option_stays_though_it_is_slowest() -> None:
    options = [option("bf16", 5, 16), option("w8a8-g64", 3, 8.25)]
    assert worth_having(options) == options


def test_policies_for_the_map_differ_and_reach_from_fast_to_slow() -> None:
    sites = [
        SiteOptions(f"s{i}", "o", i, 100, (option("bf16", 5, 16), option("w8a8-g64", 3, 8.25), option("w2a8-g32-asym", 1, 3)))
        for i in range(12)
    ]
    ms = {(s.name, o.label): o.ms for s in sites for o in s.options}
    policies = [policy for _, policy in map_policies(sites, 0)]
    sums = sorted(sum(ms[s.name, policy.at(s.name)[0].label] for s in sites) for policy in policies)
    assert len({policy.key() for policy in policies}) == len(policies)
    assert sums[0] == 12
    assert sums[-1] > 36
    assert all(policy.canonical() != Policy().canonical() for policy in policies)


def test_a_collapsed_map_predicts_the_same() -> None:
    runs = []
    for k in range(12):
        dense, fast = float(k % 4), float((k * 7) % 5 + 1)
        latency = 8 + 1.5 * fast + 0.9 * dense
        runs.append(Run(f"p{k}", fast + dense, latency, latency * 0.999, latency * 1.001, {"dense": dense, "grouped": fast}))
    full = fit_latency(runs)
    simple, scales = full.collapsed()
    assert full.terms
    for run in runs:
        effective = sum(value * scales.get(name, 1.0) for name, value in run.features.items())
        assert simple.predict(effective).mean == pytest.approx(full.predict(run.sum_ms, run.features).mean, rel=1e-9)
        assert simple.predict(effective).mean == pytest.approx(run.measured_ms, rel=2e-2)
    assert simple.loo_error == full.loo_error


def test_steps_are_found_by_what_they_depend_on(tmp_path) -> None:
    steps = Steps(tmp_path)
    steps.put("map", content_key("a", 1), {"x": [1, 2]})
    assert steps.get("map", content_key("a", 1)) == {"x": [1, 2]}
    assert steps.get("map", content_key("a", 2)) is None
    (tmp_path / "map.json").write_text('{"key": "torn')
    assert steps.get("map", content_key("a", 1)) is None
