"""`search validate`: an answer that was found for a machine elsewhere, measured on that machine; confirmed, or solved again there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from methods.policy import DENSE
from profilers.campaign import local
from profilers.resolution import look_up
from profilers.runtime import RuntimeRefusal
from profilers.target import Target
from search.config import ConfigError, RunConfig, device_folders
from search.deliver import deliver, policy_text
from search.environment import environment
from search.evaluate import Quality
from search.explore import Ranked
from search.files import Steps, content_key, mended
from search.finalists import Finalist, Judge, choose, measure
from search.folder import held, study_key
from search.limits import Unreachable, under
from search.objectives import Objectives
from search.outcome import contended
from search.prepared import Prepared
from search.pricing import price
from search.progress import Progress
from search.resolved import describe_solution, solved
from search.results import Answer, policy_name, save, save_exports, saved_answer, saved_config, saved_prepared
from search.run import prepare_study, validate_study
from search.session import Session
from search.whole_model import formats_of


def validate(folder: Path, progress: Progress, objective: str = "", on: str = "") -> Answer:
    """Measures the finalists of an unvalidated answer here, on its target; the answer that holds is written into the study.

    on: `cpu` or `cuda` where this machine is the target in another set-up (another torch, more cores) than its table was measured in.
    Where no finalist meets the objective when measured, it is solved again with this machine's own table. Raises ConfigError where this
    machine is not the target, or nothing is to be validated.
    """
    found = saved_answer(folder, objective)
    if found.verdict != "unvalidated":
        raise ConfigError(
            f"{folder}: the answer for {found.objective} is {found.verdict}; only unvalidated ones are to be measured"
        )
    saved = saved_config(folder)
    config = _asking(saved, Objectives.parse(found.objective, saved.stated_workloads))
    target = _target(config, on)
    session = Session(config, progress, target)
    with held(folder):
        prepared = under(saved_prepared(folder), config.objectives)
        measured = _measured(session, prepared, found)
        notes: tuple[str, ...] = ()
        if measured is None or not any(item.meets for item in measured):
            progress.say("no finalist meets the objective when measured: solving again with this machine's own table")
            try:
                return _solved_again(session, folder)
            except Unreachable as error:
                if measured is None:
                    raise
                notes = (str(error),)
        answer = _confirmed(session, found, measured, prepared)
        answer = replace(answer, notes=(*answer.notes, *notes))
        described = replace(
            prepared, target={**prepared.target, "description": target.description, "fingerprint": target.fingerprint}
        )
        texts = {policy_name(i, answer): policy_text(session, described, i, answer) for i in answer.finalists if i.policy.sites}
        save(folder, answer, prepared, config, texts)
        if answer.best is not None and answer.best.policy.sites and _in_bank(session, answer.best):
            answer = replace(answer, exports=deliver(session, described, answer, Judge(session, prepared).edits(answer.best)))
            save_exports(folder, answer, prepared, config)
        return answer


def _asking(config: RunConfig, asked: Objectives) -> RunConfig:
    """The configuration with the objectives of the answer, whatever the study's last run asked for."""
    values = {"latency": "", "ttft": "", "tpot_p95": "", "throughput": "", "memory": "", "size": ""}
    for part in asked.text.split(","):
        kind, equals, value = part.rpartition("=")
        values[kind.replace("-", "_") if equals else "latency"] = value
    return replace(config, **values)  # type: ignore[arg-type]


def _target(config: RunConfig, on: str) -> Target:
    if on:
        return replace(local(on, config.threads or None), name=config.target)
    found = look_up(config.target, device_folders(config.devices), config.threads or None)
    if found.target is None or not found.target.present:
        raise ConfigError(
            f"this machine is not {config.target} ({found.state}: {found.why}); carry the study there and repeat this, or where this "
            f"is that machine in another set-up, say so with --on cpu"
        )
    if found.target.device == "cuda":
        raise ConfigError(f"--target {config.target}: whole models do not run on CUDA here yet, so nothing can be validated")
    return found.target


def _measured(session: Session, prepared: Prepared, found: Answer) -> list[Finalist] | None:
    """Every finalist's latency here, with the quality that the study found; None where a kernel is missing here."""
    nothing = Quality((0.0,), (0.0,), 0)
    ranked = [Ranked(item.name, item.policy, nothing, item.simple) for item in found.finalists[1:]]
    try:
        # Speed does not depend on values, so that nothing but the policies needs to have been carried here.
        runs = measure(session, prepared, price(session), ranked, lambda engine, policy: engine.stand_in(formats_of(policy)))
    except RuntimeRefusal as error:
        session.progress.say(f"{error}")
        return None
    return [_with_quality(run, item) for run, item in zip(runs, found.finalists, strict=True)]


_QUALITY = (
    "recompressed", "plain_kl", "kl", "kl_stderr", "kl_each", "report_kl", "report_kl_stderr", "perplexity", "runtime_kl", "tasks",
)  # fmt: skip


def _with_quality(run: Finalist, known: Finalist) -> Finalist:
    return replace(run, **{name: getattr(known, name) for name in _QUALITY})


def _confirmed(session: Session, found: Answer, finalists: Sequence[Finalist], prepared: Prepared) -> Answer:
    """The answer with measured latencies: the best finalist that meets the objective, which need not be the one expected to."""
    chosen, simple, difference = choose(finalists, session.config.max_kl)
    before = found.best
    same = chosen is not None and before is not None and chosen.policy.key() == before.policy.key()
    main = session.config.objectives.main
    expected = "" if before is None else f", where {before.latency_ms:.4g} ms were {before.label} before"
    dense = finalists[0].latency_ms
    return replace(
        found,
        limit_ms=main.resolve(dense),
        verdict="met" if chosen is not None and not contended(finalists) else "not met",
        finalists=tuple(finalists),
        chosen=None if chosen is None else list(finalists).index(chosen),
        simple=None if simple is None else list(finalists).index(simple),
        difference=difference,
        versions=environment(session.target),
        notes=(
            *(note for note in found.notes if "search validate" not in note),
            f"validated on {session.target.description} (fingerprint {session.target.fingerprint}): "
            f"{'no finalist meets the objective' if chosen is None else 'the same policy is the answer' if same else 'another finalist is'}"
            + (f", {chosen.latency_ms:.4g} ms measured{expected}" if chosen is not None else "")
            + f"; the study was searched with latencies of {prepared.target['description']}",
        ),
    )


def _solved_again(session: Session, folder: Path) -> Answer:
    """The whole search with latencies measured here; texts, compressed tensors and true evaluations of the study are used again."""
    config = session.config
    steps, key = Steps(folder / "steps"), content_key(study_key(config), session.target.fingerprint)
    prepared = mended(lambda: prepare_study(session, steps, key), session.progress.say)
    prepared = under(prepared, config.objectives)
    prepared, first = solved(prepared, config.objective, config)
    session.progress.say(describe_solution(prepared, first, config))
    return validate_study(session, prepared, first, config.objective)


def _in_bank(session: Session, item: Finalist) -> bool:
    decided = ((site, decisions[0]) for site, decisions in item.policy.sites.items())
    return all(session.bank.has(site, decision) for site, decision in decided if decision != DENSE)
