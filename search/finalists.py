"""Finalists: measured end to end on real kernels, recompressed in order, judged on text that no choice has seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from methods.method import Edit
from methods.policy import Policy
from methods.typed import Count, Positive, read
from profilers import end_to_end
from profilers.kernels.catalogue import kernels
from profilers.label import Label
from profilers.runtime import Runtime, dense_candidates
from profilers.table import LatencyTable
from profilers.workload import Workload
from search.evaluate import Evaluator, KeptQuality, NotFinite, Quality, paired
from search.explore import Ranked
from search.files import content_key
from search.folder import study_key
from search.in_order import ORDER_PAYS, compress_in_order, needs_order, ordered_bank
from search.limits import name_of, reached_bytes, reached_ms
from search.memory import give_back
from search.objectives import ByteLimit, Objective, Objectives
from search.prepared import WAY_OUT, Prepared
from search.session import Session, all_threads

ROUNDS = 24
SIGNIFICANT = 1.0
"""Standard errors by which a searched policy has to beat the best simple one."""

CLEAR = 4.0
"""Standard errors of lead that recompressing the simple policy in order could not make up for."""


@dataclass(frozen=True)
class Met:
    """One of the things asked for, and what a policy reaches of it.

    value, lo, hi, limit: in `unit`: `ms`, `x` (of the dense model) or `bytes`; met: the upper bound is within the limit, or where the
    latency is not of this machine its expectation.
    """

    name: str
    value: float
    lo: float
    hi: float
    limit: Positive
    unit: Literal["ms", "x", "bytes"]
    met: bool

    @property
    def over(self) -> float:
        """The upper bound as a share of the limit."""
        return self.hi / self.limit


@dataclass(frozen=True)
class Finalist:
    """A policy whose latency was measured, or where `label` says so, taken from tables of a target that is not here.

    latency_ms, lo_ms, hi_ms: p50 of the main workload and its 95 % interval; ratio, ratio_lo, ratio_hi: to the dense model, paired by
    round; contended, slowed: what `profilers.end_to_end.Measurement` says, in any workload; met: everything that was asked for, the
    main objective first; meets: all of it; kl…: on the validation text, per sequence in kl_each; recompressed: its weights were made
    in order on the compressed prefix, plain_kl is that of the others; report_…: on the report text, perplexity nan where the model
    wrote that text itself, report_top1 the share of positions with the dense model's likeliest token.
    """

    name: str
    policy: Policy
    simple: bool
    latency_ms: Positive
    lo_ms: float
    hi_ms: float
    ratio: Positive
    ratio_lo: float
    ratio_hi: float
    predicted_ms: float
    meets: bool
    size_bytes: Count
    contended: bool = False
    slowed: bool = False
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
    label: Label = "measured"
    met: tuple[Met, ...] = ()
    report_top1: float = math.nan

    def __post_init__(self) -> None:
        if not self.lo_ms <= self.latency_ms <= self.hi_ms:
            raise ValueError(f"{self.name}: {self.latency_ms} ms is not between its bounds {self.lo_ms} and {self.hi_ms}")

    @property
    def over(self) -> float:
        """By how much the worst of the times asked for is exceeded: its upper bound as a share of the limit."""
        return max((met.over for met in self.met if met.unit != "bytes"), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "policy": self.policy.canonical(), "met": [vars(met) for met in self.met]}

    @classmethod
    def from_json(cls, data: object, file: Path | str = "finalist") -> Finalist:
        """Inverse of `to_json`; raises WrongValue, which names the file and the place in it."""
        return read(cls, data, file, WAY_OUT, POLICIES)


POLICIES = {Policy: Policy.from_canonical}
"""Policies stand as their canonical text in JSON."""

DENSE_NAME = "dense"

Edits = Mapping[str, Edit]

Materialize = Callable[[Runtime, Policy], nn.Module]
"""How a policy becomes a model on the target's kernels."""


def measure(
    session: Session,
    prepared: Prepared,
    table: LatencyTable,
    ranked: Sequence[Ranked],
    materialize: Materialize | None = None,
) -> list[Finalist]:
    """Latency of every policy in all workloads asked for, with the real kernels and interleaved with the dense model, which comes first.

    On a target that is not here, what its tables give instead. materialize: makes a policy's model, for measuring anew; by default of the
    session's edits, whose measurements the study keeps, so that a run that was killed goes on with the same numbers. What a contended
    machine gave is measured again.
    """

    def as_judged(engine: Runtime, policy: Policy) -> nn.Module:
        return engine.materialize(session.edits(policy))

    if materialize is not None or not session.target.present:
        return _measured(session, prepared, table, ranked, materialize or as_judged)
    sources = [kernel.source_hash for kernel in kernels(session.target)]
    asked = [(item.name, item.simple, item.policy.key()) for item in ranked]
    about = study_key(session.config), session.target.fingerprint, session.config.objectives.text
    key = content_key(*about, sources, prepared.latency, asked)
    kept = session.steps.get(f"measured-{key}", key)
    if kept is not None:
        return list(read(tuple[Finalist, ...], kept, session.steps.folder / f"measured-{key}.json", WAY_OUT, POLICIES))
    found = _measured(session, prepared, table, ranked, as_judged)
    if not any(item.contended for item in found):
        session.steps.put(f"measured-{key}", key, [item.to_json() for item in found])
    return found


def _measured(
    session: Session,
    prepared: Prepared,
    table: LatencyTable,
    ranked: Sequence[Ranked],
    materialize: Materialize,
) -> list[Finalist]:
    items = [Ranked(DENSE_NAME, Policy(), Quality((0.0,), (0.0,), 0), True), *ranked]
    if not session.target.present:
        return [_assumed(session.config.objectives, prepared, item) for item in items]
    runs = {
        workload: _runs(session, prepared, table, items, workload, materialize)
        for workload in session.config.objectives.workloads
    }
    return [_finalist(session, prepared, item, runs) for item in items]


def _runs(
    session: Session,
    prepared: Prepared,
    table: LatencyTable,
    ranked: Sequence[Ranked],
    workload: Workload,
    materialize: Materialize,
) -> dict[str, end_to_end.Measurement]:
    """Every policy's runs of one workload, by its key."""
    engine = session.engine(table, workload)
    models: dict[str, Any] = {}
    for item in ranked:
        models[item.policy.key()] = materialize(engine, item.policy) if item.policy.sites else _dense(prepared, engine)
    with session.progress.bar(f"end-to-end latency, {workload.phase}") as update:
        found = end_to_end.measure(
            models,
            workload,
            session.target,
            rounds=ROUNDS,
            cache=session.config.cache_folder,
            notify=session.progress.say,
            progress=update,
        )
    session.progress.say(end_to_end.disturbance(found.values()))
    return found


def _dense(prepared: Prepared, engine: Runtime) -> nn.Module:
    """The uncompressed model that objectives are relative to."""
    candidates = dense_candidates(engine)
    return candidates.get(prepared.dense_name, next(iter(candidates.values())))


def _finalist(
    session: Session, prepared: Prepared, item: Ranked, runs: Mapping[Workload, Mapping[str, end_to_end.Measurement]]
) -> Finalist:
    dense = {workload: found[Policy().key()] for workload, found in runs.items()}
    own = {workload: found[item.policy.key()] for workload, found in runs.items()}
    asked, main = session.config.objectives, session.config.load
    run, ratio = own[main], own[main].ratio_to(dense[main])
    met = [_time_met(time, own[time.workload], dense[time.workload]) for time in asked.times]
    met += [_bytes_met(prepared, size, item.policy) for size in asked.sizes]
    return Finalist(
        name=item.name,
        policy=item.policy,
        simple=item.simple,
        latency_ms=run.median_ms,
        lo_ms=run.lo_ms,
        hi_ms=run.hi_ms,
        ratio=ratio.mid,
        ratio_lo=ratio.lo,
        ratio_hi=ratio.hi,
        predicted_ms=prepared.map.predict(prepared.sum_ms(item.policy)).mean,
        meets=all(one.met for one in met),
        size_bytes=prepared.size_bytes(item.policy),
        contended=any(measured.contended for measured in own.values()),
        slowed=any(measured.slowed for measured in own.values()),
        met=tuple(met),
    )


def _time_met(objective: Objective, run: end_to_end.Measurement, dense: end_to_end.Measurement) -> Met:
    """The upper bound is within the objective; a relative one must hold for the paired rounds and for the medians shown."""
    name, limit = name_of(objective), objective.value
    if objective.quantile != 0.5:
        value, lo, hi = run.tail(objective.quantile)
        return Met(name, value, lo, hi, limit, "ms", hi <= limit)
    if not objective.relative:
        return Met(name, run.median_ms, run.lo_ms, run.hi_ms, limit, "ms", run.hi_ms <= limit)
    ratio = run.ratio_to(dense)
    met = ratio.hi <= limit and run.median_ms <= limit * dense.median_ms
    return Met(name, ratio.mid, ratio.lo, ratio.hi, limit, "x", met)


def _bytes_met(prepared: Prepared, asked: ByteLimit, policy: Policy) -> Met:
    value = float(reached_bytes(prepared, asked.kind, policy))
    return Met(name_of(asked), value, value, value, float(asked.value), "bytes", value <= asked.value)


def _assumed(asked: Objectives, prepared: Prepared, item: Ranked) -> Finalist:
    """A policy on a target that is not here: expected latencies, judged by their expectation."""
    met = []
    for time in asked.times:
        ms, lo, hi, dense = reached_ms(prepared, time, item.policy)
        value, least, most = (each / (dense if time.relative else 1.0) for each in (ms, lo, hi))
        reached = ms <= time.resolve(dense)
        met.append(Met(name_of(time), value, least, most, time.value, "x" if time.relative else "ms", reached))
    met += [_bytes_met(prepared, size, item.policy) for size in asked.sizes]
    ms, lo, hi, dense = reached_ms(prepared, asked.main, item.policy)
    return Finalist(
        name=item.name,
        policy=item.policy,
        simple=item.simple,
        latency_ms=ms,
        lo_ms=lo,
        hi_ms=hi,
        ratio=ms / dense,
        ratio_lo=lo / dense,
        ratio_hi=hi / dense,
        predicted_ms=ms,
        meets=all(one.met for one in met),
        size_bytes=prepared.size_bytes(item.policy),
        label=prepared.label,
        met=tuple(met),
    )


class Judge:
    """Quality of finalists on the validation and report text, kept in the study; the better of their weights is kept for export."""

    def __init__(self, session: Session, prepared: Prepared) -> None:
        give_back()  # the models that were timed
        self._session, self._prepared = session, prepared
        self._evaluators: dict[str, Evaluator] = {}

    def _on(self, role: str) -> Evaluator:
        if role not in self._evaluators:
            self._evaluators[role] = Evaluator(self._session.switch, self._session.corpora[role].tokens)
        return self._evaluators[role]

    def _quality(self, role: str, title: str, policy: Policy, recompressed: bool, edits: Callable[[], Edits]) -> Quality:
        session = self._session
        texts = session.corpora[role].sha256, session.corpora["calibrate"].sha256
        key = content_key(session.loaded.digest, *texts, policy.key(), recompressed)

        def compute() -> dict[str, Any]:
            with session.progress.bar(title) as update, all_threads():
                evaluator = self._on(role)
                try:
                    return asdict(evaluator.evaluate_edits(edits(), update))
                except NotFinite as error:
                    evaluator.dense()
                    session.progress.say(f"{title}: {error}")
                    n = len(evaluator.tokens)
                    return asdict(Quality((math.inf,) * n, (math.inf,) * n, evaluator.tokens.numel()))

        found = session.steps.made(f"{role}-{key}", key, compute, KeptQuality)
        kl, nll = tuple(found["kl_each"]), tuple(found["nll_each"])
        return Quality(kl, nll, found["n_tokens"], tuple(found.get("same_each", ())))

    def validate(self, finalist: Finalist) -> Finalist:
        """With the KL of the bank's weights on the validation text."""
        policy = finalist.policy
        found = self._quality("validate", f"validating {finalist.name}", policy, False, lambda: self._session.edits(policy))
        return _judged(finalist, found, recompressed=False)

    def reordered(self, finalist: Finalist) -> Finalist:
        """With weights recompressed in order, where that may pay and these are better on the validation text."""
        if finalist.kl < ORDER_PAYS or not needs_order(finalist.policy):
            return finalist
        policy = finalist.policy
        again = self._quality("validate", "validating it recompressed", policy, True, lambda: self.recompressed(policy))
        return _judged(finalist, again, recompressed=True) if again.kl < finalist.kl else finalist

    def recompressed(self, policy: Policy) -> Edits:
        """The policy's weights made in order, kept in the study."""
        bank = ordered_bank(self._session, policy)
        return compress_in_order(self._session, policy, bank, "recompressing in order")

    def edits(self, finalist: Finalist) -> Edits:
        """The weights that were judged: these are materialised and exported."""
        return self.recompressed(finalist.policy) if finalist.recompressed else self._session.edits(finalist.policy)

    def report(self, finalist: Finalist) -> Finalist:
        """With KL and perplexity on the report text."""
        generated = self._session.corpora["report"].generated
        title, policy = f"report text: {finalist.name}", finalist.policy
        if generated and not policy.sites:
            return replace(finalist, report_kl=0.0, report_kl_stderr=0.0, report_top1=1.0)
        quality = self._quality("report", title, policy, finalist.recompressed, lambda: self.edits(finalist))
        return replace(
            finalist,
            report_kl=max(quality.kl, 0.0),
            report_kl_stderr=quality.kl_stderr,
            report_top1=quality.top1,
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
