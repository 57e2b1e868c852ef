"""The steps before an objective matters: price every choice by measurement, calibrate once, score every choice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from methods import catalogue
from methods.apply import site_view
from methods.calibrate import sweep
from methods.formats.format import parse_format
from methods.method import Edit, Stats
from methods.model.structure import Site
from methods.policy import DENSE, Decision, Policy
from predictors.latency import Run, fit_latency, unit_slope
from predictors.sensitivity import score
from profilers import end_to_end
from profilers.cells import site_cells
from profilers.runtime import dense_candidates
from profilers.sweep import measure
from profilers.table import KernelKey, LatencyTable
from search.files import Steps, content_key
from search.prepared import Option, Prepared, SiteOptions
from search.session import Session, all_threads

PROBES = 4
PROBE_SEQUENCES = 8
PROBE_LENGTH = 128
SCORES = 2
"""Counts the formulas of `predictors.sensitivity`: scores of another one are computed again."""
MIXED_RUNS = 6


def prepare(session: Session, steps: Steps, key: str) -> Prepared:
    """All steps, each taken from the study where it was done before."""
    began = time.monotonic()
    table = price(session)
    priced_s = time.monotonic() - began
    sites = _sites(session, table)
    fit = _cached(steps, "latency-map", content_key(key, session.target.fingerprint), lambda: fit_map(session, table, sites))
    mapped_s = time.monotonic() - began - priced_s
    corpora = session.corpora
    text_s = time.monotonic() - began - priced_s - mapped_s
    decisions = decisions_of(sites)
    calibrate(session, decisions)
    calibrated_s = time.monotonic() - began - priced_s - mapped_s - text_s
    texts = (corpora["search"].sha256, corpora["calibrate"].sha256)
    score_key = content_key(key, session.loaded.digest, *texts, PROBES, PROBE_LENGTH, SCORES)
    scores = _cached(steps, "scores", score_key, lambda: score_choices(session, decisions))
    scored_s = time.monotonic() - began - priced_s - mapped_s - text_s - calibrated_s
    loaded = session.loaded
    site_bytes = sum(site.options[0].size_bytes for site in sites)
    return Prepared(
        sites=tuple(_scored(site, scores, fit["scales"]) for site in sites),
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
            "threads": session.target.threads,
            "compute_dtype": session.target.compute_dtype,
            "contended": fit["contended"],
        },
        data={role: {**corpus.summary(), "generated": corpus.generated} for role, corpus in corpora.items()},
        notes=session.space.notes,
        seconds={"table": priced_s, "map": mapped_s, "text": text_s, "calibration": calibrated_s, "scores": scored_s},
    )


def _cached(steps: Steps, name: str, key: str, compute: Any) -> Any:
    value = steps.get(name, key)
    if value is None:
        value = compute()
        steps.put(name, key, value)
    return value


def table_keys(session: Session) -> list[KernelKey]:
    """Every distinct cell that the space can ask for."""
    tokens = session.config.load.tokens_in_flight
    found: dict[KernelKey, None] = {}
    for site in session.loaded.structure.sites:
        for choice in session.space.choices[site.name]:
            for key, _ in site_cells(site, choice.format, tokens, session.experts_per_token):
                found[key] = None
    return list(found)


def price(session: Session) -> LatencyTable:
    """The device's latency table, with every cell of the space measured."""
    keys = table_keys(session)
    table = LatencyTable.open(session.config.cache_folder / "tables", session.target)
    missing = table.missing(keys)
    if missing:
        session.progress.say(f"measuring {len(missing)} kernel cells on {session.target.description}")
        with session.progress.bar("latency table") as update:
            measure(session.target, keys, table, progress=update, notify=session.progress.say)
    return table


def _sites(session: Session, table: LatencyTable) -> tuple[SiteOptions, ...]:
    """Sites with priced options; an option whose kernels failed their checks is left out."""
    tokens = session.config.load.tokens_in_flight
    sites = []
    for site in session.loaded.structure.sites:
        options = []
        for choice in session.space.choices[site.name]:
            cells = site_cells(site, choice.format, tokens, session.experts_per_token)
            if not all(table.has(key) for key, _ in cells):
                continue
            best = [(table.best(key), count) for key, count in cells]
            options.append(
                Option(
                    label=choice.decision.label,
                    format=choice.format.name,
                    bits_per_weight=choice.bits_per_weight,
                    size_bytes=choice.size_bytes,
                    ms=sum(timing.median_ms * count for (_, timing), count in best),
                    kernel=best[0][0][0],
                )
            )
        sites.append(SiteOptions(site.name, site.kind, site.block, site.n_weights, tuple(_worth_having(options))))
    return tuple(sites)


def _worth_having(options: Sequence[Option]) -> list[Option]:
    """Options that are faster than every one with at least their weight and activation bits: the others cannot be the better choice.

    Dropped before anything is calibrated. The dense option stays.
    """
    formats = {option.label: parse_format(option.format) for option in options}

    def beaten(option: Option) -> bool:
        mine = formats[option.label]
        return any(
            other.ms <= option.ms
            and other.bits_per_weight > option.bits_per_weight
            and formats[other.label].act_bits >= mine.act_bits
            for other in options
        )

    return [option for option in options if option.label == DENSE.label or not beaten(option)]


def fit_map(session: Session, table: LatencyTable, sites: Sequence[SiteOptions]) -> dict[str, Any]:
    """Whole-model runs of a few policies, each interleaved with the dense model, and the map fitted on them."""
    target, workload, cache = session.target, session.config.load, session.config.cache_folder
    policies = map_policies(sites, session.config.seed)
    options = {(site.name, option.label): option for site in sites for option in site.options}
    engine = session.engine(table)
    candidates = dense_candidates(session.model, session.loaded.structure, target, table, workload)
    found = end_to_end.measure(candidates, workload, target, rounds=6, cache=cache, notify=session.progress.say)
    dense_name = min(found, key=lambda name: found[name].median_ms)
    dense = candidates[dense_name]
    del candidates
    dense_runs, ratios = [], []
    contended = False
    with session.progress.bar("whole-model runs") as update:
        for index, (_, policy) in enumerate(policies):
            models = {"dense": dense, "policy": engine.materialize(session.rounded_edits(policy))}
            run = end_to_end.measure(models, workload, target, rounds=12, cache=cache, notify=session.progress.say)
            contended = contended or run["policy"].contended
            dense_runs.append(run["dense"])
            ratios.append(run["policy"].ratio_to(run["dense"]))
            update(index + 1, len(policies))
    level = float(np.median([run.median_ms for run in dense_runs]))
    lo, hi = float(np.median([run.lo_ms for run in dense_runs])), float(np.median([run.hi_ms for run in dense_runs]))

    def run_of(policy: Policy, ms: tuple[float, float, float]) -> Run:
        taken = [options[site.name, policy.at(site.name)[0].label] for site in sites]
        parts = {kernel: sum(o.ms for o in taken if o.kernel == kernel) for kernel in {o.kernel for o in options.values()}}
        return Run(policy.key(), sum(o.ms for o in taken), *ms, features=parts)

    runs = [run_of(Policy(), (level, min(lo, level), max(hi, level)))]
    for (_, policy), ratio in zip(policies, ratios, strict=True):
        runs.append(run_of(policy, (ratio.mid * level, ratio.lo * level, ratio.hi * level)))
    try:
        fitted, scales = fit_latency(runs).collapsed()
    except ValueError as error:
        session.progress.say(f"{error}; kernel times are taken as they are instead")
        fitted, scales = unit_slope(runs), {}
    session.progress.say(
        f"dense model: {level:.1f} {workload.unit} ({dense_name}); whole-model map from {len(runs)} runs, "
        f"leave-one-out error {fitted.loo_error.mean:.1%} mean, {fitted.loo_error.max:.1%} worst"
    )
    return {
        "map": fitted.to_dict(),
        "scales": scales,
        "dense_ms": [level, min(lo, level), max(hi, level)],
        "dense_name": dense_name,
        "contended": contended,
    }


def map_policies(sites: Sequence[SiteOptions], seed: int) -> list[tuple[str, Policy]]:
    """Policies that span the space: one format everywhere, from fast to slow, and random mixtures of them."""
    names = {option.format for site in sites for option in site.options[1:]}
    mean = {
        name: np.mean([o.ms / site.options[0].ms for site in sites for o in site.options if o.format == name]) for name in names
    }
    ordered = sorted(names, key=lambda name: float(mean[name]))
    picked = list(dict.fromkeys([ordered[round(i * (len(ordered) - 1) / 3)] for i in range(4)])) if ordered else []
    policies = [(f"uniform {name}", _with_format(sites, lambda _s, name=name: name)) for name in picked]
    generator = np.random.default_rng(seed)
    for index in range(MIXED_RUNS):
        weights = generator.dirichlet([*np.full(len(ordered), 0.7), 0.7 if index % 2 else len(ordered)])
        mixed = {site.name: str(generator.choice([*ordered, "none"], p=weights)) for site in sites}
        policies.append((f"mixed {index + 1}", _with_format(sites, lambda site, mixed=mixed: mixed[site])))
    return list({policy.key(): (name, policy) for name, policy in policies if policy.sites}.values())


def _with_format(sites: Sequence[SiteOptions], wanted: Any) -> Policy:
    decisions = {}
    for site in sites:
        option = next((o for o in site.options if o.format == wanted(site.name) and o.label != DENSE.label), None)
        if option is not None:
            decisions[site.name] = (Decision.parse(option.label),)
    return Policy(decisions)


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
    with session.progress.bar("calibration") as update, all_threads():

        def visit(block: int, stats: Mapping[str, Stats]) -> None:
            for site in structure.in_block(block):
                view = site_view(session.model, structure, site)
                edits = catalogue.apply_many(view, stats, missing[site.name])
                for decision, edit in zip(missing[site.name], edits, strict=True):
                    session.bank.put(site.name, decision, edit)
            update(block + 1, len(structure.blocks))

        sweep(session.model, structure, batches, needs, visit, skip=lambda block: block not in todo, dense=True)


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


def _scored(site: SiteOptions, scores: Mapping[str, Any], scales: Mapping[str, float]) -> SiteOptions:
    """The site with predicted losses, and with kernel times as they count in a whole model."""
    kl, stderr = scores["kl"][site.name], scores["stderr"][site.name]
    options = []
    for option in site.options:
        model_ms = option.ms * scales.get(option.kernel, 1.0)
        loss = {} if option.label == DENSE.label else {"loss": kl[option.label], "loss_stderr": stderr[option.label]}
        options.append(replace(option, model_ms=model_ms, **loss))
    return replace(site, options=tuple(options))
