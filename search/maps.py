"""Whole-model latency maps, kept by what they depend on: they outlive a change of text, of methods, and the study itself."""

from __future__ import annotations

from collections.abc import Sequence

from methods.typed import read
from profilers.kernels.catalogue import kernels
from profilers.pace import pace_of
from profilers.table import LatencyTable
from search.differencing import Differenced
from search.files import Steps, content_key
from search.prepared import SiteOptions, read_map
from search.session import Session
from search.whole_model import Fit, KeptFit, whole_model

FOLDER = "maps"
"""Of the cache: one file a model, device, workloads, formats and kernels."""

_STEP = "latency-map"
_VERSION = 1


def kept_maps(
    session: Session, steps: Steps, table: LatencyTable, costs: Sequence[Sequence[SiteOptions]], earlier: str
) -> list[Fit]:
    """The map of every workload: the study's own, one that another study measured of the same, or measured now.

    costs: priced sites by workload; earlier: the key under which studies of earlier versions kept theirs. A map whose runs something
    disturbed stays in its study. Of a target that is not here maps are put together from its tables, and not kept.
    """

    def made() -> list[Fit]:
        pairs = zip(costs, session.config.workloads, strict=True)
        return [whole_model(session, table, own, workload) for own, workload in pairs]

    if not session.target.present:
        return made()
    key = map_key(session, costs)
    shared = Steps(session.config.cache_folder / FOLDER)
    found = kept_fits(steps, _STEP, key) or kept_fits(steps, _STEP, earlier)
    if found is None:
        found = kept_fits(shared, key, key)
        if found is not None:
            session.progress.say(
                "whole-model latency map: that of an earlier study of the same model, device, workloads and formats"
            )
    if found is None:
        found = made()
        usual = pace_of(session.target).words if session.target.device == "cpu" else ""
        if all(fit["label"] == "measured" and fit["disturbance"] in ("", usual) for fit in found):
            shared.put(key, key, found)
    steps.put(_STEP, key, found)
    return found


def kept_fits(steps: Steps, name: str, key: str) -> list[Fit] | None:
    """The maps of a file, None where it holds none, or none that can be read."""
    found: list[Fit] | None = steps.get(name, key, list[KeptFit])
    try:
        for fit in found or ():
            read_map(fit["map"])
            if fit.get("blocks"):
                read(Differenced, fit["blocks"], name)
    except ValueError:
        return None
    return found


def map_key(session: Session, costs: Sequence[Sequence[SiteOptions]]) -> str:
    """Key of what a map depends on: model, device, kernels, workloads, and what every format costs where it is worth its time.

    A limit on bytes asks for further options and changes nothing of the others.
    """
    priced = [
        [(site.name, sorted({(o.format, o.kernel, o.ms) for o in site.options if o.fast})) for site in sites] for sites in costs
    ]
    sources = [kernel.source_hash for kernel in kernels(session.target)]
    workloads = [workload.name for workload in session.config.workloads]
    return content_key(
        *(_VERSION, session.loaded.digest, session.target.fingerprint, sources, workloads, session.config.seed, priced)
    )
