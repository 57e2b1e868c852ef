"""`search run --dry-run`: the space, and what the run would cost, before anything is measured or computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from methods.policy import DENSE
from methods.rotate.model import refuses
from profilers.table import LatencyTable
from search.config import ConfigError, RunConfig
from search.explore import FIRST_STAGE, N_SIMPLE
from search.prepare import PROBES
from search.pricing import table_keys
from search.progress import Progress
from search.session import Session
from search.whole_model import MIXED_RUNS


def dry_run(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """What is to be decided, and counts of everything the run would do; loads the model, writes nothing to the study."""
    session = Session(replace(config, transform="none"), progress)
    decision = config.transform_decision
    reason = None if decision is None else refuses(session.model, session.loaded.structure, decision)
    if reason:
        raise ConfigError(f"--transform {config.transform}: {reason}")
    notes = (*session.stored.notes, *session.fit_notes)
    space = session.space
    keys = table_keys(session)
    target = session.target
    table = LatencyTable.open(config.cache_folder / "tables", target) if target.present else session.elsewhere.table(keys)
    structure = session.loaded.structure
    compressed = sum(1 for choices in space.choices.values() for choice in choices if choice.decision != DENSE)
    formats = {choice.format.name for choices in space.choices.values() for choice in choices if choice.decision != DENSE}
    n_uniform = len({choice.decision for choices in space.choices.values() for choice in choices if choice.decision != DENSE})
    first = n_uniform + N_SIMPLE + 1 + config.evaluations
    return {
        "model": f"{session.loaded.label}: {len(structure.blocks)} blocks, {structure.n_parameters} parameters",
        "target": f"{target.name}: {target.description}, {target.threads} thread(s)",
        "transform": "none" if decision is None else f"{decision.label}, which is not done in a dry run",
        "objective": f"{config.objectives.text}, {config.load.unit}, {', '.join(load.name for load in config.workloads)}",
        "space": space.describe(),
        "kernel cells to measure": f"{len(table.missing(keys))} of {len(keys)}"
        if target.present
        else "none, the target is not here",
        "whole-model runs": f"at most {(min(4, len(formats)) + MIXED_RUNS + 1) * len(config.workloads)}"
        if target.present
        else "0",
        "compressed sites to make": f"{compressed} on {config.calibration_tokens} calibration tokens",
        "sensitivities": f"{compressed} scores from 1 forward and {PROBES} backward passes",
        "true evaluations": f"at most {first} of {FIRST_STAGE * config.sequence} tokens, the best again on {config.search_tokens}",
        "finalists": f"{config.finalists} searched and the best simple policy, measured end to end and recompressed in order",
        **({"notes": "; ".join(notes)} if notes else {}),
    }
