"""`run_study`: the whole way from a configuration to a validated, exported answer, one step a function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.atomic import write_text
from methods.policy import Policy
from search.config import ConfigError, Objective, RunConfig, read_toml, to_toml
from search.deliver import deliver, policy_text, versions
from search.files import Steps, content_key
from search.prepared import Prepared
from search.progress import Progress
from search.strategies.problem import Infeasible
from search.strategies.solve import Solution, solve

if TYPE_CHECKING:
    from search.explore import Ranked
    from search.finalists import Finalist
    from search.results import Answer
    from search.session import Session

ATTEMPTS = 3
"""Times that a missed objective is tightened and solved again before the run says that it cannot be met."""

BASELINES = 2
"""Uniform policies that are measured besides the best simple one, for the frontier."""

MARGIN = 0.005
"""Share of the objective left free besides the measured interval, so that the next measurement meets it too."""

DRIFT = 1.15
"""Change of the dense model's latency between pricing and validation that the answer mentions."""

_VERSION = 1


class Unreachable(ValueError):
    """No legal policy meets the objective; says what the fastest takes and what limits it."""


@dataclass(frozen=True)
class Resolved:
    """A solved objective: limit in ms, budget of kernel time in ms, and the solver's policy."""

    limit_ms: float
    budget_ms: float
    solution: Solution


def run_study(
    config: RunConfig, progress: Progress | None = None, resolved: Callable[[Prepared, Resolved], None] | None = None
) -> Answer:
    """Search, validate and export for one objective; everything already known of the study is used again.

    resolved: told of the solver's answer before anything is evaluated. Raises ValueError (one or two lines) on bad input, `Unreachable`
    where no policy can meet the objective.
    """
    progress = progress or Progress(quiet=True)
    objective = config.objective
    folder = open_study(config)
    steps = Steps(folder / "steps")
    key = study_key(config)
    stored = steps.get("prepared", key)
    session: Session | None = None
    if stored is None:
        session = _session(config, progress)
        prepared = prepare_study(session, steps, key)
    else:
        prepared = Prepared.from_json(stored)
    first = resolve(prepared, objective, config)
    progress.say(describe_solution(prepared, first, config))
    if resolved:
        resolved(prepared, first)
    return validate_study(session or _session(config, progress), prepared, first, objective)


def _session(config: RunConfig, progress: Progress) -> Session:
    from search.session import Session

    session = Session(config, progress)
    if not session.target.present:
        raise ConfigError(
            f"--target {config.target}: not this machine, so nothing can be measured here; run the search there, "
            f"or with --target cpu here"
        )
    if config.tasks:
        from search.evaluate import find_tasks

        find_tasks(config.tasks)
        if session.loaded.tokenizer is None:
            raise ConfigError(f"--tasks: {session.loaded.source} has no tokenizer; leave --tasks out or add tokenizer.json")
    return session


def open_study(config: RunConfig) -> Path:
    """The study's folder with its resolved configuration; raises ConfigError where the path is something else."""
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --study or --results")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.toml").exists():
        raise ConfigError(f"{folder} holds something that is no study; choose another --study or --results")
    if (folder / "config.toml").exists():
        _check_saved(config, folder)
    try:
        write_text(folder / "config.toml", to_toml(config))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def _check_saved(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError where the folder's study is about something else; what only steers the search may change."""
    saved = read_toml(folder / "config.toml")
    for name in _IDENTITY:
        mine, theirs = getattr(config, name), saved.get(name, getattr(RunConfig(), name))
        if mine != theirs:
            raise ConfigError(
                f"{folder}: a study with --{name.replace('_', '-')} {_shown(theirs)}, here it is {_shown(mine)}; choose another --study"
            )


def _shown(value: Any) -> str:
    return ",".join(value) or "(none)" if isinstance(value, tuple) else str(value)


_IDENTITY = (
    "model",
    "transform",
    "target",
    "runtime",
    "workload",
    "data",
    "sequence",
    "calibration_tokens",
    "search_tokens",
    "threads",
    "seed",
)
"""What a study is about: numbers under other values cannot be compared."""

_NOT_PREPARED = (
    "latency",
    "evaluations",
    "finalists",
    "max_kl",
    "tasks",
    "limit",
    "study",
    "results",
    "storage",
    "cache",
    "export",
)


def study_key(config: RunConfig) -> str:
    """Key of everything that the prepared study depends on, local files by size and time."""
    values = {name: value for name, value in vars(config).items() if name not in _NOT_PREPARED}
    files = [config.model, *(source.partition("=")[2] or source for source in config.data)]
    return content_key(_VERSION, values, [_stat(Path(name).expanduser()) for name in files])


def _stat(path: Path) -> list[Any]:
    if not path.exists():
        return []
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def prepare_study(session: Session, steps: Steps, key: str) -> Prepared:
    """Latency table, whole-model map, calibration and sensitivities; kept under `key`."""
    from search.prepare import prepare

    # What cannot be searched is refused before the model writes text or anything is measured.
    _ = session.space
    open_store(session)
    prepared = prepare(session, steps, key)
    steps.put("prepared", key, prepared.to_json())
    return prepared


def resolve(prepared: Prepared, objective: Objective, config: RunConfig, tighten: float = 1.0) -> Resolved:
    """The solver's policy whose upper latency bound meets the objective times `tighten`; raises `Unreachable`.

    Where only the prediction itself meets it and not its upper bound, that has to do: what is measured in the end decides.
    """
    limit = objective.resolve(prepared.dense_ms[0])
    problem, map_ = prepared.problem, prepared.map
    try:
        budget = map_.budget(limit * tighten)
    except ValueError:
        budget = (limit * tighten - map_.b0) / map_.b1
    if budget < problem.fastest_ms:
        budget = max(budget, (limit * tighten - map_.b0) / map_.b1)
    try:
        budget = min(budget, sum(float(t.max()) for t in problem.latency_ms))
        return Resolved(limit, budget, solve(problem, budget))
    except Infeasible as error:
        raise Unreachable(_unreachable(prepared, objective, error.limits[0])) from None


def _unreachable(prepared: Prepared, objective: Objective, limit: tuple[str, Any, float]) -> str:
    fastest = prepared.map.predict(prepared.problem.fastest_ms)
    outside = prepared.map.predict(0.0).mean if prepared.map.b0 > 0 else 0.0
    return (
        f"--latency {objective.text} ({objective.resolve(prepared.dense_ms[0]):.3g} ms) cannot be met on {prepared.target['name']}: "
        f"the fastest legal policy takes about {fastest.mean:.3g} ms [{fastest.lo:.3g}, {fastest.hi:.3g}] "
        f"(predicted from measured runs), of which {outside:.3g} ms pass outside the compressed layers; the slowest of those is "
        f"{limit[0]} ({limit[1].label}, {limit[2]:.3g} ms). "
        f"Ask for {fastest.hi:.3g}ms or more."
    )


def describe_solution(prepared: Prepared, found: Resolved, config: RunConfig) -> str:
    """The solver's answer in a line, all of it predicted."""
    ms = prepared.map.predict(found.solution.latency_ms)
    mix = ", ".join(f"{count} {name}" for name, count in prepared.mix(found.solution.policy).items())
    return (
        f"solved for {found.limit_ms:.4g} ms: predicted {ms.mean:.4g} ms [{ms.lo:.4g}, {ms.hi:.4g}], KL {found.solution.loss:.3g} nats "
        f"({mix}); 1 ms more buys {found.solution.shadow_price:.2g} nats"
    )


def validate_study(session: Session, prepared: Prepared, found: Resolved, objective: Objective) -> Answer:
    """Evaluate, measure and judge; then write, materialise and export the answer."""
    from search.explore import Truth, explore, features_of, first_stage_records
    from search.finalists import Judge, choose
    from search.prepare import price
    from search.results import Answer, policy_name, save

    began = time.monotonic()
    config, folder = session.config, session.config.folder
    check_same(session, prepared)
    store = open_store(session)
    truth = Truth(_search_evaluator(session), store, prepared)
    table = price(session)
    found = anchor(session, prepared, table, found, objective)
    tighten = 1.0
    finalists: list[Finalist] = []
    for attempt in range(ATTEMPTS):
        ranked = explore(prepared, truth, store, found.solution, found.budget_ms, config, session.progress)
        finalists = _measure(session, prepared, table, ranked, objective, truth)
        searched = [item for item in finalists if not item.simple]
        if any(item.meets for item in searched) or attempt == ATTEMPTS - 1:
            break
        over = min((item.ratio_hi if objective.relative else item.hi_ms) / objective.value for item in searched)
        tighten = 0.99 / max(over, 1.0)
        session.progress.say(f"measured {over - 1:.1%} above the objective: solving again for {tighten:.1%} of that")
        budget = found.budget_ms - (1 - tighten) * found.limit_ms / prepared.map.b1
        if budget < prepared.problem.fastest_ms:
            break
        found = Resolved(found.limit_ms, budget, solve(prepared.problem, budget))
    judge = Judge(session, prepared)
    finalists = [judge.validate(item) if item.meets else item for item in finalists]
    chosen, simple, difference = choose(finalists, config.max_kl)
    for item in _worth_reordering(chosen, simple, difference):
        finalists[finalists.index(item)] = judge.reordered(item)
    if (
        chosen is not None
        and simple is not None
        and chosen is not simple
        and len(_worth_reordering(chosen, simple, difference)) > 1
    ):
        chosen, simple, difference = choose(finalists, config.max_kl)
    finalists = [judge.report(item) for item in finalists]
    chosen = _same(finalists, chosen)
    simple = _same(finalists, simple)
    if chosen is not None:
        at = finalists.index(chosen)
        finalists[at] = chosen = judge.runtime_agreement(chosen, table)
    finalists = _with_tasks(session, judge, finalists, chosen)
    chosen = _same(finalists, chosen)
    answer = Answer(
        objective=objective.text,
        limit_ms=objective.value * finalists[0].latency_ms if objective.relative else objective.value,
        verdict="met" if chosen is not None and not _contended(finalists) else "not met",
        finalists=tuple(finalists),
        chosen=None if chosen is None else finalists.index(chosen),
        simple=None if simple is None else finalists.index(_same(finalists, simple)),  # type: ignore[arg-type]
        difference=difference,
        shadow_price=found.solution.shadow_price,
        predicted={"kl": found.solution.loss, "latency_ms": prepared.map.predict(found.solution.latency_ms).mean},
        predictor=_predictor_report(
            first_stage_records(prepared, store, truth.first_tokens), features_of(prepared), config.seed
        ),
        cost={
            **{f"{name} time": seconds for name, seconds in prepared.seconds.items()},
            "search and validation time": time.monotonic() - began,
            "true evaluations in this run": truth.spent,
            "true evaluations in the study": len(store.records()),
        },
        versions=versions(),
        notes=tuple(_notes(session, prepared, finalists, chosen, simple, config)),
    )
    texts = {policy_name(item, answer): policy_text(session, prepared, item, answer) for item in finalists if item.policy.sites}
    save(folder, answer, prepared, config, texts)
    if answer.best is not None and answer.best.policy.sites:
        deliver(session, prepared, answer, judge.edits(answer.best))
    return answer


def anchor(session: Session, prepared: Prepared, table: Any, found: Resolved, objective: Objective) -> Resolved:
    """The objective solved again with the map corrected by a measurement of its first solution.

    Near one policy the map's error is nearly constant, so that one whole-model run takes most of it away, and its interval with it.
    """
    from search.evaluate import Quality
    from search.explore import Ranked
    from search.finalists import measure

    policy = found.solution.policy
    if not policy.sites or policy.canonical() == Policy().canonical():
        return found
    unknown = Quality((0.0,), (0.0,), 0)
    _, run = measure(session, prepared, table, [Ranked("solver", policy, unknown, False)], objective)
    measured, upper = (run.ratio, run.ratio_hi) if objective.relative else (run.latency_ms, run.hi_ms)
    scale = prepared.dense_ms[0] if objective.relative else 1.0
    bias = measured * scale / run.predicted_ms
    margin = upper / measured - 1 + MARGIN
    problem, map_ = prepared.problem, prepared.map
    budget = (found.limit_ms / (bias * (1 + margin)) - map_.b0) / map_.b1
    budget = min(max(budget, problem.fastest_ms), sum(float(t.max()) for t in problem.latency_ms))
    result = Resolved(found.limit_ms, budget, solve(problem, budget))
    session.progress.say(
        f"its solution measured: {measured * scale:.4g} ms where {run.predicted_ms:.4g} were predicted; solved again: "
        f"KL {result.solution.loss:.3g} nats predicted"
    )
    return result


def check_same(session: Session, prepared: Prepared) -> None:
    """Raises ConfigError where the study was prepared for another model or device."""
    if session.loaded.digest != prepared.model["digest"]:
        raise ConfigError(
            f"{session.config.folder}: a study of another model ({prepared.model['label']}, digest {prepared.model['digest']}; here "
            f"{session.loaded.digest}); choose another --study"
        )
    if session.target.fingerprint != prepared.target["fingerprint"]:
        raise ConfigError(
            f"{session.config.folder}: measured on another device or set-up ({prepared.target['description']}, fingerprint "
            f"{prepared.target['fingerprint']}; here {session.target.fingerprint}); choose another --study"
        )


def open_store(session: Session) -> Any:
    """The study's Optuna store; raises ForeignStudy where it belongs to something else."""
    from search.study import Store

    config = session.config
    context = {
        "model": session.loaded.digest,
        "target": session.target.fingerprint,
        "runtime": config.runtime,
        "workload": config.workload,
        "calibration text": session.corpora["calibrate"].sha256,
        "search text": session.corpora["search"].sha256,
    }
    return Store(config.storage or config.folder / "study.db", config.study_name, context)


def _search_evaluator(session: Session) -> Any:
    from search.evaluate import Evaluator

    return Evaluator(session.switch, session.corpora["search"].tokens)


def _measure(
    session: Session, prepared: Prepared, table: Any, ranked: Sequence[Ranked], objective: Objective, truth: Any
) -> list[Finalist]:
    """The dense model, the best searched policies, the best simple one, and a few uniform ones, measured end to end."""
    from search.explore import FIRST_STAGE, Ranked, short_name
    from search.finalists import measure
    from search.strategies.presets import uniform

    searched = [item for item in ranked if not item.simple][: session.config.finalists]
    chosen = searched + [item for item in ranked if item.simple][:1]
    taken = {item.policy.key() for item in chosen}
    others = []
    for preset in uniform(prepared.problem):
        if preset.policy.key() not in taken and preset.policy.canonical() != Policy().canonical():
            quality = truth.quality(preset.name, preset.policy, FIRST_STAGE)
            others.append(Ranked(short_name(preset.name, prepared), preset.policy, quality, True))
    others.sort(key=lambda item: prepared.sum_ms(item.policy))
    best: list[Ranked] = []
    for item in others:
        if not best or item.quality.kl < best[-1].quality.kl:
            best.append(item)
    return measure(session, prepared, table, [*chosen, *best[-BASELINES:]], objective)


def _worth_reordering(
    chosen: Finalist | None, simple: Finalist | None, difference: tuple[float, float] | None
) -> list[Finalist]:
    """The answer; and the best simple policy too, unless the answer leads clearly."""
    from search.finalists import CLEAR

    if chosen is None:
        return []
    if simple is None or simple is chosen or difference is None or difference[0] < -CLEAR * difference[1]:
        return [chosen]
    return [chosen, simple]


def _same(finalists: Sequence[Finalist], wanted: Finalist | None) -> Finalist | None:
    return None if wanted is None else next(item for item in finalists if item.policy.key() == wanted.policy.key())


def _contended(finalists: Sequence[Finalist]) -> bool:
    return any(item.contended for item in finalists)


def _with_tasks(session: Session, judge: Any, finalists: list[Finalist], chosen: Finalist | None) -> list[Finalist]:
    """Scores of the tasks asked for, of the dense model and of the answer."""
    if not session.config.tasks:
        return finalists
    from search.evaluate import lm_eval_tasks
    from search.session import all_threads

    result = []
    for item in finalists:
        if item is chosen or not item.policy.sites:
            session.progress.say(f"lm-eval: {', '.join(session.config.tasks)} with {item.name}")
            with all_threads():
                session.switch.edits(judge.edits(item))
                scores = lm_eval_tasks(session.model, session.loaded.tokenizer, session.config.tasks, session.config.limit)
            item = replace(item, tasks=scores)
        result.append(item)
    return result


def _predictor_report(records: Sequence[Any], features: Any, seed: int) -> dict[str, Any] | None:
    from predictors.loss import evaluate_unseen
    from search.results import plain_report

    if len({record.policy.key() for record in records}) < 6:
        return None
    return plain_report(evaluate_unseen(records, features, seed=seed))


def _notes(
    session: Session,
    prepared: Prepared,
    finalists: Sequence[Finalist],
    chosen: Finalist | None,
    simple: Finalist | None,
    config: RunConfig,
) -> list[str]:
    notes = []
    if _contended(finalists):
        notes.append(
            "the machine was contended while latency was measured: no objective is claimed to be met; run again when it is quiet"
        )
    drift = finalists[0].latency_ms / prepared.dense_ms[0]
    if not 1 / DRIFT < drift < DRIFT:
        notes.append(
            f"the dense model took {finalists[0].latency_ms:.3g} ms now and {prepared.dense_ms[0]:.3g} ms when the choices were priced: "
            "the machine was in another state; ratios are paired by round and hold, milliseconds are those of this run"
        )
    if chosen is None:
        notes.append("no policy met the objective when measured; the nearest are in the table")
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
            f"latency was measured with this project's kernels on {session.target.name}; it was not measured in {config.runtime}, "
            "whose own kernels differ"
        )
    return notes
