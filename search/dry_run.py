"""`search run --dry-run`: the space, and what the run would cost, before anything is measured or computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from methods.policy import DENSE, Decision
from methods.rotate.model import refuses
from profilers.kernels.build import planning
from profilers.table import KernelKey, LatencyTable
from profilers.target import Target, memory_bytes, physical_cores
from search.config import ConfigError, RunConfig
from search.estimate import peak_bytes, seconds, words
from search.explore import FIRST_STAGE, N_SIMPLE
from search.files import Steps
from search.folder import study_key
from search.foresee import foreseen
from search.limits import Unreachable
from search.prepare import PROBES, priced
from search.prepared import Prepared
from search.pricing import priced_sites, table_keys
from search.progress import Progress
from search.reach import kernels_alone, reachable
from search.report.content import mebibytes
from search.session import Session
from search.whole_model import MIXED_RUNS, assume_map
from search.writable import check_exports, listed


def dry_run(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """What is to be decided, what the run would take, and what is known of its feasibility.

    Nothing is fetched, converted, compiled, measured or written; no weight is read, unless the model's configuration does not tell its
    structure.
    """
    plain = replace(config, transform="none")
    session = foreseen(plain, progress)
    note = "" if session is not None else "; its weights were read, as its configuration does not tell its structure"
    session = session or Session(plain, progress)
    decision = config.transform_decision
    reason = None if decision is None else _not_rotated(session, decision)
    if reason:
        raise ConfigError(f"--transform {config.transform}: {reason}")
    with planning():
        return _planned(config, session, decision, note)


def _not_rotated(session: Session, decision: Decision) -> str | None:
    """Why a model cannot be transformed, as far as its shapes tell."""
    try:
        return refuses(session.model, session.loaded.structure, decision)
    except (RuntimeError, NotImplementedError):  # it takes values, which a model that was not loaded does not have
        return None


def _known(config: RunConfig, target: Target) -> LatencyTable:
    """What was measured of this machine, which may be nothing."""
    folder = config.cache_folder / "tables"
    if (folder / f"{target.fingerprint}.jsonl").exists():
        return LatencyTable.open(folder, target)
    return LatencyTable(target.fingerprint, target.description)


def _planned(config: RunConfig, session: Session, decision: Decision | None, note: str) -> dict[str, Any]:
    space = session.space
    notes = (*session.stored.notes, *session.fit_notes, *check_exports(config, session.loaded, space))
    keys = table_keys(session)
    target = session.target
    table = _known(config, target) if target.present else session.elsewhere.table(keys)
    structure = session.loaded.structure
    compressed = sum(1 for choices in space.choices.values() for choice in choices if choice.decision != DENSE)
    formats = {choice.format.name for choices in space.choices.values() for choice in choices if choice.decision != DENSE}
    n_uniform = len({choice.decision for choices in space.choices.values() for choice in choices if choice.decision != DENSE})
    first = n_uniform + N_SIMPLE + 1 + config.evaluations
    memory = f"about {peak_bytes(structure) / 2**30:.1f} GiB at the peak, of {memory_bytes() / 2**30:.0f} GiB here"
    runs = (min(4, len(formats)) + MIXED_RUNS + 1) * len(config.workloads) if target.present else 0
    counts = {
        "cells": len(table.missing(keys)) if target.present else 0,
        "runs": runs,
        "choices": compressed,
        "evaluations": first,
    }
    return {
        "model": f"{session.loaded.label}: {len(structure.blocks)} blocks, {structure.n_parameters} parameters{note}",
        "target": f"{target.name}: {target.description}",
        "transform": "none" if decision is None else f"{decision.label}, which is not done in a dry run",
        "objective": f"{config.objectives.text}, {config.load.unit}, {', '.join(load.name for load in config.workloads)}",
        "space": space.describe(),
        "exports": listed(session.loaded, space),
        "kernel cells to measure": f"{len(table.missing(keys))} of {len(keys)}"
        if target.present
        else "none, the target is not here",
        "whole-model runs": f"at most {runs}" if runs else "0",
        "compressed sites to make": f"{compressed} on {config.calibration_tokens} calibration tokens",
        "sensitivities": f"{compressed} scores from 1 forward and {PROBES} backward passes",
        "true evaluations": f"at most {first} of {FIRST_STAGE * config.sequence} tokens, the best again on {config.search_tokens}",
        "finalists": f"{config.finalists} searched and the best simple policy, measured end to end and recompressed in order",
        "feasibility": _feasible(config, session, table, keys),
        "time": words(seconds(config, structure, counts, physical_cores())),
        "memory": f"{memory}; estimated from counts",
        **({"notes": "; ".join(notes)} if notes else {}),
    }


def _feasible(config: RunConfig, session: Session, table: LatencyTable, keys: Sequence[KernelKey]) -> str:
    """What can be said of the objectives by what the study, the table or the space's sizes tell already."""
    kept = Steps(config.folder / "steps").get("prepared", study_key(config))
    try:
        if kept is not None:
            return f"{reachable(Prepared.from_json(kept), config)} (prepared already)"
        if config.target != "cpu" and not session.target.present:
            costs = priced_sites(session, table)
            fits = [assume_map(session, table, own, load) for own, load in zip(costs, config.workloads, strict=True)]
            return reachable(priced(session, table, costs, fits), config)
    except Unreachable as error:
        return f"no: {error}"
    smallest, dense = (sum(pick(c.size_bytes for c in own) for own in session.space.choices.values()) for pick in (min, max))
    sizes = f"decided weights from {mebibytes(smallest)} to {mebibytes(dense)}"
    missing = len(table.missing(keys))
    if missing:
        return f"{sizes}; latency is not known before {missing} kernel cells and whole models are measured"
    found = kernels_alone(priced_sites(session, table), config)
    return f"{sizes}; {'; '.join(found) or 'by kernel times alone the objectives are in reach; whole models were not measured'}"
