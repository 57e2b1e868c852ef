"""What a report draws of a study: the curve that the solver predicts, the latency maps, and predicted against measured latencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from predictors.latency import LatencyModel
from profilers.workload import Workload
from search.frontier import Candidate, Fidelity, frontier
from search.limits import reached_ms
from search.objectives import Objectives
from search.prepared import Prepared, WorkloadCost, by_format
from search.report.content import LatencyFit
from search.report.honesty import Pair
from search.report.limits import BUYS, slopes
from search.strategies.problem import Infeasible
from search.strategies.solve import solve

if TYPE_CHECKING:
    from search.results import Answer


def predicted_curve(prepared: Prepared, pace: float = 1.0, n: int = 16) -> list[Candidate]:
    """The solver's predicted frontier over the range of latencies that leaves its limits room; pace: by what latencies are multiplied."""
    problem = prepared.problem
    low, high = problem.fastest_ms, sum(float(t[0]) for t in problem.latency_ms)
    found = {}
    for index in range(n):
        try:
            solution = solve(problem, low + (high - low) * index / (n - 1) + 1e-9, time_limit_s=2.0)
        except Infeasible:
            continue
        ms = prepared.map.predict(solution.latency_ms)
        found[solution.policy.key()] = Candidate(
            policy=solution.policy,
            name=f"solver at {ms.mean * pace:.3g} ms",
            fidelity=Fidelity.PREDICTED,
            kl=max(solution.loss, 0.0),
            kl_stderr=0.0,
            latency_ms=ms.mean * pace,
            latency_lo=ms.lo * pace,
            latency_hi=ms.hi * pace,
            size_bytes=prepared.size_bytes(solution.policy),
        )
    curve = sorted(frontier(list(found.values())), key=lambda c: c.latency_ms)
    return [replace(c, scores={BUYS: slope}) for c, slope in zip(curve, slopes(curve), strict=True)]


def latency_pairs(sources: Iterable[Answer], prepared: Prepared, workloads: Sequence[Workload]) -> dict[str, tuple[Pair, ...]]:
    """By workload: predicted and measured latency of the finalists of these answers, of the dense model's in the same run.

    None of them was fitted: policies that a workload's map was fitted on are left out.
    """
    found: dict[str, dict[tuple[str, str], Pair]] = {}
    for source in sources:
        for place, time in enumerate(Objectives.parse(source.objective, workloads).times):
            known = time.workload.name == prepared.workload or any(c.workload == time.workload.name for c in prepared.also)
            if time.quantile != 0.5 or not known:
                continue
            own = found.setdefault(time.workload.name, {})
            fitted = fitted_on(prepared, time.workload.name)
            for item in source.finalists:
                unseen = item.policy.sites and not {item.policy.key(), by_format(item.policy).key()} & fitted
                if item.label == "measured" and unseen and prepared.covers(item.policy):
                    mean, lo, hi, dense = reached_ms(prepared, time, item.policy)
                    # Of a finalist whose other times nobody kept, as before there were several, only the main one is known.
                    ratio = item.ratio if place == 0 else item.met[place].value / source.finalists[0].met[place].value
                    own[source.objective, item.policy.key()] = Pair(mean / dense, lo / dense, hi / dense, measured=ratio)
    return {name: tuple(pairs.values()) for name, pairs in found.items() if pairs}


def fitted_on(prepared: Prepared, workload: str) -> set[str]:
    """Keys of the policies that a workload's map was fitted on, by their formats; in earlier versions by their methods too."""
    other = [cost.map for cost in prepared.also if cost.workload == workload]
    return {run.policy_key for run in (other[0] if other else prepared.map).runs}


def latency_fits(prepared: Prepared) -> tuple[LatencyFit, ...]:
    """The latency map of every workload in words, with its error on the runs that it was fitted on."""
    fits = []
    priced: list[Prepared | WorkloadCost] = [prepared, *prepared.also]
    for own in priced:
        map_ = own.map
        if isinstance(map_, LatencyModel):
            formula = f"T = {map_.b0:.3g} ms + {map_.b1:.3g} × sum of the sites' kernel times"
            checked = f"{own.checked[:1].upper()}{own.checked[1:]}." if own.checked else ""
            errors = map_.loo_error
            fits.append(LatencyFit(own.workload, formula, len(map_.runs), errors.mean, errors.max, map_.coverage, checked))
    return tuple(fits)
