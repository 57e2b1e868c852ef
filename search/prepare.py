"""The steps before an objective matters: price every choice by measurement, calibrate once, score every choice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from methods import catalogue
from methods.apply import site_view
from methods.calibrate import sweep
from methods.formats.format import parse_format
from methods.formats.twins import float_twin, has_twin
from methods.method import Edit, Stats
from methods.model.structure import Site
from methods.policy import DENSE, Decision
from methods.statistics import format_errors
from methods.typed import Finite
from predictors.sensitivity import score
from profilers.checks import problems
from profilers.roofline import kv_bytes
from profilers.table import LatencyTable
from profilers.workload import Workload
from search.data import Corpus
from search.differencing import Differenced
from search.files import Steps, content_key
from search.limits import check_faster
from search.maps import kept_maps
from search.memory import give_back
from search.prepared import Prepared, SiteOptions, TextFacts, WorkloadCost
from search.pricing import label_of, price, priced_sites
from search.reach import kernels_alone, reachable
from search.session import Session, all_threads
from search.whole_model import Fit

PROBES = 4
PROBE_SEQUENCES = 8
PROBE_LENGTH = 128
SCORES = 2
"""Counts the formulas of `predictors.sensitivity`: scores of another one are computed again."""


class Scores(TypedDict):
    """Sensitivities in a file: nats per token and their standard errors, by site and decision."""

    kl: Mapping[str, Mapping[str, Finite]]
    stderr: Mapping[str, Mapping[str, float]]


def prepare(session: Session, steps: Steps, key: str) -> Prepared:
    """All steps, each taken from the study where it was done before; `key` is that of the study."""
    began, step = time.monotonic(), session.progress.step
    step("latency table")
    table = price(session)
    priced_s = time.monotonic() - began
    costs = priced_sites(session, table)
    check_faster(session.config.objectives, costs[0], session.target.name)
    for warning in kernels_alone(costs, session.config):
        session.progress.say(warning)
    step("whole-model map")
    fits = kept_maps(session, steps, table, costs, content_key(key, session.target.fingerprint))
    unscored = priced(session, table, costs, fits)
    mapped_s = time.monotonic() - began - priced_s
    session.progress.say(reachable(unscored, session.config))
    give_back()  # the models that were timed
    step("text")
    corpora = session.corpora
    text_s = time.monotonic() - began - priced_s - mapped_s
    decisions = decisions_of(unscored.sites)
    step("calibration")
    calibrate(session, decisions)
    calibrated_s = time.monotonic() - began - priced_s - mapped_s - text_s
    texts = (corpora["search"].sha256, corpora["calibrate"].sha256)
    score_key = content_key(session.loaded.digest, *texts, session.config.seed, PROBES, PROBE_LENGTH, SCORES)
    step("sensitivities")
    scores = kept_scores(session, steps, score_key, decisions)
    errors = twins_errors(session, steps, unscored.sites)
    scored_s = time.monotonic() - began - priced_s - mapped_s - text_s - calibrated_s
    return replace(
        unscored,
        sites=tuple(_scored(site, scores, errors) for site in unscored.sites),
        data={role: _text_facts(corpus) for role, corpus in corpora.items()},
        seconds={"table": priced_s, "map": mapped_s, "text": text_s, "calibration": calibrated_s, "scores": scored_s},
    )


def priced(session: Session, table: LatencyTable, costs: Sequence[tuple[SiteOptions, ...]], fits: Sequence[Fit]) -> Prepared:
    """The study before its texts: every price is known, no loss is."""
    fit, sites, workloads, loaded = fits[0], costs[0], session.config.workloads, session.loaded
    site_bytes = sum(site.options[0].size_bytes for site in sites)
    return Prepared(
        sites=tuple(_scaled(site, fit["scales"]) for site in sites),
        latency=fit["map"],
        dense_ms=tuple(fit["dense_ms"]),
        dense_name=fit["dense_name"],
        other_bytes=loaded.structure.n_parameters * session.dense_format.bits // 8 - site_bytes,
        model={
            "label": loaded.label,
            "source": loaded.source,
            "digest": loaded.digest,
            "notes": list(loaded.notes),
            "architecture": loaded.structure.architecture,
            "n_parameters": loaded.structure.n_parameters,
            "dtype": loaded.structure.dtype,
        },
        target={
            "name": session.target.name,
            "description": session.target.description,
            "fingerprint": session.target.fingerprint,
            "facts": dict(session.target.facts),
            "threads": session.target.threads,
            "compute_dtype": session.target.compute_dtype,
        },
        data={},
        notes=(*session.fit_notes, *session.space.notes, *_doubts(session, table, fits)),
        tail=fit["tail"],
        checked=_checked(fit),
        also=tuple(map(_also, costs[1:], fits[1:], workloads[1:])),
        kv_bytes=cache_bytes(session),
        workload=workloads[0].name,
        label=label_of(session, table, fits),
    )


def cache_bytes(session: Session) -> int:
    """Bytes of the largest workload's key/value cache."""
    width = session.target.dtype.itemsize
    return max(kv_bytes(session.loaded.structure, workload, width) for workload in session.config.workloads)


def _text_facts(corpus: Corpus) -> TextFacts:
    n, length = corpus.tokens.shape
    return TextFacts(
        role=corpus.role,
        source=corpus.source,
        sha256=corpus.sha256,
        sequences=n,
        length=length,
        generated=corpus.generated,
    )


def _also(sites: Sequence[SiteOptions], fit: Mapping[str, Any], workload: Workload) -> WorkloadCost:
    ms = tuple(tuple(option.ms * fit["scales"].get(option.kernel, 1.0) for option in site.options) for site in sites)
    return WorkloadCost(workload.name, ms, fit["map"], tuple(fit["dense_ms"]), fit["tail"], _checked(fit))


def _checked(fit: Mapping[str, Any]) -> str:
    """What repeated blocks say of a map; maps of earlier versions were not checked."""
    return Differenced(**fit["blocks"]).words if fit.get("blocks") else ""


def _doubts(session: Session, table: LatencyTable, fits: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table's own checks found against it, and what repeated blocks and the machine's state say against the maps."""
    found = [f"the latency table of {session.target.name} fails its own checks: {problem}" for problem in problems(table)]
    for fit, workload in zip(fits, session.config.workloads, strict=True):
        checked = Differenced(**fit["blocks"]) if fit.get("blocks") else None
        if checked is not None and checked.disagrees:
            found.append(f"the latency map of {workload.name} is off: {checked.words}")
        if fit.get("disturbance"):
            found.append(f"the latency map of {workload.name}: {fit['disturbance']}")
    return found


Decisions = Mapping[str, Sequence[Decision]]


def decisions_of(sites: Sequence[SiteOptions]) -> dict[str, list[Decision]]:
    """What compresses each site in this study."""
    return {site.name: [Decision.parse(o.label) for o in site.options if o.label != DENSE.label] for site in sites}


def calibrate(session: Session, decisions: Decisions) -> None:
    """One sweep over the dense model: every (site, decision) that the bank lacks, block by block."""
    structure = session.loaded.structure
    missing = {site: [d for d in own if not session.bank.has(site, d)] for site, own in decisions.items()}
    n_missing = sum(map(len, missing.values()))
    if not n_missing:
        return
    todo = {site.block for site in structure.sites if missing[site.name]}
    needs = {site: catalogue.needs(own) for site, own in missing.items() if own}
    session.switch.dense()
    batches = session.corpora["calibrate"].sequences()
    session.progress.say(
        f"calibrating on {session.corpora['calibrate'].tokens.numel()} tokens, {n_missing} compressed sites to make"
    )
    visited: list[int] = []
    with session.progress.bar("calibration") as update, all_threads():

        def visit(block: int, stats: Mapping[str, Stats]) -> None:
            for site in structure.in_block(block):
                view = site_view(session.model, structure, site)
                edits = catalogue.apply_many(view, stats, missing[site.name])
                for decision, edit in zip(missing[site.name], edits, strict=True):
                    session.bank.put(site.name, decision, session.held(edit))
            visited.append(block)
            done = len(structure.blocks) - len(todo) + len(visited)
            update(done, len(structure.blocks), len(structure.blocks) - len(todo))

        sweep(session.model, structure, batches, needs, visit, skip=lambda block: block not in todo, dense=True)


def kept_scores(session: Session, steps: Steps, key: str, decisions: Decisions) -> dict[str, Any]:
    """Sensitivities of every choice; those that the study has under the key of model and texts are not computed again."""
    known = steps.get("scores", key, Scores) or {"kl": {}, "stderr": {}}
    missing = {
        site: [decision for decision in own if decision.label not in known["kl"].get(site, {})]
        for site, own in decisions.items()
    }
    if any(missing.values()):
        found = score_choices(session, missing)
        known = {
            name: {site: {**known[name].get(site, {}), **own} for site, own in scores.items()} for name, scores in found.items()
        }
        steps.put("scores", key, known)
    return known


def score_choices(session: Session, decisions: Decisions) -> dict[str, Any]:
    """Sensitivities of every choice from one forward and a few backward passes."""
    tokens = session.corpora["search"].tokens
    length = min(PROBE_LENGTH, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    step = max(1, len(pieces) // PROBE_SEQUENCES)
    chosen = pieces[::step][:PROBE_SEQUENCES]

    def candidates(site: Site) -> Iterator[tuple[str, Edit]]:
        for decision in decisions[site.name]:
            yield decision.label, session.edit(site.name, decision)

    session.switch.dense()
    with session.progress.bar("sensitivities") as update, all_threads():
        scores = score(
            session.model,
            session.loaded.structure,
            chosen,
            candidates,
            session.norm_of,
            n_probes=PROBES,
            seed=session.config.seed,
            progress=update,
        )
    return {"kl": scores.kl, "stderr": scores.stderr}


def twins_errors(session: Session, steps: Steps, sites: Sequence[SiteOptions]) -> Mapping[str, Mapping[str, float]]:
    """By site and format, the error of its weights rounded to nearest, where a format of integers and its twin are both options.

    For inputs in 16 bits, as `search.strategies.presets.mofq` takes them; nothing is computed where there is no such pair.
    """
    pairs = {site.name: names for site in sites if (names := twins([option.format for option in site.options]))}
    if not pairs:
        return {}

    def compute() -> dict[str, dict[str, float]]:
        session.switch.dense()
        found = {}
        for name, names in pairs.items():
            view = site_view(session.model, session.loaded.structure, session.loaded.structure.site(name))
            errors = format_errors(view, {layer: Stats(0) for layer in view.weights}, names)
            found[name] = {fmt: error.weight for fmt, error in errors.items()}
        return found

    return steps.made("twins", content_key(session.loaded.digest, pairs), compute)


def twins(names: Sequence[str]) -> list[str]:
    """Of formats by name, those of integers whose `float_twin` is among them, inputs in 16 bits, each followed by its twin."""
    own = {fmt.name: float_twin(fmt).name for fmt in map(parse_format, names) if fmt.act_bits == 16 and has_twin(fmt)}
    return [name for pair in own.items() if pair[1] in names for name in pair]


def _scaled(site: SiteOptions, scales: Mapping[str, float]) -> SiteOptions:
    """The site with kernel times as they count in a whole model."""
    return replace(site, options=tuple(replace(o, model_ms=o.ms * scales.get(o.kernel, 1.0)) for o in site.options))


def _scored(site: SiteOptions, scores: Mapping[str, Any], errors: Mapping[str, Mapping[str, float]]) -> SiteOptions:
    """The site with predicted losses, and the errors of twins."""
    kl, stderr, own = scores["kl"][site.name], scores["stderr"][site.name], errors.get(site.name, {})
    options = (
        option
        if option.label == DENSE.label
        else replace(option, loss=kl[option.label], loss_stderr=stderr[option.label], rounding_error=own.get(option.format))
        for option in site.options
    )
    return replace(site, options=tuple(options))
