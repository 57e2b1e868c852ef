"""What a run will take, estimated from counts alone: nothing is measured, computed or converted for it."""

from __future__ import annotations

from collections.abc import Mapping

from methods.model.structure import Structure
from search.config import RunConfig
from search.data import ROLES
from search.prepare import PROBE_LENGTH, PROBE_SEQUENCES, PROBES

CORE_FLOPS = 2e10
"""Multiply-adds a second and core, times two, that calibration and evaluation reach on current CPUs in fp32."""

MEMORY_RATE = 1e10
"""Bytes a second that a decode step reads its weights at."""

CELL_S = 1.2
RUN_STEPS = 80
"""Of a whole-model run: rounds times steps, of both models that take turns."""

BASE_BYTES = 1 << 30
"""Interpreter and libraries."""


def seconds(config: RunConfig, structure: Structure, counts: Mapping[str, int], cores: int) -> dict[str, float]:
    """Time of every step in seconds, on a machine that does nothing else, within a factor of two or so.

    counts: `cells` to measure, whole-model `runs`, compressed sites to make (`choices`), first-stage `evaluations`.
    """
    n, layers = structure.n_parameters, [(site, layer) for site, layer in structure.layers()]
    flops = cores * CORE_FLOPS
    step_s = max(2 * n / MEMORY_RATE, max(2 * n * load.tokens_in_flight for load in config.workloads) / flops)
    hessians = 2 * sum({site.name: site.d_in**2 for site in structure.sites}.values()) * config.calibration_tokens
    solved = 2 * sum(layer.d_out * layer.d_in**2 for _, layer in layers) * counts["choices"] / max(1, len(structure.sites))
    forward = 2 * n * config.calibration_tokens
    read = {"calibrate": config.calibration_tokens, "search": config.search_tokens}
    tokens = sum(read.get(role, config.validation_tokens) for role in ROLES)
    probes = (1 + 3 * PROBES) * 2 * n * min(PROBE_SEQUENCES * PROBE_LENGTH, config.search_tokens)
    evaluated = counts["evaluations"] * min(4 * config.sequence, config.search_tokens) + 6 * config.search_tokens
    judged = (
        6 * config.validation_tokens * 2 * n
        + 2 * (forward + hessians)
        + 2 * solved / max(1, counts["choices"] / len(structure.sites))
    )
    return {
        "latency table": counts["cells"] * CELL_S,
        "whole-model map": counts["runs"] * RUN_STEPS * step_s,
        "text": 0.0 if config.data else tokens / 16 * step_s,
        "calibration": (forward + hessians + solved) / flops,
        "sensitivities": probes / flops,
        "search": evaluated * 2 * n / flops,
        "finalists": judged / flops + (config.finalists + 4) * RUN_STEPS * 3 * step_s,
    }


def peak_bytes(structure: Structure) -> int:
    """Memory at the peak: fp32 weights, and beside them two models on the target's kernels or a block's statistics."""
    n = structure.n_parameters
    by_block: dict[int, int] = {}
    for site in structure.sites:
        by_block[site.block] = by_block.get(site.block, 0) + 2 * 8 * site.d_in**2
    return BASE_BYTES + 4 * n + max(4 * n, max(by_block.values()))


def words(found: Mapping[str, float]) -> str:
    """The whole and its parts: `about 12 min on a machine that is free (calibration 2 min, …)`."""
    parts = ", ".join(f"{name} {_time(value)}" for name, value in found.items() if value >= 1)
    return (
        f"about {_time(sum(found.values()))} on a machine that is free{f' ({parts})' if parts else ''}; estimated from counts"
    )


def _time(value: float) -> str:
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
