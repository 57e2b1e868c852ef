"""What every choice costs: kernel cells by site and workload, and the map from their sum to a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from methods.formats.format import parse_format
from methods.policy import DENSE, Decision, Policy
from predictors import absent
from predictors.assumed import AssumedMap
from predictors.latency import Run, fit_latency, unit_slope
from profilers import end_to_end, roofline
from profilers.cells import site_cells
from profilers.datasheets import DATASHEETS
from profilers.label import Label, weakest
from profilers.runtime import dense_candidates
from profilers.sweep import measure
from profilers.table import KernelKey, LatencyTable
from profilers.timer import Timing, quantile
from profilers.workload import Workload
from search.config import ConfigError
from search.differencing import difference
from search.prepared import Option, SiteOptions
from search.session import Session

MIXED_RUNS = 16
"""With the uniform ones and the dense model at least 19: fewer, and a conformal 90 % interval is as wide as the worst residual."""

MAP_ROUNDS = 8

Fit = dict[str, Any]
"""A whole-model map as it is kept: `map`, `scales` of kernels, `dense_ms` with its interval, `dense_name`, `tail`, `label`, as
`disturbance` what its runs say of the machine, and as `blocks` the map's check by `search.differencing`."""


def table_keys(session: Session) -> list[KernelKey]:
    """Every distinct cell that the space can ask for, in all workloads."""
    found: dict[KernelKey, None] = {}
    for workload in session.config.workloads:
        for site in session.loaded.structure.sites:
            for choice in session.space.choices[site.name]:
                for key, _ in site_cells(site, choice.format, workload.tokens_in_flight, session.experts_per_token):
                    found[key] = None
    return list(found)


def price(session: Session) -> LatencyTable:
    """The device's latency table with every cell of the space: measured here, or of a target that is not here, whatever is known."""
    keys = table_keys(session)
    if not session.target.present:
        return session.elsewhere.table(keys)
    table = LatencyTable.open(session.config.cache_folder / "tables", session.target)
    missing = table.missing(keys)
    if missing:
        session.progress.say(f"measuring {len(missing)} kernel cells on {session.target.description}")
        with session.progress.bar("latency table") as update:
            measure(session.target, keys, table, progress=update, notify=session.progress.say)
    return table


def label_of(session: Session, table: LatencyTable, fits: Sequence[Fit]) -> Label:
    """How trustworthy latencies are that come of this table and these maps; of a target that is not here, `interpolated` at best.

    Raises ConfigError where they would be modelled and nobody allowed it.
    """
    if session.target.present:
        return "measured"
    label = weakest(["interpolated", absent.label_of(table, table_keys(session)), *(fit["label"] for fit in fits)])
    if label == "modelled" and not session.config.allow_modelled:
        raise ConfigError(
            f"--target {session.target.name}: its tables have no run of this model in this workload, so the time outside of its linears "
            f"would be modelled; measure it there with `search profile --model`, or allow that with --allow-modelled"
        )
    return label


def check_priced(session: Session) -> None:
    """Raises ConfigError where too little is known of a target that is not here; says what the dense model is expected to take there."""
    if session.target.present:
        return
    table, workloads = price(session), session.config.workloads
    fits = [assume_map(session, table, own, load) for own, load in zip(priced_sites(session, table), workloads, strict=True)]
    label = label_of(session, table, fits)
    for fit, workload in zip(fits, workloads, strict=True):
        ms, lo, hi = fit["dense_ms"]
        session.progress.say(
            f"dense model on {session.target.name}: {ms:.3g} {workload.unit} [{lo:.3g}, {hi:.3g}], {label}, not measured for this study"
        )


def priced_sites(session: Session, table: LatencyTable) -> list[tuple[SiteOptions, ...]]:
    """Sites with priced options, once for each workload; an option whose kernels failed their checks in one is left out of all."""
    found = [
        tuple(
            SiteOptions(site.name, site.kind, site.block, site.n_weights, tuple(_options(session, table, site.name, workload)))
            for site in session.loaded.structure.sites
        )
        for workload in session.config.workloads
    ]
    small = bool(session.config.objectives.sizes)
    for index in range(len(found[0])):
        kept = _kept([sites[index].options for sites in found], small)
        if DENSE.label not in kept:
            raise ConfigError(f"--target {session.target.name}: no latency of the dense {found[0][index].name} there")
        for place, sites in enumerate(found):
            options = tuple(option for option in sites[index].options if option.label in kept)
            found[place] = (*sites[:index], replace(sites[index], options=options), *sites[index + 1 :])
    return found


def _kept(costs: Sequence[Sequence[Option]], small: bool) -> set[str]:
    """The labels worth having in some workload; where bytes are limited (`small`), all that every workload has."""
    common = set.intersection(*({option.label for option in options} for options in costs))
    able = [[option for option in options if option.label in common] for options in costs]
    return common if small else {option.label for options in able for option in worth_having(options)}


def _options(session: Session, table: LatencyTable, name: str, workload: Workload) -> list[Option]:
    site = session.loaded.structure.site(name)
    options = []
    for choice in session.space.choices[name]:
        cells = site_cells(site, choice.format, workload.tokens_in_flight, session.experts_per_token)
        if not all(table.has(key) for key, _ in cells):
            continue
        best = [(table.best(key), count) for key, count in cells]
        options.append(
            Option(
                label=choice.decision.label,
                format=choice.format.name,
                bits_per_weight=choice.bits_per_weight,
                size_bytes=choice.size_bytes,
                ms=sum(timing.median_ms * count for (_, timing), count in best),
                kernel=best[0][0][0],
            )
        )
    return options


def worth_having(options: Sequence[Option]) -> list[Option]:
    """Options that are faster than every one with at least their weight and activation bits: the others cannot be the better choice.

    Dropped before anything is calibrated. The dense option stays.
    """
    formats = {option.label: parse_format(option.format) for option in options}

    def beaten(option: Option) -> bool:
        mine = formats[option.label]
        return any(
            other.ms <= option.ms
            and other.bits_per_weight > option.bits_per_weight
            and formats[other.label].act_bits >= mine.act_bits
            for other in options
        )

    return [option for option in options if option.label == DENSE.label or not beaten(option)]


def whole_model(session: Session, table: LatencyTable, sites: Sequence[SiteOptions], workload: Workload) -> Fit:
    """The map of a workload: fitted on whole-model runs, or of a target that is not here, put together from what is known."""
    return (fit_map if session.target.present else assume_map)(session, table, sites, workload)


def fit_map(session: Session, table: LatencyTable, sites: Sequence[SiteOptions], workload: Workload) -> Fit:
    """Whole-model runs of a few policies, each interleaved with the dense model, and the map fitted on them."""
    target, cache = session.target, session.config.cache_folder
    policies = map_policies(sites, session.config.seed)
    engine = session.engine(table, workload)
    candidates = dense_candidates(session.model, session.loaded.structure, target, table, workload)
    with session.progress.bar("dense model") as update:
        found = end_to_end.measure(
            candidates, workload, target, rounds=6, cache=cache, notify=session.progress.say, progress=update
        )
    dense_name = min(found, key=lambda name: found[name].median_ms)
    dense = candidates[dense_name]
    del candidates
    dense_runs, policy_runs = [], []
    with session.progress.bar("whole-model runs") as update:
        for index, (_, policy) in enumerate(policies):
            model = engine.materialize(session.rounded_edits(policy))
            options = {"rounds": MAP_ROUNDS, "cache": cache, "notify": session.progress.say}
            reference, run = end_to_end.compare(dense, model, workload, target, **options)
            dense_runs.append(reference)
            policy_runs.append(run)
            update(index + 1, len(policies))
    level = float(np.median([run.median_ms for run in dense_runs]))
    lo, hi = float(np.median([run.lo_ms for run in dense_runs])), float(np.median([run.hi_ms for run in dense_runs]))
    dense_ms = (level, min(lo, level), max(hi, level))
    runs = [_run(sites, Policy(), dense_ms)]
    ratios = [run.ratio_to(reference) for run, reference in zip(policy_runs, dense_runs, strict=True)]
    runs += [
        _run(sites, policy, (ratio.mid * level, ratio.lo * level, ratio.hi * level))
        for (_, policy), ratio in zip(policies, ratios, strict=True)
    ]
    disturbance = end_to_end.disturbance([*dense_runs, *policy_runs])
    session.progress.say(disturbance)
    try:
        fitted, scales = fit_latency(runs).collapsed()
    except ValueError as error:
        session.progress.say(f"{error}; kernel times are taken as they are instead")
        fitted, scales = unit_slope(runs), {}
    session.progress.say(
        f"dense model: {level:.1f} {workload.unit} ({dense_name}); whole-model map from {len(runs)} runs, "
        f"leave-one-out error {fitted.loo_error.mean:.1%} mean, {fitted.loo_error.max:.1%} worst"
    )
    checked = difference(session, table, sites, workload, dense, fitted, scales)
    if checked is not None:
        session.progress.say(checked.words)
    waits = sorted(sample.wall * 1e3 / run.median_ms for run in dense_runs for sample in run.samples.all)
    return {
        "map": fitted.to_dict(),
        "scales": scales,
        "dense_ms": list(dense_ms),
        "dense_name": dense_name,
        "tail": max(1.0, quantile(waits, 0.95)),
        "disturbance": disturbance,
        "label": "measured",
        "blocks": None if checked is None else asdict(checked),
    }


def _run(sites: Sequence[SiteOptions], policy: Policy, ms: tuple[float, float, float]) -> Run:
    options = {(site.name, option.label): option for site in sites for option in site.options}
    taken = [options[site.name, policy.at(site.name)[0].label] for site in sites]
    parts = {kernel: sum(o.ms for o in taken if o.kernel == kernel) for kernel in {o.kernel for o in options.values()}}
    return Run(policy.key(), sum(o.ms for o in taken), *ms, features=parts)


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
