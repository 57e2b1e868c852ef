"""Spending true evaluations: the solver's policy, the simple ones, and a refinement that a predictor steers."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from methods.policy import Policy
from predictors.features import ChoiceFacts, Features, SiteFacts
from predictors.loss import Record, fit_loss
from search.config import RunConfig
from search.evaluate import Evaluator, Quality
from search.prepared import Prepared
from search.progress import Progress
from search.strategies.presets import Preset, uniform, within_budget
from search.strategies.refine import Refine
from search.strategies.solve import Solution
from search.strategies.strategy import Evaluated
from search.study import Store, TrialRecord

ROLE = "search"
FIRST_STAGE = 4
"""Sequences on which every candidate is evaluated, before the best go on to all of them."""

BATCH = 4
"""Candidates between two fits of the predictor."""

N_SIMPLE = 2
"""Simple policies of mixed kind (ends, kinds) that are evaluated besides the uniform ones."""


@dataclass(frozen=True)
class Ranked:
    """A policy with its true quality on all search sequences; simple: a preset rather than the search's own."""

    name: str
    policy: Policy
    quality: Quality
    simple: bool


class Truth:
    """True evaluations and their record: what any run of the study evaluated is not evaluated again."""

    def __init__(self, evaluator: Evaluator, store: Store, prepared: Prepared) -> None:
        self._evaluator, self._store, self._prepared = evaluator, store, prepared
        self.spent = 0
        for record in store.records():
            if record.role == ROLE:
                evaluator.known(record.policy, record.per_sequence)

    @property
    def n_sequences(self) -> int:
        """Sequences that there are."""
        return len(self._evaluator.tokens)

    @property
    def tokens_each(self) -> int:
        """Tokens of a sequence."""
        return int(self._evaluator.tokens.shape[1])

    @property
    def first_tokens(self) -> int:
        """Tokens of the first stage."""
        return min(FIRST_STAGE, self.n_sequences) * self.tokens_each

    def quality(self, name: str, policy: Policy, n_sequences: int) -> Quality:
        """KL on the first sequences, from the store or measured and stored."""
        n = min(n_sequences, self.n_sequences)
        n_tokens = n * self._evaluator.tokens.shape[1]
        began = time.monotonic()
        quality = self._evaluator.evaluate(policy, n)
        if self._store.lookup(policy.key(), n_tokens, ROLE) is None:
            self.spent += 1
            self._store.record(
                TrialRecord(
                    policy=policy,
                    kl=quality.kl,
                    kl_stderr=0.0 if np.isnan(quality.kl_stderr) else quality.kl_stderr,
                    n_tokens=n_tokens,
                    latency_ms=self._prepared.map.predict(self._prepared.sum_ms(policy)).mean,
                    role=ROLE,
                    name=name,
                    seconds=time.monotonic() - began,
                    per_sequence=quality.kl_each,
                    scores={"additive": self._prepared.loss(policy)},
                )
            )
        return quality


def features_of(prepared: Prepared) -> Features:
    """What the loss predictor sees of a policy."""
    return Features(
        {
            site.name: SiteFacts(
                site.kind,
                prepared.depth[site.name],
                site.n_weights,
                {
                    decision: ChoiceFacts(max(option.loss, 0.0), option.model_ms, option.bits_per_weight)
                    for decision, option in zip(choices, site.options, strict=True)
                },
            )
            for site, choices in zip(prepared.sites, prepared.problem.choices, strict=True)
        }
    )


def first_stage_records(prepared: Prepared, store: Store, n_tokens: int) -> list[Record]:
    """Every policy of this space that was evaluated on the first stage's tokens, for the predictor."""
    records = []
    for trial in store.records():
        if trial.role != ROLE or trial.n_tokens != n_tokens or not 0 < trial.kl < np.inf:
            continue
        try:
            prepared.problem.indices(trial.policy)
        except ValueError:
            continue  # of an earlier, larger space
        records.append(Record(trial.policy, trial.kl))
    return records


def simple_policies(prepared: Prepared, budget_ms: float) -> list[Preset]:
    """One format everywhere, for every decision; and the best of the other presets within the budget, by their additive score."""
    everywhere = [preset for preset in uniform(prepared.problem) if preset.policy.canonical() != Policy().canonical()]
    used = {decision for choices in prepared.problem.choices for decision in choices}
    mixed = within_budget(prepared.problem, prepared.block, prepared.kind, budget_ms, used)
    known = {Policy().key(), *(preset.policy.key() for preset in everywhere)}
    found = everywhere + [preset for preset in mixed if preset.policy.key() not in known][:N_SIMPLE]
    return [replace(preset, name=short_name(preset.name, prepared)) for preset in found]


def short_name(name: str, prepared: Prepared) -> str:
    """A preset's name with formats in place of whole decisions, where a format names only one decision in this study."""
    labels: dict[str, set[str]] = {}
    for site in prepared.sites:
        for option in site.options[1:]:
            labels.setdefault(option.format, set()).add(option.label)
    for fmt, found in labels.items():
        if len(found) == 1:
            name = re.sub(rf"{re.escape(next(iter(found)))}(?![\w-])", fmt, name)
    return name


def explore(
    prepared: Prepared, truth: Truth, store: Store, solution: Solution, budget_ms: float, config: RunConfig, progress: Progress
) -> list[Ranked]:
    """Candidates within the budget (kernel sum, ms) with their true quality on all search tokens, the best first."""
    n_tokens = truth.first_tokens
    features = features_of(prepared)
    presets = simple_policies(prepared, budget_ms)
    first: dict[str, tuple[str, Policy, Quality, bool]] = {}

    def evaluate(name: str, policy: Policy, simple: bool) -> Evaluated:
        quality = truth.quality(name, policy, FIRST_STAGE)
        first.setdefault(policy.key(), (name, policy, quality, simple))
        stderr = 0.0 if np.isnan(quality.kl_stderr) else quality.kl_stderr
        return Evaluated(policy, quality.kl, stderr, quality.n_tokens, prepared.sum_ms(policy))

    total = len(presets) + 1 + config.evaluations
    with progress.bar("true evaluations") as update:
        told = []
        for index, (name, policy, simple) in enumerate(
            [(preset.name, preset.policy, True) for preset in presets] + [("solver", solution.policy, False)]
        ):
            told.append(evaluate(name, policy, simple))
            update(index + 1, total)

        def rank(policies: Sequence[Policy]) -> tuple[np.ndarray, np.ndarray]:
            return fit_loss(first_stage_records(prepared, store, n_tokens), features, config.seed).predict_log(policies)

        strategy = Refine(
            prepared.problem, budget_ms, [solution.policy], rank, kind=prepared.kind, depth=prepared.depth, seed=config.seed
        )
        strategy.tell(told)
        proposed = 0
        while proposed < config.evaluations:
            policies = strategy.ask(min(BATCH, config.evaluations - proposed))
            if not policies:
                break
            for policy in policies:
                proposed += 1
                strategy.tell([evaluate(f"refined {policy.key()[:6]}", policy, False)])
                update(len(presets) + 1 + proposed, total)
    return _promote(prepared, truth, first, budget_ms, config, progress)


def _promote(
    prepared: Prepared,
    truth: Truth,
    first: dict[str, tuple[str, Policy, Quality, bool]],
    budget_ms: float,
    config: RunConfig,
    progress: Progress,
) -> list[Ranked]:
    """The best of the first stage on all search tokens: searched ones, and simple ones for the guard."""
    fitting = [item for item in first.values() if prepared.sum_ms(item[1]) <= budget_ms * (1 + 1e-9)]
    by_kl = sorted(fitting, key=lambda item: item[2].kl)
    searched = [item for item in by_kl if not item[3]][: config.finalists + 2]
    simple = [item for item in by_kl if item[3]][:2]
    ranked = []
    with progress.bar("promoted candidates") as update:
        for index, (name, policy, _, is_simple) in enumerate([*searched, *simple]):
            ranked.append(Ranked(name, policy, truth.quality(name, policy, truth.n_sequences), is_simple))
            update(index + 1, len(searched) + len(simple))
    return sorted(ranked, key=lambda item: item.quality.kl)
