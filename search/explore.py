"""Spending true evaluations: the solver's policy, the simple ones, and a refinement that a predictor steers."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from methods.policy import DENSE, Policy
from predictors.features import ChoiceFacts, Features, SiteFacts
from predictors.loss import Record, fit_loss
from search.budget import Budget
from search.config import RunConfig
from search.evaluate import Evaluator, NotFinite, Quality
from search.memory import out_of_memory
from search.prepared import Prepared
from search.progress import Progress
from search.session import all_threads
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

N_CERTAIN = 2
"""Candidates that are evaluated whatever is left of the budget: the solver's and a simple policy."""

LONG_S = 300.0
"""Seconds of true evaluations that are announced."""

OUTCLASSED = 2.0
"""A simple policy whose loss on the first sequence is so many times that of another within the budget is evaluated on no other."""

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
    """True evaluations and their record: what any run of the study evaluated is not evaluated again.

    n_new: evaluations of this process; failed: reasons, by policy key, of those that ran out of memory or broke; outclassed: keys of
    policies that went no further than the first sequence. budget: what is left.
    """

    def __init__(self, evaluator: Evaluator, store: Store, prepared: Prepared, budget: Budget) -> None:
        self._evaluator, self._store, self._prepared, self.budget = evaluator, store, prepared, budget
        self.n_new = 0
        self.failed: dict[str, str] = {}
        self.outclassed: set[str] = set()
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

    def quality(self, name: str, policy: Policy, n_sequences: int, limit: float = math.inf) -> Quality:
        """KL on the first sequences, from the store or measured and stored; of the first alone where that is above `limit`.

        Infinite where memory ran out or the model computes no number: a failed trial with its reason, which a later run tries again.
        """
        n, began = min(n_sequences, self.n_sequences), time.monotonic()
        try:
            if policy.key() in self.failed:
                return self._infinite(policy, n)
            with all_threads():
                quality = self._evaluated(policy, n, limit)
        except (MemoryError, RuntimeError, NotFinite) as error:
            if not (isinstance(error, NotFinite) or out_of_memory(error)):
                raise
            self._evaluator.dense()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.failed[policy.key()] = reason if isinstance(error, NotFinite) else f"out of memory ({reason})"
            self._store.record_failure(policy, name, ROLE, self.failed[policy.key()])
            return self._infinite(policy, n)
        known = self._store.lookup(policy.key(), quality.n_tokens, ROLE)
        self.budget.spend(policy.key(), quality.n_tokens, known.seconds if known else 0.0)
        if known is None:
            self.n_new += 1
            self._store.record(
                TrialRecord(
                    policy=policy,
                    kl=quality.kl,
                    kl_stderr=0.0 if np.isnan(quality.kl_stderr) else quality.kl_stderr,
                    n_tokens=quality.n_tokens,
                    latency_ms=self._prepared.map.predict(self._prepared.sum_ms(policy)).mean,
                    role=ROLE,
                    name=name,
                    seconds=time.monotonic() - began,
                    per_sequence=quality.kl_each,
                    scores={"additive": self._prepared.loss(policy)},
                )
            )
        return quality

    def _evaluated(self, policy: Policy, n: int, limit: float) -> Quality:
        raced = limit < math.inf and n > 1 and self._store.lookup(policy.key(), n * self.tokens_each, ROLE) is None
        first = self._evaluator.evaluate(policy, 1) if raced else None
        if first is not None and first.kl > limit:
            self.outclassed.add(policy.key())
            return first
        self.outclassed.discard(policy.key())
        return self._evaluator.evaluate(policy, n)

    def _infinite(self, policy: Policy, n: int) -> Quality:
        self.budget.spend(policy.key(), n * self.tokens_each)
        return Quality((np.inf,) * n, (np.nan,) * n, n * self.tokens_each)


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


def first_stage_records(prepared: Prepared, trials: Iterable[TrialRecord], n_tokens: int) -> list[Record]:
    """Every policy of this space that was evaluated on the first stage's tokens, for the predictor."""
    records = []
    for trial in trials:
        if trial.role != ROLE or trial.n_tokens != n_tokens or not 0 < trial.kl < np.inf:
            continue
        try:
            prepared.problem.indices(trial.policy)
        except ValueError:
            continue  # of an earlier, larger space
        records.append(Record(trial.policy, trial.kl))
    return records


def simple_policies(prepared: Prepared, budget_ms: float) -> list[Preset]:
    """One format everywhere, for every decision; the best of the other presets within the budget, by their additive score; and `mofq`."""
    everywhere = [preset for preset in uniform(prepared.problem) if preset.policy.canonical() != Policy().canonical()]
    used = {decision for choices in prepared.problem.choices for decision in choices}
    mixed = within_budget(prepared.problem, prepared.block, prepared.kind, budget_ms, used, prepared.rounding_errors)
    known = {Policy().key(), *(preset.policy.key() for preset in everywhere)}
    others = [preset for preset in mixed if preset.policy.key() not in known]
    found = everywhere + others[:N_SIMPLE] + [preset for preset in others[N_SIMPLE:] if preset.family == "mofq"]
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
    return re.sub(rf"(?<![\w-]){re.escape(DENSE.label)}(?![\w-])", prepared.sites[0].options[0].format, name)


def mix_name(policy: Policy, prepared: Prepared) -> str:
    """What a searched policy is called: its two commonest formats by sites, and a part of its key: `74 w4a8-g64 + 46 w8a8-token #3fa2`."""
    mix = [f"{count} {fmt}" for fmt, count in prepared.mix(policy).items()]
    return f"{' + '.join([*mix[:2], *(['…'] if len(mix) > 2 else [])])} #{policy.key()[:4]}"


def explore(
    prepared: Prepared,
    truth: Truth,
    store: Store,
    solution: Solution,
    budget_ms: float,
    config: RunConfig,
    progress: Progress,
    before: int,
) -> list[Ranked]:
    """Candidates within `budget_ms` (kernel sum) with their true quality on all search tokens, the best first.

    before: evaluations that the study held when this search began; the predictor learns from them and from this search's own, so that
    a run that was killed proposes what it would have proposed. Where the truth's budget is used up, the rest is left out: the solver's
    policy and the likeliest simple one are always evaluated, and candidates are compared on the first stage's tokens.
    """
    search, features = _Search(prepared, truth, budget_ms, progress), features_of(prepared)
    presets = sorted(simple_policies(prepared, budget_ms), key=lambda preset: _promise(preset, prepared, budget_ms))
    must = [
        (mix_name(solution.policy, prepared), solution.policy, False, ""),
        *((preset.name, preset.policy, True, preset.family) for preset in presets),
    ]
    total = len(must) + config.evaluations
    strategy = Refine(
        prepared.problem,
        budget_ms,
        [solution.policy],
        lambda policies: fit_loss(search.records(store, before), features, config.seed).predict_log(policies),
        kind=prepared.kind,
        depth=prepared.depth,
        seed=config.seed,
    )
    before_now = truth.n_new
    with progress.bar("true evaluations") as update:
        for index, candidate in enumerate(must):
            if index < N_CERTAIN or not truth.budget.spent():
                began, done_before = time.monotonic(), truth.n_new
                strategy.tell([search.evaluate(*candidate)])
                if truth.n_new > done_before == before_now:  # the first that was not known
                    progress.say(announcement(time.monotonic() - began, total - index - 1, config))
            update(index + 1, total, index + 1 - (truth.n_new - before_now))
        proposed = 0
        while proposed < config.evaluations and not truth.budget.spent():
            policies = strategy.ask(min(BATCH, config.evaluations - proposed))
            if not policies:
                break
            for policy in policies:
                if truth.budget.spent():
                    break
                proposed += 1
                strategy.tell([search.evaluate(mix_name(policy, prepared), policy, False)])
                done = len(must) + proposed
                update(done, total, done - (truth.n_new - before_now))
    return search.promoted(config.finalists)


def announcement(each_s: float, left: int, config: RunConfig) -> str:
    """What the evaluations that follow take and how to have fewer, where it is long; "" otherwise."""
    seconds = each_s * left
    if seconds < LONG_S or config.budget:
        return ""
    return (
        f"{left} more true evaluations of {each_s:.0f} s each: about {seconds / 60:.0f} minutes; --budget 10m ends them in time, "
        "--evaluations makes them fewer"
    )


def _promise(preset: Preset, prepared: Prepared, budget_ms: float) -> tuple[bool, float]:
    """Ascending from the simple policy that the additive score likes best within the budget."""
    return prepared.sum_ms(preset.policy) > budget_ms * (1 + 1e-9), prepared.loss(preset.policy)


class _Search:
    """The candidates of one search, in the order in which they were evaluated."""

    def __init__(self, prepared: Prepared, truth: Truth, budget_ms: float, progress: Progress) -> None:
        self._prepared, self._truth, self._budget_ms, self._progress = prepared, truth, budget_ms, progress
        self._found: dict[str, Ranked] = {}
        self._best = np.inf
        self._limits = {"": np.inf, "uniform": np.inf}

    def evaluate(self, name: str, policy: Policy, simple: bool, family: str = "") -> Evaluated:
        """On the first stage's tokens; a simple policy that is outclassed on the first sequence is no candidate.

        family: uniform policies race among themselves, so that the best of them is in every answer, others against all.
        """
        race = family if family in self._limits else ""
        quality = self._truth.quality(name, policy, FIRST_STAGE, self._limits[race] if simple else np.inf)
        if policy.key() in self._truth.outclassed:
            return Evaluated(
                policy, math.inf, 0.0, quality.n_tokens, self._prepared.sum_ms(policy)
            )  # known, and never compared
        self._found.setdefault(policy.key(), Ranked(name, policy, quality, simple))
        if self._fits(policy) and simple:
            for own in {"", race}:
                self._limits[own] = min(self._limits[own], OUTCLASSED * quality.kl_each[0])
        if self._fits(policy) and quality.kl < self._best:
            self._best = quality.kl
            ms = self._prepared.map.predict(self._prepared.sum_ms(policy)).mean
            self._progress.best = f"best so far: {name}, KL {quality.kl:.3g}, {ms:.4g} ms modelled"
        stderr = 0.0 if np.isnan(quality.kl_stderr) else quality.kl_stderr
        return Evaluated(policy, quality.kl, stderr, quality.n_tokens, self._prepared.sum_ms(policy))

    def records(self, store: Store, before: int) -> list[Record]:
        """What the predictor learns from."""
        own = set(self._found)
        trials = (trial for at, trial in enumerate(store.records()) if at < before or trial.policy.key() in own)
        return first_stage_records(self._prepared, trials, self._truth.first_tokens)

    def promoted(self, n_finalists: int) -> list[Ranked]:
        """The best of the first stage on all search tokens: searched ones, and simple ones for the guard; the best first.

        Raises ValueError where every evaluation failed.
        """
        fitting = [item for item in self._found.values() if self._fits(item.policy) and np.isfinite(item.quality.kl)]
        if not fitting:
            reason = next(iter(self._truth.failed.values()), "the model broke under each")
            raise ValueError(
                f"none of {len(self._found)} candidates could be evaluated: {reason}; use fewer --search-tokens or a shorter --sequence"
            )
        by_kl = sorted(fitting, key=lambda item: item.quality.kl)
        chosen = [item for item in by_kl if not item.simple][: n_finalists + 2] + [item for item in by_kl if item.simple][:2]
        ranked, before_now = [], self._truth.n_new
        with self._progress.bar("promoted candidates") as update:
            for index, item in enumerate(chosen):
                if self._truth.budget.spent():
                    return [item for item in by_kl if item in chosen]
                quality = self._truth.quality(item.name, item.policy, self._truth.n_sequences)
                ranked += [replace(item, quality=quality)] if np.isfinite(quality.kl) else []
                update(index + 1, len(chosen), index + 1 - (self._truth.n_new - before_now))
        return sorted(ranked, key=lambda item: item.quality.kl)

    def _fits(self, policy: Policy) -> bool:
        problem = self._prepared.problem
        return self._prepared.sum_ms(policy) <= self._budget_ms * (1 + 1e-9) and problem.meets(problem.indices(policy))
