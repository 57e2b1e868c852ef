"""From what is asked for to what a solver keeps: budgets of kernel time, and linear limits on other workloads and on bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from methods.policy import Policy
from predictors.assumed import AssumedMap
from predictors.intervals import Interval
from predictors.latency import LatencyModel
from search.config import ConfigError
from search.objectives import ByteLimit, Objective, Objectives
from search.prepared import Prepared
from search.strategies.presets import uniform
from search.strategies.problem import Floats, Limit

TOWARDS_FASTEST = 0.25
"""How far from the best simple policy's latency to the fastest's an objective lies that is chosen to bind."""


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
    """The study with everything asked for besides the main objective as limits of its problem.

    Raises ConfigError where an objective needs what was not measured.
    """
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


def name_of(asked: Objective | ByteLimit) -> str:
    """What a limit is called: the objective's text, and the workload where it is a time."""
    return f"{asked.text} ({asked.workload.name})" if isinstance(asked, Objective) else asked.text
