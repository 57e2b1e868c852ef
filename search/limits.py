"""From what is asked for to what a solver keeps: budgets of kernel time, and linear limits on other workloads and on bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from methods.model.structure import Structure
from methods.policy import Policy
from predictors.assumed import AssumedMap
from predictors.intervals import Interval
from predictors.latency import LatencyModel
from search.config import ConfigError
from search.objectives import ByteLimit, Objective, Objectives
from search.prepared import Prepared, SiteOptions
from search.strategies.presets import uniform
from search.strategies.problem import Floats, Limit
from spaces.space import Space

TOWARDS_FASTEST = 0.25
"""How far from the best simple policy's latency to the fastest's an objective lies that is chosen to bind."""


class Unreachable(ValueError):
    """No legal policy meets what is asked for; says what the fastest or the smallest takes and what limits it."""


def binding(prepared: Prepared) -> str:
    """A latency relative to the dense model's that no single format meets best: `0.64x`.

    It lies a quarter of the way from the uniform policy of least predicted loss that is faster than dense to the fastest policy of all, so
    that some sites have to give up more than others.
    """
    problem = prepared.problem
    dense, fastest = (prepared.map.predict(ms).mean for ms in (prepared.sum_ms(Policy()), problem.fastest_ms))
    simple = [preset.policy for preset in uniform(problem)]
    faster = [policy for policy in simple if prepared.sum_ms(policy) < prepared.sum_ms(Policy())] or [Policy()]
    best = prepared.map.predict(prepared.sum_ms(min(faster, key=prepared.loss))).mean
    return f"{(best - TOWARDS_FASTEST * (best - fastest)) / dense:.2f}x"


def under(prepared: Prepared, objectives: Objectives) -> Prepared:
    """The study with everything asked for besides the main objective as limits of its problem, and the options that can serve them.

    Raises ConfigError where an objective needs what was not measured.
    """
    prepared = prepared if objectives.sizes else prepared.fast
    for time in objectives.times:
        median_limit(prepared, time)
    times = [_time_limit(prepared, time) for time in objectives.times[1:]]
    return replace(prepared, limits=(*times, *(_byte_limit(prepared, size) for size in objectives.sizes)))


def median_limit(prepared: Prepared, objective: Objective) -> float:
    """The median step, in ms, that an objective comes to; of a 95th percentile by the tail that the dense model's steps have."""
    _, _, dense_ms, tail = _cost(prepared, objective)
    limit = objective.resolve(dense_ms)
    if objective.quantile == 0.5:
        return limit
    if math.isnan(tail):
        raise ConfigError(
            f"--tpot-p95: nothing was run on {prepared.target['name']}, so the tail of its steps is not known; use --latency, or "
            "search there"
        )
    return limit / tail


def kernel_budget(map_: LatencyModel | AssumedMap, limit_ms: float, fastest_ms: float) -> float:
    """The kernel sum whose upper latency bound meets a limit; where none of a legal policy does, that whose expected latency does."""
    expected = (limit_ms - map_.b0) / map_.b1
    try:
        budget = map_.budget(limit_ms)
    except ValueError:
        return expected
    return budget if budget >= fastest_ms else max(budget, expected)


def possible_budget(map_: LatencyModel | AssumedMap, limit_ms: float, fastest_ms: float, slowest_ms: float) -> float:
    """The largest kernel sum, up to `slowest_ms`, whose *lower* latency bound meets a limit; nan where none does, so that none can."""
    for sum_ms in np.linspace(slowest_ms, fastest_ms, 200):
        if not ruled_out(map_, float(sum_ms), limit_ms):
            return float(sum_ms)
    return math.nan


def ruled_out(map_: LatencyModel | AssumedMap, sum_ms: float, limit_ms: float) -> bool:
    """Whether even the lower bound of a kernel sum's latency exceeds a limit: what the map's own error leaves open, a run decides."""
    try:
        return map_.predict(sum_ms).lo > limit_ms
    except ValueError:  # outside of what the map can say
        return False


def loosened(prepared: Prepared, objectives: Objectives) -> Prepared:
    """The study with limits on other workloads' times only where the map is sure of them; limits on bytes are exact and stay."""
    limits = {limit.name: limit for limit in prepared.limits}
    for time in objectives.times[1:]:
        map_, costs, _, _ = _cost(prepared, time)
        fastest, slowest = (float(sum(pick(own) for own in costs)) for pick in (np.min, np.max))
        budget = possible_budget(map_, median_limit(prepared, time), fastest, slowest)
        limit = limits[name_of(time)]
        if budget > limit.budget:
            limits[limit.name] = replace(limit, budget=budget)
    return replace(prepared, limits=tuple(limits.values()))


def tightened(prepared: Prepared, over: Mapping[str, float]) -> Prepared:
    """The limits that a measurement exceeded, by factor and objective, made that much narrower (and 1 % for the next measurement)."""
    limits = []
    for limit in prepared.limits:
        factor = over.get(limit.name, 0.0)
        if limit.unit == "ms" and factor > 1:
            limit = replace(limit, budget=limit.budget * 0.99 / factor)
        limits.append(limit)
    return replace(prepared, limits=tuple(limits))


def reached_ms(prepared: Prepared, objective: Objective, policy: Policy) -> tuple[float, float, float, float]:
    """Predicted median step of a policy in an objective's workload with its bounds, and the dense model's, in ms."""
    map_, costs, dense_ms, _ = _cost(prepared, objective)
    indices = prepared.problem.indices(policy)
    ms = map_.predict(sum(float(own[j]) for own, j in zip(costs, indices, strict=True)))
    return ms.mean, ms.lo, ms.hi, dense_ms


def fastest_ms(prepared: Prepared, objective: Objective) -> tuple[Interval, float]:
    """Modelled median step of the fastest legal policy in an objective's workload, whatever else is asked for, and the dense model's."""
    map_, costs, dense_ms, _ = _cost(prepared, objective)
    return map_.predict(float(sum(own.min() for own in costs))), dense_ms


def reached_bytes(prepared: Prepared, kind: str, policy: Policy) -> int:
    """Stored bytes of a policy's model (`size`), with the key/value cache of the largest workload for `memory`."""
    return prepared.size_bytes(policy) + (prepared.kv_bytes if kind == "memory" else 0)


def _cost(prepared: Prepared, objective: Objective) -> tuple[LatencyModel | AssumedMap, tuple[Floats, ...], float, float]:
    """Map, costs by site and choice, dense latency and tail of an objective's workload."""
    name = objective.workload.name
    if name == prepared.workload:
        return prepared.map, prepared.problem.latency_ms, prepared.dense_ms[0], prepared.tail
    for cost in prepared.also:
        if cost.workload == name:
            return cost.map, tuple(np.array(own) for own in cost.model_ms), cost.dense_ms[0], cost.tail
    known = ", ".join((prepared.workload, *(cost.workload for cost in prepared.also)))
    raise ConfigError(
        f"{objective.text}: the study was prepared for {known}, not for {name}; repeat `search run` with that objective"
    )


def _time_limit(prepared: Prepared, objective: Objective) -> Limit:
    map_, costs, _, _ = _cost(prepared, objective)
    fastest = float(sum(own.min() for own in costs))
    budget = kernel_budget(map_, median_limit(prepared, objective), fastest)
    return Limit(name_of(objective), costs, budget)


def _byte_limit(prepared: Prepared, asked: ByteLimit) -> Limit:
    outside = prepared.other_bytes + (prepared.kv_bytes if asked.kind == "memory" else 0)
    return Limit(name_of(asked), prepared.problem.size_bytes, float(asked.value - outside), "bytes")


def reachable(prepared: Prepared, objective: Objective, median_ms: float) -> str:
    """What to ask for, in the objective's unit, so that a median step of `median_ms` meets it."""
    _, _, dense_ms, tail = _cost(prepared, objective)
    if objective.relative:
        return f"{math.ceil(median_ms / dense_ms * 1e3) / 1e3:g}x or more"
    if objective.kind == "throughput":
        return f"{math.floor(1e5 * objective.workload.batch / median_ms) / 100:g}tok/s or less"
    return f"{math.ceil(median_ms * (1 if objective.quantile == 0.5 else tail) * 1e3) / 1e3:g}ms or more"


def nothing_faster(sites: Sequence[SiteOptions]) -> str:
    """Says that the table left only the dense option."""
    return f"no format here is faster than dense {sites[0].options[0].format}"


def check_faster(objectives: Objectives, sites: Sequence[SiteOptions], target: str) -> None:
    """Raises Unreachable where the table left nothing but the dense option: whatever is asked for, there is nothing to search."""
    if any(len(site.options) > 1 for site in sites):
        return
    main = objectives.main
    met = not main.relative or main.value >= 1
    what = "there is nothing to search" if met else f"{main.flag} cannot be met"
    raise Unreachable(
        f"{what} on {target}: {nothing_faster(sites)} in {main.workload.name}, at none of {len(sites)} sites. "
        f"{'Use the dense model, or ask' if met else 'Ask'} for other --formats, or for a larger batch or model."
    )


def check_bytes(objectives: Objectives, structure: Structure, space: Space, dense_bits: int, kv_bytes: int) -> None:
    """Raises Unreachable, before anything is measured, for a limit on bytes that the smallest choice at every site exceeds.

    dense_bits: of what lies outside of the sites; kv_bytes: the key/value cache that counts for `memory`.
    """
    sites = sum(min(choice.size_bytes for choice in choices) for choices in space.choices.values())
    outside = (structure.n_parameters - sum(site.n_weights for site in structure.sites)) * dense_bits // 8
    for asked in objectives.sizes:
        cache = kv_bytes if asked.kind == "memory" else 0
        least = sites + outside + cache
        if asked.value < least:
            held = f" and {_megabytes(cache)} are the key/value cache" if cache else ""
            raise Unreachable(
                f"{asked.flag} cannot be met: the smallest legal policy takes {_megabytes(least)}, of which {_megabytes(outside)} lie "
                f"outside the compressed layers{held}. Ask for {_megabytes(least)} or more, or give --formats of fewer bits."
            )


def _megabytes(n_bytes: int) -> str:
    """Rounded up, so that asking for it is enough."""
    return f"{math.ceil(n_bytes / 1e3) / 1e3:g}MB"


def name_of(asked: Objective | ByteLimit) -> str:
    """What a limit is called: the objective's text, and the workload where it is a time."""
    return f"{asked.text} ({asked.workload.name})" if isinstance(asked, Objective) else asked.text
