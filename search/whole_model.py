"""The map from kernel sums to a whole model's latency: fitted on whole-model runs, or put together for a target that is not here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np
from torch import nn

from methods.formats.format import parse_format
from methods.policy import DENSE, Decision, Policy
from methods.typed import Finite, Positive
from predictors import absent
from predictors.assumed import AssumedMap
from predictors.latency import LatencyModel, Run, fit_latency, unit_slope
from profilers import end_to_end, roofline
from profilers.cells import site_cells
from profilers.datasheets import DATASHEETS
from profilers.label import Label, weakest
from profilers.pace import pace_of
from profilers.runtime import Runtime, dense_candidates
from profilers.table import LatencyTable
from profilers.timer import Timing, quantile
from profilers.workload import Workload
from search.config import ConfigError
from search.differencing import difference
from search.prepared import SiteOptions, by_format
from search.session import Session

MIXED_RUNS = 16
"""With the uniform ones and the dense model at least 19: fewer, and a conformal 90 % interval is as wide as the worst residual."""

MAP_ROUNDS = 8

FEWEST_RUNS = 9
"""Runs, the dense one among them, from which a conformal 90 % interval has an order statistic: before, no map is judged."""

NARROW = 0.03
"""Relative half-width of the map's interval that needs no further run: policies differ by about that beyond what the form can say."""

STALLED = 3
"""Runs after which an interval that has not shrunk by a tenth will not do so soon."""

OVERTIME = 3.0
"""How much longer than on a free machine all whole-model runs together may take; the map is fitted on those that were made by then."""

HOPELESS = 5
"""Runs after which a machine that disturbed each of them is taken as busy: the map is then of kernel sums alone."""

LONG_S = 120.0
"""Seconds of whole-model runs that are announced."""

Fit = dict[str, Any]
"""A whole-model map as it is kept, what `KeptFit` says."""


class KeptFit(TypedDict):
    """A whole-model map in a file.

    map: as `predictors` writes it; scales: of kernels; dense_ms: of the dense model, with its interval; tail: its 95th percentile over its
    median, nan where nothing was run; disturbance: what its runs say of the machine; blocks: the map's check by `search.differencing`.
    """

    map: Mapping[str, Any]
    scales: Mapping[str, Positive]
    dense_ms: tuple[Positive, Positive, Positive]
    dense_name: str
    tail: float
    disturbance: str
    label: Label
    blocks: NotRequired[Mapping[str, Finite] | None]


def whole_model(session: Session, table: LatencyTable, sites: Sequence[SiteOptions], workload: Workload) -> Fit:
    """The map of a workload: fitted on whole-model runs, or of a target that is not here, put together from what is known.

    Runs are of the options that are worth their time, where there are any, so that limits on bytes need no other map.
    """
    fast = [site.fast for site in sites]
    able = fast if any(len(site.options) > 1 for site in fast) else sites
    return (fit_map if session.target.present else assume_map)(session, table, able, workload)


@dataclass
class _Pairs:
    """Policies and their runs, each interleaved with one of the dense model.

    stored: whether that computes as sites do that a policy leaves dense; rounded to another dtype, it says nothing of their kernels.
    """

    stored: bool = True
    policies: list[Policy] = field(default_factory=list)
    dense: list[end_to_end.Measurement] = field(default_factory=list)
    compressed: list[end_to_end.Measurement] = field(default_factory=list)

    @property
    def dense_ms(self) -> tuple[float, float, float]:
        """The dense model's median latency over all runs with its interval."""
        level = float(np.median([run.median_ms for run in self.dense]))
        lo, hi = (float(np.median([getattr(run, end) for run in self.dense])) for end in ("lo_ms", "hi_ms"))
        return level, min(lo, level), max(hi, level)

    @property
    def hopeless(self) -> bool:
        """Whether every one of enough runs was disturbed."""
        n = len(self.policies)
        return n >= HOPELESS and all(map(_disturbed, self.dense, self.compressed))

    def runs(self, sites: Sequence[SiteOptions]) -> list[Run]:
        """What the map is fitted on: the dense model as stored, and every policy by its ratio to the dense one in the same rounds."""
        level = self.dense_ms[0]
        ratios = [run.ratio_to(reference) for run, reference in zip(self.compressed, self.dense, strict=True)]
        return [
            *([_run(sites, Policy(), self.dense_ms)] if self.stored else []),
            *(
                _run(sites, policy, (ratio.mid * level, ratio.lo * level, ratio.hi * level))
                for policy, ratio in zip(self.policies, ratios, strict=True)
            ),
        ]


def _disturbed(*runs: end_to_end.Measurement) -> bool:
    return bool(end_to_end.disturbance(runs))


def fit_map(session: Session, table: LatencyTable, sites: Sequence[SiteOptions], workload: Workload) -> Fit:
    """The map fitted on whole-model runs of a few policies, as many as make its interval narrower and `OVERTIME` leaves time for.

    On a machine that disturbs every run it is of kernel sums alone, which its label says.
    """
    engine = session.engine(table, workload)
    dense_name, dense = _best_dense(session, engine, workload)
    stored = dense_name == f"dense {session.loaded.structure.dtype}"
    pairs = _measured(session, sites, workload, engine, dense, stored)
    runs, level = pairs.runs(sites), pairs.dense_ms[0]
    fitted, scales, label = _fitted(runs, pairs.hopeless, session.progress.say)
    disturbance = "; ".join(filter(None, (end_to_end.disturbance([*pairs.dense, *pairs.compressed]), _usual_pace(session))))
    session.progress.say(disturbance)
    session.progress.say(
        f"dense model: {level:.1f} {workload.unit} ({dense_name}); whole-model map from {len(runs)} runs, "
        f"leave-one-out error {fitted.loo_error.mean:.1%} mean, {fitted.loo_error.max:.1%} worst"
    )
    as_stored = dense if stored else engine.materialize({})
    checked = difference(session, engine, sites, workload, as_stored, fitted, scales)
    if checked is not None:
        session.progress.say(checked.words)
    waits = sorted(sample.wall * 1e3 / run.median_ms for run in pairs.dense for sample in run.samples.all)
    return {
        "map": fitted.to_dict(),
        "scales": scales,
        "dense_ms": list(pairs.dense_ms),
        "dense_name": dense_name,
        "tail": max(1.0, quantile(waits, 0.95)),
        "disturbance": disturbance,
        "label": label,
        "blocks": None if checked is None else asdict(checked),
    }


def _best_dense(session: Session, engine: Runtime, workload: Workload) -> tuple[str, nn.Module]:
    """The fastest uncompressed model and its name: the one that every objective is relative to."""
    target, cache, progress = session.target, session.config.cache_folder, session.progress
    candidates = dense_candidates(engine)
    with progress.bar("dense model") as update:
        found = end_to_end.measure(candidates, workload, target, rounds=6, cache=cache, notify=progress.say, progress=update)
    name = min(found, key=lambda name: found[name].median_ms)
    return name, candidates[name]


def _measured(
    session: Session,
    sites: Sequence[SiteOptions],
    workload: Workload,
    engine: Runtime,
    dense: nn.Module,
    stored: bool = True,
) -> _Pairs:
    """Runs of policies until the map's interval is narrow, no longer shrinks, or time is up; stored: as `_Pairs` has it."""
    policies = map_policies(sites, session.config.seed)
    found, halves = _Pairs(stored), list[float]()
    spent_s = 0.0
    with session.progress.bar("whole-model runs") as update:
        for index, (_, policy) in enumerate(policies):
            model = engine.stand_in(formats_of(policy))
            begin = time.monotonic()
            reference, run = end_to_end.compare(
                dense,
                model,
                workload,
                session.target,
                retakes=1,
                rounds=MAP_ROUNDS,
                cache=session.config.cache_folder,
                notify=session.progress.say,
            )
            spent_s += time.monotonic() - begin
            found.policies.append(policy)
            found.dense.append(reference)
            found.compressed.append(run)
            expected_s = len(policies) * 2e-3 * found.dense_ms[0] * MAP_ROUNDS * end_to_end.steps_of_turn(workload)
            if not index and expected_s > LONG_S:
                session.progress.say(f"up to {len(policies)} whole-model runs, {expected_s / 60:.0f} minutes on a free machine")
            halves.append(_half_width(found, sites))
            if found.hopeless or _narrow(halves) or (spent_s > OVERTIME * expected_s and len(halves) >= HOPELESS):
                break
            update(index + 1, len(policies))
        update(len(policies), len(policies))
    return found


def _half_width(found: _Pairs, sites: Sequence[SiteOptions]) -> float:
    """Relative half-width of the map's interval amid its runs; infinite where they are too few or give no map."""
    runs = found.runs(sites)
    if len(runs) < FEWEST_RUNS:
        return float("inf")
    try:
        fitted, _ = fit_latency(runs).collapsed()
    except ValueError:
        return float("inf")
    middle = fitted.predict(float(np.median([run.sum_ms for run in fitted.runs])))
    return (middle.hi - middle.lo) / (2 * middle.mean)


def _narrow(halves: Sequence[float]) -> bool:
    """Whether further runs would make the interval no narrower, or it is narrow enough."""
    if halves[-1] <= NARROW:
        return True
    before = halves[-1 - STALLED] if len(halves) > STALLED else float("inf")
    return np.isfinite(before) and halves[-1] > 0.9 * before


def _fitted(runs: Sequence[Run], hopeless: bool, say: Callable[[str], None]) -> tuple[LatencyModel, dict[str, float], str]:
    """Map, scales of kernels and label: `measured`, or where it had to be of kernel sums alone, `interpolated`."""
    if hopeless:
        n = sum(run.policy_key != Policy().key() for run in runs)
        say(f"each of {n} whole-model runs was disturbed: the latency map is of kernel sums alone until finalists are measured")
        return unit_slope(runs), {}, "interpolated"
    try:
        return (*fit_latency(runs).collapsed(), "measured")
    except ValueError as error:
        say(f"{error}; kernel times are taken as they are instead")
        return unit_slope(runs), {}, "measured"


def _usual_pace(session: Session) -> str:
    return pace_of(session.target).words if session.target.device == "cpu" else ""


def formats_of(policy: Policy) -> dict[str, Any]:
    """The format of every site that a policy compresses, by name."""
    found = {site: decisions[-1].knob("format") for site, decisions in policy.sites.items()}
    return {site: parse_format(str(fmt)) for site, fmt in found.items() if fmt is not None}


def _run(sites: Sequence[SiteOptions], policy: Policy, ms: tuple[float, float, float]) -> Run:
    options = {(site.name, option.label): option for site in sites for option in site.options}
    taken = [options[site.name, policy.at(site.name)[0].label] for site in sites]
    parts = {kernel: sum(o.ms for o in taken if o.kernel == kernel) for kernel in {o.kernel for o in options.values()}}
    return Run(by_format(policy).key(), sum(o.ms for o in taken), *ms, features=parts)


def assume_map(session: Session, table: LatencyTable, sites: Sequence[SiteOptions], workload: Workload) -> Fit:
    """The map of a target that is not here: its kernels, and the rest of a step from a run of such a model there or from its datasheet."""
    structure = session.loaded.structure
    cells = [
        item
        for site in structure.sites
        for item in site_cells(site, session.dense_format, workload.tokens_in_flight, session.experts_per_token)
    ]
    kernels = absent.summed([(table.best(key)[1], count) for key, count in cells])
    rest = _rest(session, workload)
    map_ = AssumedMap(
        b0=rest.median_ms,
        b0_lo=rest.lo_ms,
        b0_hi=rest.hi_ms,
        low=kernels.p10_ms / kernels.median_ms,
        high=kernels.p90_ms / kernels.median_ms,
    )
    dense = map_.predict(kernels.median_ms)
    return {
        "map": map_.to_dict(),
        "scales": {},
        "dense_ms": [dense.mean, dense.lo, dense.hi],
        "dense_name": f"dense {structure.dtype}",
        "tail": float("nan"),
        "disturbance": "",
        "label": weakest((kernels.label, rest.label)),
        "blocks": None,
    }


def _rest(session: Session, workload: Workload) -> Timing:
    """A dense step less its sites' kernels."""
    structure, target = session.loaded.structure, session.target
    found = absent.rest_of_step(session.elsewhere, structure, workload, target.compute_dtype, session.experts_per_token)
    if found is not None:
        return found
    if target.sheet in DATASHEETS:
        return roofline.rest(DATASHEETS[target.sheet], structure, workload)
    runs = ", ".join(run.name for run in session.elsewhere.runs(structure, workload))
    beyond = f" ({runs} is there, but attention and the other operators were not timed as far as this)" if runs else ""
    raise ConfigError(
        f"--target {target.name}: its table has the kernels but no run of this model in {workload.name}{beyond}; measure there with "
        f"`search profile --model … --workload {workload.name}`"
    )


def map_policies(sites: Sequence[SiteOptions], seed: int) -> list[tuple[str, Policy]]:
    """Policies that span the space: one format everywhere, from fast to slow, and random mixtures, by site and by kind of site."""
    names = {option.format for site in sites for option in site.options[1:]}
    mean = {
        name: np.mean([o.ms / site.options[0].ms for site in sites for o in site.options if o.format == name]) for name in names
    }
    ordered = sorted(names, key=lambda name: float(mean[name]))
    picked = list(dict.fromkeys([ordered[round(i * (len(ordered) - 1) / 3)] for i in range(4)])) if ordered else []
    policies = [(f"uniform {name}", _with_format(sites, lambda _s, name=name: name)) for name in picked]
    generator = np.random.default_rng(seed)
    for index in range(MIXED_RUNS):
        weights = generator.dirichlet([*np.full(len(ordered), 0.7), 0.7 if index % 4 > 1 else len(ordered)])
        of_kind = {kind: str(generator.choice([*ordered, "none"], p=weights)) for kind in sorted({site.kind for site in sites})}
        mixed = {site.name: str(generator.choice([*ordered, "none"], p=weights)) for site in sites}
        if index % 2:
            mixed = {site.name: of_kind[site.kind] for site in sites}
        policies.append((f"mixed {index + 1}", _with_format(sites, lambda site, mixed=mixed: mixed[site])))
    return list({policy.key(): (name, policy) for name, policy in policies if policy.sites}.values())


def _with_format(sites: Sequence[SiteOptions], wanted: Any) -> Policy:
    decisions = {}
    for site in sites:
        option = next((o for o in site.options if o.format == wanted(site.name) and o.label != DENSE.label), None)
        if option is not None:
            decisions[site.name] = (Decision.parse(option.label),)
    return Policy(decisions)
