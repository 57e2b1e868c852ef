"""From a prepared study and an objective to the solver's policy, or to why there is none. Imports no torch: re-solving is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from predictors.assumed import AssumedMap
from search.config import RunConfig
from search.limits import Unreachable, kernel_budget, loosened, median_limit, name_of, nothing_faster, reachable, ruled_out
from search.objectives import ByteLimit, Objective, Objectives
from search.prepared import Prepared
from search.strategies.problem import Infeasible
from search.strategies.solve import Solution, solve


@dataclass(frozen=True)
class Resolved:
    """A solved objective: limit in ms, budget of kernel time in ms, and the solver's policy."""

    limit_ms: float
    budget_ms: float
    solution: Solution


def solved(prepared: Prepared, objective: Objective, config: RunConfig) -> tuple[Prepared, Resolved]:
    """What `resolve` finds, with the study; where the map's own error leaves open whether it can be met, the nearest policy instead.

    That one is measured, which decides; the study's limits are then those that the map is sure of. Raises `Unreachable` where nothing
    can meet the objective, or nothing will be measured here.
    """
    try:
        return prepared, resolve(prepared, objective, config)
    except Unreachable:
        loose = loosened(prepared, config.objectives)
        found = None if isinstance(prepared.map, AssumedMap) else _nearest(loose, objective)
        if found is None:
            raise
        return loose, found


def _nearest(prepared: Prepared, objective: Objective) -> Resolved | None:
    """Solved for the objective's expected latency, or for the least there is; None where even its lower bound misses the objective."""
    limit, problem, map_ = median_limit(prepared, objective), prepared.problem, prepared.map
    try:
        least = solve(problem.with_loss(problem.latency_ms), problem.slowest_ms).latency_ms
        if ruled_out(map_, least, limit):
            return None
        budget = max(least, min((limit - map_.b0) / map_.b1, problem.slowest_ms))
        return Resolved(limit, budget, solve(problem, budget))
    except Infeasible:
        return None


def resolve(prepared: Prepared, objective: Objective, config: RunConfig, tighten: float = 1.0) -> Resolved:
    """The solver's policy whose upper latency bound meets the objective times `tighten`; raises `Unreachable`.

    Where only the prediction itself meets it and not its upper bound, that has to do: what is measured in the end decides.
    """
    limit, problem = median_limit(prepared, objective), prepared.problem
    budget = kernel_budget(prepared.map, limit * tighten, problem.fastest_ms)
    try:
        budget = min(budget, problem.slowest_ms)
        return Resolved(limit, budget, solve(problem, budget))
    except Infeasible as error:
        if error.name:
            raise Unreachable(
                f"{_flag(config.objectives, error.name)} cannot be met on {prepared.target['name']} together with {objective.flag}: {error}"
            ) from None
        raise Unreachable(_unreachable(prepared, objective, error.limits[0])) from None


def _flag(objectives: Objectives, name: str) -> str:
    """The flag that asked for a limit."""
    asked: list[Objective | ByteLimit] = [*objectives.times, *objectives.sizes]
    return next(each.flag for each in asked if name_of(each) == name)


def _unreachable(prepared: Prepared, objective: Objective, limit: tuple[str, Any, float]) -> str:
    fastest = prepared.map.predict(prepared.problem.fastest_ms)
    known = "modelled from measured runs" if prepared.label == "measured" else prepared.label
    asked = f"{objective.flag} ({median_limit(prepared, objective):.3g} ms) cannot be met on {prepared.target['name']}"
    ask = f"Ask for {reachable(prepared, objective, fastest.mean if isinstance(prepared.map, AssumedMap) else fastest.hi)}."
    if all(len(site.options) == 1 for site in prepared.sites):
        return f"{asked}: {nothing_faster(prepared.sites)}, which takes {prepared.dense_ms[0]:.3g} ms. {ask}"
    outside = prepared.map.predict(0.0).mean if prepared.map.b0 > 0 else 0.0
    return (
        f"{asked}: the fastest legal policy takes about {fastest.mean:.3g} ms [{fastest.lo:.3g}, {fastest.hi:.3g}] "
        f"({known}), of which {outside:.3g} ms pass outside the compressed layers; the slowest of those is "
        f"{limit[0]} ({limit[1].label}, {limit[2]:.3g} ms). {ask}"
    )


def describe_solution(prepared: Prepared, found: Resolved, config: RunConfig) -> str:
    """The solver's answer in a line: latency is modelled, loss predicted."""
    ms = prepared.map.predict(found.solution.latency_ms)
    open_ = (
        "; the map leaves open whether that is reached: it will be measured" if ms.mean > found.limit_ms * (1 + 1e-9) else ""
    )
    mix = ", ".join(f"{count} {name}" for name, count in prepared.mix(found.solution.policy).items())
    return (
        f"solved for {found.limit_ms:.4g} ms: modelled {ms.mean:.4g} ms [{ms.lo:.4g}, {ms.hi:.4g}], predicted KL "
        f"{found.solution.loss:.3g} nats ({mix}); 1 ms more buys {found.solution.shadow_price:.2g} nats{open_}"
    )
