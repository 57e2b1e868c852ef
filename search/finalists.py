"""Finalists: measured end to end on real kernels, recompressed in order, judged on text that no choice has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from methods.method import Edit
from methods.policy import Policy
from profilers import end_to_end
from profilers.table import LatencyTable
from search.config import Objective
from search.evaluate import Evaluator, Quality, paired
from search.explore import Ranked
from search.in_order import compress_in_order, needs_order, ordered_bank
from search.prepared import Prepared
from search.session import Session, all_threads

ROUNDS = 24
SIGNIFICANT = 1.0
"""Standard errors by which a searched policy has to beat the best simple one."""

CLEAR = 4.0
"""Standard errors of lead that recompressing the simple policy in order could not make up for."""


@dataclass(frozen=True)
class Finalist:
    """A measured policy.

    latency_ms, lo_ms, hi_ms: p50 and its 95 % interval; ratio, ratio_lo, ratio_hi: to the dense model, paired by round; meets: the
    upper bound is within the objective; kl…: on the validation text, per sequence in kl_each; recompressed: its weights were made in
    order on the compressed prefix, plain_kl is that of the others; report_…: on the report text, perplexity nan where the model
    wrote that text itself.
    """

    name: str
    policy: Policy
    simple: bool
    latency_ms: float
    lo_ms: float
    hi_ms: float
    ratio: float
    ratio_lo: float
    ratio_hi: float
    predicted_ms: float
    meets: bool
    size_bytes: int
    contended: bool = False
    recompressed: bool = False
    plain_kl: float = math.nan
    kl: float = math.nan
    kl_stderr: float = math.nan
    kl_each: tuple[float, ...] = ()
    report_kl: float = math.nan
    report_kl_stderr: float = math.nan
    perplexity: float = math.nan
    runtime_kl: float = math.nan
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "policy": self.policy.canonical()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finalist:
        """Inverse of `to_json`."""
        return cls(**{**data, "policy": Policy.from_canonical(data["policy"]), "kl_each": tuple(data["kl_each"])})


DENSE_NAME = "dense"


def measure(
    session: Session, prepared: Prepared, table: LatencyTable, ranked: Sequence[Ranked], objective: Objective
) -> list[Finalist]:
    """Latency of every policy, materialised with the real kernels and interleaved with the dense model, which comes first."""
    engine = session.engine(table)
    dense = session.model if prepared.dense_name.startswith("eager") else engine.materialize({})
    models = {DENSE_NAME: dense, **{item.policy.key(): engine.materialize(session.edits(item.policy)) for item in ranked}}
    with session.progress.bar("end-to-end latency") as update:
        found = end_to_end.measure(
            models,
            session.config.load,
            session.target,
            rounds=ROUNDS,
            cache=session.config.cache_folder,
            notify=session.progress.say,
            progress=update,
        )
    reference = found[DENSE_NAME]
    return [
        _finalist(prepared, DENSE_NAME, Policy(), True, reference, reference, objective),
        *(_finalist(prepared, i.name, i.policy, i.simple, found[i.policy.key()], reference, objective) for i in ranked),
    ]


def _finalist(
    prepared: Prepared,
    name: str,
    policy: Policy,
    simple: bool,
    run: end_to_end.Measurement,
    dense: end_to_end.Measurement,
    objective: Objective,
) -> Finalist:
    ratio = run.ratio_to(dense)
    return Finalist(
        name=name,
        policy=policy,
        simple=simple,
        latency_ms=run.median_ms,
        lo_ms=run.lo_ms,
        hi_ms=run.hi_ms,
        ratio=ratio.mid,
        ratio_lo=ratio.lo,
        ratio_hi=ratio.hi,
        predicted_ms=prepared.map.predict(prepared.sum_ms(policy)).mean,
        meets=_meets(objective, run, dense, ratio),
        size_bytes=prepared.size_bytes(policy),
        contended=run.contended,
    )


def _meets(objective: Objective, run: end_to_end.Measurement, dense: end_to_end.Measurement, ratio: end_to_end.Ratio) -> bool:
    """The upper bound is within the objective; a relative one must hold for the paired rounds and for the medians shown."""
    if not objective.relative:
        return run.hi_ms <= objective.value
    return ratio.hi <= objective.value and run.median_ms <= objective.value * dense.median_ms


class Judge:
    """Quality of finalists on the validation and report text; the better of their weights is kept for export."""

    def __init__(self, session: Session, prepared: Prepared) -> None:
        self._session, self._prepared = session, prepared
        self._evaluators: dict[str, Evaluator] = {}

    def _on(self, role: str) -> Evaluator:
        if role not in self._evaluators:
            self._evaluators[role] = Evaluator(self._session.switch, self._session.corpora[role].tokens)
        return self._evaluators[role]

    def validate(self, finalist: Finalist) -> Finalist:
        """With the KL of the bank's weights on the validation text."""
        with self._session.progress.bar(f"validating {finalist.name}") as update, all_threads():
            return _judged(finalist, self._on("validate").evaluate(finalist.policy, progress=update), recompressed=False)

    def reordered(self, finalist: Finalist) -> Finalist:
        """With weights recompressed in order, where these are better on the validation text."""
        if not needs_order(finalist.policy):
            return finalist
        edits = self.recompressed(finalist.policy)
        with self._session.progress.bar("validating it recompressed") as update, all_threads():
            again = self._on("validate").evaluate_edits(edits, update)
        return _judged(finalist, again, recompressed=True) if again.kl < finalist.kl else finalist

    def recompressed(self, policy: Policy) -> dict[str, Edit]:
        """The policy's weights made in order, kept in the study."""
        bank = ordered_bank(self._session, policy)
        return compress_in_order(self._session, policy, bank, "recompressing in order")

    def edits(self, finalist: Finalist) -> dict[str, Edit]:
        """The weights that were judged: these are materialised and exported."""
        return self.recompressed(finalist.policy) if finalist.recompressed else self._session.edits(finalist.policy)

    def report(self, finalist: Finalist) -> Finalist:
        """With KL and perplexity on the report text."""
        generated = self._session.corpora["report"].generated
        if generated and not finalist.policy.sites:
            return replace(finalist, report_kl=0.0, report_kl_stderr=0.0)
        with self._session.progress.bar(f"report text: {finalist.name}") as update, all_threads():
            quality = self._on("report").evaluate_edits(self.edits(finalist), update)
        return replace(
            finalist,
            report_kl=max(quality.kl, 0.0),
            report_kl_stderr=quality.kl_stderr,
            perplexity=math.nan if generated else quality.perplexity,
        )

    def runtime_agreement(self, finalist: Finalist, table: LatencyTable, n_sequences: int = 1) -> Finalist:
        """With the KL between the reference numerics and the materialised model on the real kernels."""
        model = self._session.engine(table).materialize(self.edits(finalist))
        with all_threads():
            reference = self._on("validate").evaluate_edits(self.edits(finalist), n_sequences=n_sequences)
            real = self._on("validate").model_kl(model, n_sequences)
        return replace(finalist, runtime_kl=abs(real.kl - reference.kl))


def _judged(finalist: Finalist, quality: Quality, recompressed: bool) -> Finalist:
    return replace(
        finalist,
        recompressed=recompressed,
        kl=max(quality.kl, 0.0),
        kl_stderr=quality.kl_stderr,
        kl_each=quality.kl_each,
        plain_kl=finalist.plain_kl if recompressed else max(quality.kl, 0.0),
    )


def choose(
    finalists: Sequence[Finalist], max_kl: float = 0.0
) -> tuple[Finalist | None, Finalist | None, tuple[float, float] | None]:
    """The answer among those that meet the objective; the best simple one; and their paired difference (KL, standard error).

    The searched policy is the answer only where it beats the simple one beyond the noise. With a quality floor `max_kl` those above it
    count only where none is below. None where nothing meets the objective.
    """
    meeting = [item for item in finalists if item.meets and not math.isnan(item.kl)]
    meeting = [item for item in meeting if not max_kl or item.kl <= max_kl] or meeting
    searched = min((item for item in meeting if not item.simple), key=lambda item: item.kl, default=None)
    simple = min((item for item in meeting if item.simple), key=lambda item: item.kl, default=None)
    if searched is None or simple is None:
        return searched or simple, simple, None
    mean, error = paired(searched.kl_each, simple.kl_each)
    error = 0.0 if math.isnan(error) else error
    return (searched if mean < -SIGNIFICANT * error else simple), simple, (mean, error)
