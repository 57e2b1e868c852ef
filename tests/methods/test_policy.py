"""Policies and decisions are values: they compare, hash and survive text."""

import pytest

from methods.policy import DENSE, Decision, Policy

DECISIONS = [
    DENSE,
    Decision.of("rtn", format="w4a16-g64"),
    Decision.of("gptq", format="w3a16-g64-asym", damping="auto", act_order=False),
    Decision.of("gptq", format="w3a16-g64-asym", damping=0.01, act_order=True),
    Decision.of("smoothquant", format="w8a8-token", alpha=1.0),
    Decision.of("hqq", format="w4a16-asym", iterations=20),
]


@pytest.mark.parametrize("decision", DECISIONS)
def test_labels_round_trip_with_the_types_of_their_knobs(decision: Decision) -> None:
    parsed = Decision.parse(decision.label)
    assert parsed == decision and hash(parsed) == hash(decision)
    assert [type(value) for _, value in parsed.knobs] == [type(value) for _, value in decision.knobs]


def test_knobs_are_sorted() -> None:
    one, other = Decision("m", (("b", 2), ("a", 1))), Decision.of("m", a=1, b=2)
    assert one == other and one.label == other.label == "m:a=1,b=2"
    assert one.knob("b") == 2 and one.knob("c") is None and one.knob("c", 5) == 5


@pytest.mark.parametrize("label", ["", ":format=w4a16", "rtn:format", "rtn:format=bf16,alpha"])
def test_wrong_labels_are_errors(label: str) -> None:
    with pytest.raises(ValueError, match="decision"):
        Decision.parse(label)


def policy() -> Policy:
    return Policy({f"site{i}": (decision,) for i, decision in enumerate(DECISIONS)}, (Decision.of("heal", steps=3),))


def test_canonical_text_round_trips() -> None:
    again = Policy.from_canonical(policy().canonical())
    assert again.canonical() == policy().canonical() and again.key() == policy().key()
    assert all(again.at(site) == policy().at(site) for site in policy().sites)
    assert again.model == policy().model


def test_equal_policies_have_one_key() -> None:
    turned = Policy(dict(reversed(policy().sites.items())), policy().model)
    padded = Policy({**policy().sites, "other": (DENSE,), "more": ()}, policy().model)
    assert turned.key() == padded.key() == policy().key()
    assert len(policy().key()) == 16 and int(policy().key(), 16) >= 0


def test_other_policies_have_other_keys() -> None:
    keys = {policy().key(), Policy().key(), Policy(policy().sites).key()}
    for site in list(policy().sites)[1:]:
        keys.add(Policy({name: d for name, d in policy().sites.items() if name != site}, policy().model).key())
    assert len(keys) == 3 + len(DECISIONS) - 1


def test_sites_without_a_decision_are_dense() -> None:
    assert Policy().at("anywhere") == (DENSE,) and Policy({"a": ()}).at("a") == (DENSE,)


def test_uniform() -> None:
    rtn = Decision.of("rtn", format="w4a16")
    assert Policy.uniform(["a", "b"], rtn) == Policy({"a": (rtn,), "b": (rtn,)}) == Policy.uniform({"a": rtn, "b": rtn})
    with pytest.raises(ValueError, match="needs the decision"):
        Policy.uniform(["a"])
