"""What an answer says of itself: whether the objective is met, what a reader must know, how good the predictor was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from search.config import RunConfig
from search.prepared import Prepared
from spaces.runtimes import runtime

if TYPE_CHECKING:
    from predictors.loss import PredictorReport
    from search.explore import Truth
    from search.finalists import Finalist, Met
    from search.report.content import Verdict
    from search.session import Session

DRIFT = 1.15
"""Change of the dense model's latency between pricing and validation that the answer mentions."""


def verdict(session: Session, finalists: Sequence[Finalist], chosen: Finalist | None) -> Verdict:
    """`met` only where the machine was free and is the target; `chosen` meets the objective, None where nothing does."""
    if chosen is not None and not session.target.present:
        return "unvalidated"
    return "met" if chosen is not None and not contended(finalists) else "not met"


def contended(finalists: Sequence[Finalist]) -> bool:
    """Whether the machine was not free while one of them was measured."""
    return any(item.contended for item in finalists)


def predictor_report(records: Sequence[Any], features: Any, seed: int) -> PredictorReport | None:
    """How good the loss predictor is on policies it never saw; None of fewer than six policies."""
    from predictors.loss import evaluate_unseen

    if len({record.policy.key() for record in records}) < 6:
        return None
    return evaluate_unseen(records, features, seed=seed)


def notes_of(
    session: Session,
    prepared: Prepared,
    finalists: Sequence[Finalist],
    chosen: Finalist | None,
    simple: Finalist | None,
    config: RunConfig,
) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = []
    if not session.target.present:
        notes.append(
            f"{session.target.name} is not here: every latency is {prepared.label}, none was measured for this study; qualities were truly "
            f"evaluated; `search validate {session.config.folder}`, run there, measures and confirms or solves again"
        )
    if contended(finalists):
        notes.append(
            "the machine was contended while latency was measured: no objective is claimed to be met; run again when it is quiet"
        )
    elif slowed := sum(item.slowed for item in finalists):
        notes.append(
            f"something slowed the machine during most steps of {slowed} of {len(finalists)} policies: their times are longer than on a "
            "free machine; ratios are paired by round"
        )
    drift = finalists[0].latency_ms / prepared.dense_ms[0]
    if not 1 / DRIFT < drift < DRIFT:
        notes.append(
            f"the dense model took {finalists[0].latency_ms:.3g} ms now and {prepared.dense_ms[0]:.3g} ms when the choices were priced: "
            "the machine was in another state; ratios are paired by round and hold, milliseconds are those of this run"
        )
    if chosen is None:
        notes.append(
            "no policy met the objective when measured; the nearest are in the table"
            if session.target.present
            else "no policy is expected to meet the objective; the nearest are in the table"
        )
    elif config.max_kl and chosen.kl > config.max_kl:
        notes.append(f"the answer's KL {chosen.kl:.3g} exceeds --max-kl {config.max_kl:g}: no policy meets both")
    if chosen is not None and chosen.recompressed:
        notes.append(
            f"the answer's weights were compressed in order, on the compressed prefix: KL {chosen.plain_kl:.3g} before, {chosen.kl:.3g} "
            "after, on the validation text; it is compared with simple policies before that"
            if simple is None or not simple.recompressed
            else "the answer and the best simple policy were compressed in order, on the compressed prefix"
        )
    if config.runtime != "isolatency":
        notes.append(
            f"latency is of this project's kernels on {session.target.name}; it was not measured in {config.runtime}, "
            "whose own kernels differ"
        )
        if not any(family.fused for family in runtime(config.runtime).loads or ()):
            notes.append(
                f"{config.runtime} decodes these weights before it computes, so that they save memory there and no time"
            )
    return notes


def search_notes(truth: Truth) -> list[str]:
    """What cut the search short."""
    notes = [f"the search ended early, {truth.budget.spent()} being used up: an answer from what was known by then"]
    failed = [f"{len(truth.failed)} evaluation(s) failed: {next(iter(truth.failed.values()))}"] if truth.failed else []
    return (notes if truth.budget.spent() else []) + failed


def told_of(
    finalist: Finalist, asked: Sequence[Met], objective: str, main_limit_ms: float | None
) -> tuple[tuple[str, bool | None], ...]:
    """By what was asked for, whether a policy meets it.

    asked: of a policy that was measured for it; objective: its text where that says nothing, as in earlier versions; main_limit_ms: where
    the policy was measured for something else, so that of the times only the main one is known of it.
    """
    names = [met.name for met in asked] or [objective]
    texts = [name.partition(" (")[0] for name in names]  # the workload only where the same is asked of several
    shown = [name if texts.count(text) > 1 else text for name, text in zip(names, texts, strict=True)]
    known: list[bool | None] = [met.met for met in finalist.met] or [finalist.meets]
    if main_limit_ms is not None:
        known = [finalist.hi_ms <= main_limit_ms, *([None] * (len(names) - 1))]
    return tuple(zip(shown, known, strict=True))
