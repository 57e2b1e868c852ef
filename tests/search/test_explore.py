"""What a search learns from and what it does when an evaluation fails, on stand-ins for the model and the study."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from methods.policy import Decision, Policy
from search.budget import Budget
from search.config import RunConfig
from search.evaluate import NotFinite, Quality
from search.explore import FIRST_STAGE, Truth, _Search, announcement
from search.progress import Progress
from search.study import Store, TrialRecord

TOKENS = torch.zeros(6, 8, dtype=torch.long)
POLICIES = [Policy({"site": (Decision.of("rtn", format=f"w{bits}a16-g64"),)}) for bits in (2, 3, 4, 8)]


class Model:
    """Evaluates a policy to a KL of its own; some ask for more memory than there is."""

    tokens = TOKENS

    def __init__(self, greedy: tuple[Policy, ...] = ()) -> None:
        self.greedy, self.evaluated, self.restored = greedy, [], 0

    def known(self, policy: Policy, kl_each: Any) -> None: ...

    def dense(self) -> None:
        self.restored += 1

    def evaluate(self, policy: Policy, n: int) -> Quality:
        if policy in self.greedy:
            torch.empty(1 << 60, dtype=torch.uint8)
        self.evaluated.append(policy)
        return Quality((0.1 * (1 + POLICIES.index(policy)),) * n, (1.0,) * n, n * 8)


def prepared() -> Any:
    """As much of a prepared study as evaluating needs."""
    return SimpleNamespace(
        map=SimpleNamespace(predict=lambda ms: SimpleNamespace(mean=2 * ms)),
        sum_ms=lambda policy: 1.0 + POLICIES.index(policy),
        loss=lambda policy: 0.5,
        problem=SimpleNamespace(indices=lambda policy: (0,), meets=lambda indices: True),
    )


def setting(folder: Path, model: Model, **config: Any) -> tuple[Truth, Store, _Search, io.StringIO]:
    """A search in a study of its own."""
    store, said = Store(folder / "study.db", "s", {}), io.StringIO()
    truth = Truth(model, store, prepared(), Budget(RunConfig(**config)))  # type: ignore[arg-type]
    return truth, store, _Search(prepared(), truth, 3.5, Progress(said)), said


def test_the_predictor_learns_from_what_there_was_and_from_this_search_in_the_same_order_whoever_did_it(tmp_path: Path) -> None:
    _, store, first, _ = setting(tmp_path, Model())
    for policy in POLICIES:
        first.evaluate("first", policy, simple=False)
    truth, store, again, _ = setting(tmp_path, Model())
    assert again.records(store, before=1) == first.records(store, before=4)[:1]
    again.evaluate("again", POLICIES[2], simple=False)
    assert [record.policy for record in again.records(store, before=1)] == [POLICIES[0], POLICIES[2]]
    assert truth.n_new == 0


def test_an_evaluation_without_memory_is_one_failed_trial(tmp_path: Path) -> None:
    model = Model(greedy=(POLICIES[1],))
    truth, store, search, _ = setting(tmp_path, model)
    for policy in (*POLICIES, POLICIES[1]):
        search.evaluate("candidate", policy, simple=False)
    (failure,) = store.failures()
    assert failure.policy == POLICIES[1] and "allocate memory" in failure.reason and model.restored == 1
    assert [record.policy for record in store.records()] == [POLICIES[0], POLICIES[2], POLICIES[3]]
    assert truth.failed == {POLICIES[1].key(): failure.reason}
    assert [item.policy for item in search.promoted(1)] == [POLICIES[0], POLICIES[2]]  # the last one does not fit


def test_a_model_that_breaks_is_one_failed_trial_with_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    truth, store, search, _ = setting(tmp_path, model)

    def broken(policy: Policy, n: int) -> Quality:
        raise NotFinite("the model computes NaN or infinity from model.layers.3.mlp.down_proj on")

    monkeypatch.setattr(model, "evaluate", broken)
    assert search.evaluate("candidate", POLICIES[1], simple=False).kl == math.inf
    (failure,) = store.failures()
    assert failure.policy == POLICIES[1] and failure.reason.endswith("from model.layers.3.mlp.down_proj on")
    assert model.restored == 1 and truth.failed == {POLICIES[1].key(): failure.reason}


def test_what_is_no_lack_of_memory_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    _, store, search, _ = setting(tmp_path, model)
    monkeypatch.setattr(model, "evaluate", lambda policy, n: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        search.evaluate("candidate", POLICIES[0], simple=False)
    assert store.failures() == []


def test_where_everything_failed_the_error_says_why(tmp_path: Path) -> None:
    _, _, search, _ = setting(tmp_path, Model(greedy=tuple(POLICIES)))
    told = [search.evaluate("candidate", policy, simple=False) for policy in POLICIES[:2]]
    assert all(item.kl == math.inf for item in told)
    with pytest.raises(ValueError, match="none of 2 candidates could be evaluated: out of memory"):
        search.promoted(1)


def test_a_spent_budget_ends_before_the_second_stage_and_ranks_by_the_first(tmp_path: Path) -> None:
    model = Model()
    _, store, search, _ = setting(tmp_path, model, tokens=FIRST_STAGE * 8 * 2)
    search.evaluate("b", POLICIES[1], simple=True)
    search.evaluate("a", POLICIES[0], simple=False)
    assert [item.name for item in search.promoted(1)] == ["a", "b"]
    assert {record.n_tokens for record in store.records()} == {FIRST_STAGE * 8}


def test_a_simple_policy_that_is_outclassed_on_the_first_sequence_goes_no_further(tmp_path: Path) -> None:
    truth, store, search, _ = setting(tmp_path, Model())
    for policy in POLICIES:  # once to four times the least loss, of which twice is not yet too much
        search.evaluate("simple", policy, simple=True)
    assert [record.n_tokens for record in store.records()] == [32, 32, 8, 8]
    assert truth.outclassed == {policy.key() for policy in POLICIES[2:]}
    assert [item.policy for item in search.promoted(1)] == POLICIES[:2]
    again, store, resumed, _ = setting(tmp_path, Model())
    resumed.evaluate("simple", POLICIES[0], simple=True)
    found = resumed.evaluate("simple", POLICIES[2], simple=True)
    assert (
        found.kl == math.inf and found.n_tokens == 8 and again.n_new == 0
    )  # no parent: its one sequence compares with nothing
    resumed.evaluate("searched", POLICIES[2], simple=False)
    assert again.outclassed == set() and store.records()[-1].n_tokens == 32


def test_the_best_simple_policy_stays_however_much_better_a_searched_one_is(tmp_path: Path) -> None:
    truth, _, search, _ = setting(tmp_path, Model())
    search.evaluate("searched", POLICIES[0], simple=False)
    search.evaluate("simple", POLICIES[2], simple=True)
    assert truth.outclassed == set() and [item.simple for item in search.promoted(1)] == [False, True]


def test_the_best_uniform_policy_stays_however_much_better_a_mixed_one_is(tmp_path: Path) -> None:
    truth, _, search, _ = setting(tmp_path, Model())
    search.evaluate("ends", POLICIES[0], simple=True, family="ends")
    search.evaluate("uniform", POLICIES[2], simple=True, family="uniform")
    search.evaluate("kind", POLICIES[3], simple=True, family="kind")
    assert truth.outclassed == {POLICIES[3].key()}


def test_the_best_that_fits_is_said(tmp_path: Path) -> None:
    truth, _, _, said = setting(tmp_path, Model())
    progress = Progress(said)
    search = _Search(prepared(), truth, 3.5, progress)
    for policy in (POLICIES[3], POLICIES[2], POLICIES[0]):
        search.evaluate(f"n{POLICIES.index(policy)}", policy, simple=False)
    assert progress.best == "best so far: n0, KL 0.1, 2 ms modelled"


def test_a_trial_is_what_was_evaluated(tmp_path: Path) -> None:
    truth, store, _, _ = setting(tmp_path, Model())
    assert truth.quality("name", POLICIES[1], 99).kl == pytest.approx(0.2)
    (record,) = store.records()
    assert isinstance(record, TrialRecord) and record.n_tokens == 48 and record.latency_ms == 4.0 and record.name == "name"


def test_long_evaluations_are_announced_with_the_way_to_have_fewer() -> None:
    assert announcement(60.0, 25, RunConfig()).startswith("25 more true evaluations of 60 s each: about 25 minutes; --budget")
    assert announcement(60.0, 2, RunConfig()) == "" and announcement(60.0, 25, RunConfig(budget="10m")) == ""
