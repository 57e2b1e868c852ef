"""The simple policies: what they decide where, and that they meet the budget."""

import numpy as np
import pytest

from methods.policy import DENSE, Decision
from search.strategies.presets import better_format, by_kind, ends, mofq, uniform, within_budget
from search.strategies.problem import Problem

W2 = Decision.of("rtn", format="w2a16-g64")
W4 = Decision.of("gptq", format="w4a16-g64")
W4_FINE = Decision.of("gptq", format="w4a16-g32")
W4_RTN = Decision.of("rtn", format="w4a16-g32")
W8 = Decision.of("gptq", format="w8a8-token")

N_BLOCKS = 5
KINDS = ("o", "down")
SITES = tuple(f"{block}.{kind}" for block in range(N_BLOCKS) for kind in KINDS)
BLOCK = {site: int(site[0]) for site in SITES}
KIND = {site: site[2:] for site in SITES}


def small(drop: dict[str, tuple[Decision, ...]] | None = None) -> Problem:
    """Five blocks of two sites; wider is slower and better; at the sites of `drop` only these choices."""
    width = {W2: 2.0, W4: 4.0, W4_FINE: 4.5, W4_RTN: 4.6, W8: 8.0, DENSE: 16.0}
    choices = tuple((drop or {}).get(site, (DENSE, W2, W4, W4_FINE, W4_RTN, W8)) for site in SITES)
    costs = tuple(np.array([width[d] for d in own]) for own in choices)
    return Problem(SITES, choices, tuple(1 / c for c in costs), costs, costs)


def test_uniform_covers_every_decision() -> None:
    presets = {p.name: p for p in uniform(small())}
    assert len(presets) == 6
    assert all(decisions == (W4,) for decisions in presets["uniform gptq:format=w4a16-g64"].policy.sites.values())
    assert presets["uniform none"].policy.canonical() == '{"model":[],"sites":{}}'
    assert not any(p.notes for p in presets.values())


def test_a_site_without_the_format_takes_the_nearest_wider_one() -> None:
    p = small({"1.o": (DENSE, W2, W4_RTN, W4_FINE, W8), "2.o": (W2,)})
    preset = next(preset for preset in uniform(p) if "w4a16-g64" in preset.name)
    assert preset.policy.at("1.o") == (W4_FINE,)  # of two equally wide ones, that of the same method
    assert preset.policy.at("2.o") == (W2,)  # nothing wider is there
    assert preset.policy.at("0.o") == (W4,)
    other = next(preset for preset in uniform(small({"1.o": (DENSE, W4_FINE, W4_RTN)})) if "w2a16" in preset.name)
    assert other.policy.at("1.o") == (W4_RTN,)
    assert "1 of 10 sites take gptq:format=w4a16-g32" in preset.notes
    assert "1 of 10 sites take rtn:format=w2a16-g64" in preset.notes


def test_the_better_of_two_equally_wide_formats_at_each_site() -> None:
    floats = Decision.of("gptq", format="e2m1a16-g64")
    choices = ((DENSE, W4, floats), (floats, W4), (DENSE, W8), (W4, W8))
    loss = tuple(np.array(own) for own in ([0.0, 3.0, 2.0], [5.0, 4.0], [0.0, 0.1], [1.0, 0.1]))
    cost = tuple(np.ones(len(own)) for own in choices)
    p = Problem(("a", "b", "c", "d"), choices, loss, cost, cost)
    (preset,) = better_format(p, [DENSE, W4, W8, floats])
    assert [preset.policy.at(site) for site in "abcd"] == [(floats,), (W4,), (W8,), (W4,)]
    assert preset.family == "format" and "1 of 4 sites take gptq:format=w8a8-token" in preset.notes
    assert preset.name == "at each site the better of gptq:format=w4a16-g64, gptq:format=e2m1a16-g64"
    assert better_format(small(), [DENSE, W2, W4, W4_FINE, W4_RTN, W8]) == []  # another method is no other format
    assert preset.policy.key() in {
        other.policy.key() for other in within_budget(p, dict.fromkeys("abcd", 0), dict.fromkeys("abcd", "o"), 4.0)
    }


def test_mofq_takes_at_each_site_the_format_of_the_smaller_error_of_weights_whatever_the_loss() -> None:
    floats, other = Decision.of("gptq", format="e2m1a16-g64"), Decision.of("rtn", format="e2m1a16-g64")
    choices = ((DENSE, W4, floats), (floats, W4, other), (W4, floats), (DENSE, W4))
    cost = tuple(np.ones(len(own)) for own in choices)
    p = Problem(tuple("abcd"), choices, tuple(np.arange(len(own)) * 1.0 for own in choices), cost, cost)
    errors = {"a": {"w4a16-g64": 0.02, "e2m1a16-g64": 0.01}, "b": {"w4a16-g64": 0.01, "e2m1a16-g64": 0.01}}
    (preset,) = mofq(p, [DENSE, W4, W8, floats, other], errors | {"d": {"w4a16-g64": 0.5, "e2m1a16-g64": 0.1}})
    assert [preset.policy.at(site) for site in "abcd"] == [(floats,), (W4,), (W4,), (W4,)]
    assert preset.name == f"mofq of {W4.label} and {floats.label}" and preset.family == "mofq"
    assert "1 of 4 sites take" in preset.notes  # d lacks the minifloats that it would take
    assert mofq(p, [DENSE, W4, W8, other], errors) == []  # of another method
    arguments = p, dict.fromkeys("abcd", 0), dict.fromkeys("abcd", "o"), 4.0
    assert [x.family for x in within_budget(*arguments, errors=errors)].count("mofq") == 1
    assert all(x.family != "mofq" for x in within_budget(*arguments))


def test_ends_and_kinds() -> None:
    preset = ends(small(), BLOCK, W4, W8, 2)
    assert [preset.policy.at(f"{b}.o")[0] for b in range(5)] == [W8, W8, W4, W8, W8]
    preset = by_kind(small(), KIND, W4, W8, "down")
    assert {preset.policy.at(s)[0] for s in SITES if KIND[s] == "down"} == {W8}
    assert {preset.policy.at(s)[0] for s in SITES if KIND[s] == "o"} == {W4}


@pytest.mark.parametrize("budget", [20.0, 41.0, 59.0, 90.0, 160.0])
def test_within_budget_meets_it_and_is_sorted(budget: float) -> None:
    p = small()
    presets = within_budget(p, BLOCK, KIND, budget)
    totals = [p.totals(p.indices(preset.policy)) for preset in presets]
    assert all(latency <= budget for _, latency, _ in totals)
    assert [loss for loss, _, _ in totals] == sorted(loss for loss, _, _ in totals)
    assert len({preset.policy.key() for preset in presets}) == len(presets)


def test_ends_keep_as_many_blocks_wide_as_fit() -> None:
    p = small()
    names = [preset.name for preset in within_budget(p, BLOCK, KIND, 40.0 + 2 * 4 * 4.0 + 1, {W4, W8})]
    assert f"{W4.label}, first and last 2 blocks {W8.label}" in names
    assert not any("first and last 1" in name for name in names)
    assert within_budget(p, BLOCK, KIND, 19.0) == []
