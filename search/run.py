"""`run_study`: the whole way from a configuration to a validated, exported answer, one step a function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from methods.atomic import remove_abandoned
from methods.policy import Policy
from methods.typed import Count
from profilers.cores import check_threads
from search.budget import Budget
from search.config import ConfigError, RunConfig, device_folders
from search.deliver import deliver, policy_text
from search.environment import busy, environment
from search.files import Steps, content_key, mended
from search.folder import (
    check_places,
    check_same,
    has_store,
    keep_prepared,
    kept_prepared,
    open_store,
    open_study,
    save_config,
    study_key,
)
from search.limits import binding, check_bytes, tightened, under
from search.objectives import Objective
from search.outcome import notes_of, predictor_report, search_notes, verdict
from search.prepared import Prepared
from search.progress import Progress
from search.resolved import Resolved, describe_solution, solved
from search.strategies.problem import Infeasible
from search.strategies.solve import solve
from search.words import shortened
from search.writable import check_exports

if TYPE_CHECKING:
    from search.explore import Ranked
    from search.finalists import Finalist
    from search.results import Answer
    from search.session import Session
    from search.study import Store

PREPARING = ("latency table", "whole-model map", "text", "calibration", "sensitivities")
SEARCHING = ("search", "finalists", "judgement", "export")
"""What a run does, in the words of its progress."""

ATTEMPTS = 3
"""Times that a missed objective is tightened and solved again before the run says that it cannot be met."""

BASELINES = 2
"""Uniform policies that are measured besides the best simple one, for the frontier."""

MARGIN = 0.005
"""Share of the objective left free besides the measured interval, so that the next measurement meets it too."""


def run_study(
    config: RunConfig, progress: Progress | None = None, resolved: Callable[[Prepared, Resolved], None] | None = None
) -> Answer:
    """Search, validate and export for one objective; everything already known of the study is used again.

    resolved: told of the solver's answer before anything is evaluated. Raises ValueError (one or two lines) on bad input, `Unreachable`
    where no policy can meet the objective.
    """
    progress = progress or Progress(quiet=True)
    _ = config.objective  # raises where there is none
    _check_target(config)
    if config.target == "cpu":
        _check_compiler(config, progress)
    with open_study(config) as folder:
        check_places(config)
        remove_abandoned(config.cache_folder)
        steps = Steps(folder / "steps")
        key = study_key(config)
        session: Session | None = None
        prepared = kept_prepared(steps, key, config)
        progress.follow((*PREPARING, *SEARCHING) if prepared is None else SEARCHING)
        if prepared is None:
            from search.foresee import refuse_early

            refuse_early(config)
            own = session = _session(config, progress)
            prepared = mended(lambda: prepare_study(own, steps, key), progress.say)
        config = settled(config, prepared, progress)
        if session is not None:
            session.config = config
        prepared, objective = under(prepared, config.objectives), config.objective
        with progress.busy("solving"):
            prepared, first = solved(prepared, objective, config)
        progress.say(describe_solution(prepared, first, config))
        if resolved:
            resolved(prepared, first)
        if session is None:
            session = _session(config, progress)
            check_exports(config, session.loaded, session.space)  # others may be asked for than when it was prepared
        return validate_study(session, prepared, first, objective)


def settled(config: RunConfig, prepared: Prepared, progress: Progress) -> RunConfig:
    """The configuration with a latency in place of `auto`, which is kept as what the study asks."""
    if not config.objective.auto:
        return config
    chosen = replace(config, latency=binding(prepared if config.objectives.sizes else prepared.fast))
    progress.say(f"--latency auto: {chosen.latency} of the dense model's, where no single format is best on this machine")
    save_config(chosen)
    return chosen


def _check_target(config: RunConfig) -> None:
    """Raises TargetError, before anything is written, where the target cannot be searched for."""
    if config.target == "cpu":
        if config.threads:
            check_threads(config.threads)
        return
    from profilers.resolution import resolve as resolve_target

    folders = device_folders(config.devices)
    resolve_target(config.target, folders, config.threads or None, allow_modelled=config.allow_modelled)


def _check_compiler(config: RunConfig, progress: Progress) -> None:
    """Says first that there is no compiler; raises ConfigError where no kernel runs any of the formats without one."""
    from methods.formats.format import parse_format
    from profilers.kernels.build import MISSING, compiler
    from profilers.kernels.catalogue import supported
    from profilers.target import local_cpu
    from spaces.runtimes import default_formats

    if compiler() is not None:
        return
    names = config.formats or default_formats(config.runtime, [load.phase for load in config.workloads])
    target, size = local_cpu(config.threads or None), 512  # which every group divides
    left = [name for name in names if supported(parse_format(name), size, size, 1, target)]
    if not left:
        raise ConfigError(f"{MISSING}: without one nothing here computes in {', '.join(names)}")
    progress.say(f"{MISSING}: without one only {', '.join(left)} can be measured")


def _session(config: RunConfig, progress: Progress) -> Session:
    from search.export.registry import exporter
    from search.session import Session

    for name in config.export:
        exporter(name)
    session = Session(config, progress)
    if config.tasks:
        from search.tasks import find_tasks, load_tasks

        tasks = find_tasks(config.tasks, config.trust_tasks)  # before a model is loaded
        if session.stored.tokenizer is None:
            raise ConfigError(f"--tasks: {session.stored.source} has no tokenizer; leave --tasks out or add tokenizer.json")
        with progress.busy("loading the tasks"):
            load_tasks(tasks)
    progress.say(busy(session.target, config.cache_folder))
    return session


def prepare_study(session: Session, steps: Steps, key: str) -> Prepared:
    """Latency table, whole-model map, calibration and sensitivities; kept under `key`."""
    from search.prepare import cache_bytes, prepare
    from search.pricing import check_priced

    # What cannot be searched is refused before any text is read or anything is measured; a new store can be no stranger's.
    asked, structure = session.config.objectives, session.loaded.structure
    _ = session.fit_notes
    check_bytes(asked, structure, session.space, session.dense_format.bits, cache_bytes(session))
    check_priced(session)
    for note in check_exports(session.config, session.loaded, session.space):
        session.progress.say(note)
    if has_store(session.config):
        open_store(session)
    steps.put("environment", key, environment(session.target))
    prepared = prepare(session, steps, key)
    keep_prepared(steps, key, session.config, prepared)
    return prepared


def validate_study(session: Session, prepared: Prepared, found: Resolved, objective: Objective) -> Answer:
    """Evaluate, measure and judge; then write, materialise and export the answer. What is damaged in the bank is made again."""
    return mended(lambda: _validated(session, prepared, found, objective), session.progress.say)


def _validated(session: Session, prepared: Prepared, found: Resolved, objective: Objective) -> Answer:
    from search.explore import Truth, explore, features_of, first_stage_records
    from search.finalists import Judge, choose
    from search.prepare import calibrate, decisions_of
    from search.pricing import price
    from search.results import Answer, policy_name, save, save_exports, set_damaged_aside

    began = time.monotonic()
    config, folder = session.config, session.config.folder
    check_same(session, prepared)
    set_damaged_aside(folder, session.progress.say)
    calibrate(session, decisions_of(prepared.sites))  # what was cleaned away since
    store = open_store(session)
    truth = Truth(_search_evaluator(session), store, prepared, Budget(config))
    table = price(session)
    if session.target.present:
        found = anchor(session, prepared, table, found, objective)
    finalists: list[Finalist] = []
    for attempt in range(ATTEMPTS):
        session.progress.step("search")
        ranked = explore(
            prepared, truth, store, found.solution, found.budget_ms, config, session.progress, _begun(session, store, found)
        )
        session.progress.step("finalists")
        finalists = _measure(session, prepared, table, ranked, truth)
        searched = [item for item in finalists if not item.simple]
        if any(item.meets for item in searched) or attempt == ATTEMPTS - 1 or not session.target.present:
            break
        again = _tightened(session, prepared, found, min(searched, key=lambda item: item.over))
        if again is None:
            break
        prepared, found = again
    session.progress.step("judgement")
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
    if chosen is not None and session.target.present:
        at = finalists.index(chosen)
        finalists[at] = chosen = judge.runtime_agreement(chosen, table)
    finalists, failed = _with_tasks(session, judge, finalists, chosen)
    chosen = _same(finalists, chosen)
    answer = Answer(
        objective=config.objectives.text,
        limit_ms=objective.value * finalists[0].latency_ms if objective.relative else objective.value,
        verdict=verdict(session, finalists, chosen),
        finalists=tuple(finalists),
        chosen=None if chosen is None else finalists.index(chosen),
        simple=None if simple is None else finalists.index(_same(finalists, simple)),  # type: ignore[arg-type]
        difference=difference,
        shadow_price=found.solution.shadow_price,
        predicted={"kl": found.solution.loss, "latency_ms": prepared.map.predict(found.solution.latency_ms).mean},
        predictor=predictor_report(
            first_stage_records(prepared, store.records(), truth.first_tokens), features_of(prepared), config.seed
        ),
        cost={
            **{f"{name} time": seconds for name, seconds in prepared.seconds.items()},
            "search and validation time": time.monotonic() - began,
            "true evaluations in this run": truth.n_new,
            "true evaluations in the study": len(store.records()),
        },
        versions=environment(session.target),
        notes=(*notes_of(session, prepared, finalists, chosen, simple, config), *search_notes(truth), *failed),
    )
    texts = {policy_name(item, answer): policy_text(session, prepared, item, answer) for item in finalists if item.policy.sites}
    session.progress.step("export")
    with session.progress.busy("writing the report"):
        save(folder, answer, prepared, config, texts)
    if answer.best is not None and answer.best.policy.sites:
        answer = replace(answer, exports=deliver(session, prepared, answer, judge.edits(answer.best)))
        save_exports(folder, answer, prepared, config)
    return answer


def _tightened(session: Session, prepared: Prepared, found: Resolved, nearest: Finalist) -> tuple[Prepared, Resolved] | None:
    """The study and its solution under budgets that are narrower by what the nearest finalist exceeded; None where nothing meets them."""
    main = max(nearest.met[0].over, 1.0)
    tighten = 0.99 / main if main > 1 else 1.0
    session.progress.say(f"measured {nearest.over - 1:.1%} above the objective: solving again for that much less")
    budget = found.budget_ms - (1 - tighten) * found.limit_ms / prepared.map.b1
    narrower = tightened(prepared, {met.name: met.over for met in nearest.met[1:]})
    try:
        return narrower, Resolved(found.limit_ms, budget, solve(narrower.problem, budget))
    except Infeasible:
        return None


def anchor(session: Session, prepared: Prepared, table: Any, found: Resolved, objective: Objective) -> Resolved:
    """The objective solved again with the map corrected by a measurement of its first solution.

    Near one policy the map's error is nearly constant, so that one whole-model run takes most of it away, and its interval with it.
    """
    from search.evaluate import Quality
    from search.explore import Ranked, mix_name
    from search.finalists import measure

    policy = found.solution.policy
    if not policy.sites or policy.canonical() == Policy().canonical():
        return found
    unknown = Quality((0.0,), (0.0,), 0)
    _, run = measure(session, prepared, table, [Ranked(mix_name(policy, prepared), policy, unknown, False)])
    measured, upper = (run.ratio, run.ratio_hi) if objective.relative else (run.latency_ms, run.hi_ms)
    scale = prepared.dense_ms[0] if objective.relative else 1.0
    bias = measured * scale / run.predicted_ms
    margin = upper / measured - 1 + MARGIN
    problem, map_ = prepared.problem, prepared.map
    budget = (found.limit_ms / (bias * (1 + margin)) - map_.b0) / map_.b1
    budget = min(max(budget, problem.fastest_ms), sum(float(t.max()) for t in problem.latency_ms))
    try:
        result = Resolved(found.limit_ms, budget, solve(problem, budget))
    except Infeasible:
        return found  # what else is asked for leaves no room for the correction; the finalists' measurement decides
    session.progress.say(
        f"its solution measured: {measured * scale:.4g} ms where {run.predicted_ms:.4g} were modelled; solved again: "
        f"KL {result.solution.loss:.3g} nats predicted"
    )
    return result


def _begun(session: Session, store: Store, found: Resolved) -> int:
    """Evaluations that the study held when the search for this solution began, in whatever process that was."""
    key = content_key(study_key(session.config), found.budget_ms, found.solution.policy.key(), session.config.store)
    return session.steps.made(f"search-{key}", key, lambda: len(store.records()), Count)


def _search_evaluator(session: Session) -> Any:
    from search.evaluate import Evaluator

    return Evaluator(session.switch, session.corpora["search"].tokens)


def _measure(session: Session, prepared: Prepared, table: Any, ranked: Sequence[Ranked], truth: Any) -> list[Finalist]:
    """The dense model, the best searched policies, the best simple one, and a few uniform ones, measured end to end."""
    from search.explore import FIRST_STAGE, Ranked, short_name
    from search.finalists import measure
    from search.strategies.presets import uniform

    searched = [item for item in ranked if not item.simple][: session.config.finalists]
    chosen = searched + [item for item in ranked if item.simple][:1]
    taken = {item.policy.key() for item in chosen}
    others = []
    for preset in uniform(prepared.problem):
        known = preset.policy.key() in taken | truth.outclassed or preset.policy.canonical() == Policy().canonical()
        if known or truth.budget.spent():
            continue
        quality = truth.quality(preset.name, preset.policy, FIRST_STAGE)
        if quality.kl < math.inf:
            others.append(Ranked(short_name(preset.name, prepared), preset.policy, quality, True))
    others.sort(key=lambda item: prepared.sum_ms(item.policy))
    best: list[Ranked] = []
    for item in others:
        if not best or item.quality.kl < best[-1].quality.kl:
            best.append(item)
    return measure(session, prepared, table, [*chosen, *best[-BASELINES:]])


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


def _with_tasks(
    session: Session, judge: Any, finalists: list[Finalist], chosen: Finalist | None
) -> tuple[list[Finalist], tuple[str, ...]]:
    """Scores of the tasks asked for, of the dense model and of the answer; where they fail, none, and a note that says why."""
    if not session.config.tasks:
        return finalists, ()
    from search.session import all_threads
    from search.tasks import TaskError, find_tasks, score_tasks

    limit = session.config.limit

    def scores(item: Finalist) -> dict[str, dict[str, float]]:
        with session.progress.busy(f"lm-eval: {shortened(session.config.tasks)} with {item.name}"), all_threads():
            session.switch.edits(judge.edits(item))
            return score_tasks(session.model, session.loaded.tokenizer, tasks, limit)

    def kept(item: Finalist) -> dict[str, dict[str, float]]:
        weights = session.loaded.digest, session.corpora["calibrate"].sha256, item.policy.key(), item.recompressed
        key = content_key(*weights, tasks.texts, limit)
        return session.steps.made(f"tasks-{key}", key, lambda: scores(item), Mapping[str, Mapping[str, float]])

    try:
        tasks = find_tasks(session.config.tasks, session.config.trust_tasks)
        return [replace(i, tasks=kept(i)) if i is chosen or not i.policy.sites else i for i in finalists], ()
    except TaskError as error:
        session.progress.say(f"{error}; the answer is delivered without scores")
        return finalists, (f"no scores of tasks: {error}; the same command tries them again, all else is kept",)
