"""What can be reached at all, told from the latency table and the map, before anything is calibrated or evaluated."""

from __future__ import annotations

from collections.abc import Sequence

from search.config import RunConfig
from search.limits import fastest_ms, under
from search.objectives import Objective
from search.prepared import Prepared, SiteOptions
from search.report.content import mebibytes
from search.resolved import solved


def reachable(prepared: Prepared, config: RunConfig) -> str:
    """The range from the fastest and smallest legal policies to the dense model, in a line; raises `Unreachable`.

    prepared: priced, and scored or not: losses decide nothing here.
    """
    asked = config.objectives
    solved(under(prepared, asked), asked.main, config)
    ranges = []
    for time in {time.workload: time for time in asked.times}.values():
        fastest, dense_ms = fastest_ms(prepared, time)
        ranges.append(
            f"{time.workload.name} from {fastest.mean:.3g} ms [{fastest.lo:.3g}, {fastest.hi:.3g}] to {dense_ms:.3g} ms dense "
            f"({fastest.mean / dense_ms:.2f}x to 1x)"
        )
    known = "modelled from measured runs" if prepared.label == "measured" else prepared.label
    smallest, dense = (prepared.other_bytes + sum(own) for own in _sizes(prepared))
    return f"in reach: {'; '.join(ranges)}, {known}; size from {mebibytes(smallest)} to {mebibytes(dense)} dense"


def _sizes(prepared: Prepared) -> tuple[list[int], list[int]]:
    """Bytes of every site, the least and the dense one's."""
    sizes = [[option.size_bytes for option in site.options] for site in prepared.sites]
    return [min(own) for own in sizes], [own[0] for own in sizes]


def kernels_alone(costs: Sequence[Sequence[SiteOptions]], config: RunConfig) -> list[str]:
    """Warnings for the objectives that kernel times alone put out of reach: the rest of a step only adds to them.

    costs: the priced sites of every workload of `config`, in their order. It is no refusal: whole models have not been measured.
    """
    found = {}
    for sites, workload in zip(costs, config.workloads, strict=True):
        fastest = sum(min(option.ms for option in site.options) for site in sites)
        dense = sum(site.options[0].ms for site in sites)
        for time in config.objectives.times:
            if time.workload == workload and fastest > time.resolve(dense):
                found[time] = _hopeless(time, fastest, dense)
    return list(found.values())


def _hopeless(time: Objective, fastest: float, dense: float) -> str:
    return (
        f"warning: {time.text} ({time.workload.name}) looks out of reach: the kernels of the fastest legal policy alone "
        f"take {fastest:.3g} ms where the dense ones take {dense:.3g} ms ({fastest / dense:.2f}x; kernels measured, the rest of a step "
        "not counted); whole models are measured now to be sure"
    )
