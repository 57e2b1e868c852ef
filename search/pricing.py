"""What every choice costs: kernel cells by site and workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from methods.formats.format import parse_format
from methods.policy import DENSE
from predictors import absent
from profilers.cells import site_cells
from profilers.label import Label, weakest
from profilers.sweep import measure
from profilers.table import KernelKey, LatencyTable
from profilers.workload import Workload
from search.config import ConfigError
from search.prepared import Option, SiteOptions
from search.session import Session
from search.whole_model import Fit, assume_map


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
    """How trustworthy latencies are that come of this table and these maps.

    Of a target that is not here, `interpolated` at best; of this machine, where its maps are of kernel sums alone.

    Raises ConfigError where they would be modelled and nobody allowed it.
    """
    if session.target.present:
        return weakest([fit["label"] for fit in fits])
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
    """Sites with priced options, once for each workload; an option whose kernels failed their checks in one is left out of all.

    Where no bytes are limited, only options that are worth their time in some workload.
    """
    found = [
        tuple(
            SiteOptions(site.name, site.kind, site.block, site.n_weights, tuple(_options(session, table, site.name, workload)))
            for site in session.loaded.structure.sites
        )
        for workload in session.config.workloads
    ]
    for index in range(len(found[0])):
        for place, options in enumerate(_judged([sites[index].options for sites in found])):
            if all(option.label != DENSE.label for option in options):
                raise ConfigError(
                    f"no latency of the dense {found[0][index].name} on {session.target.name}; it is the measure of all"
                )
            sites = found[place]
            found[place] = (*sites[:index], replace(sites[index], options=options), *sites[index + 1 :])
    if session.config.objectives.sizes:
        return found
    return [tuple(site.fast for site in sites) for sites in found]


def _judged(costs: Sequence[Sequence[Option]]) -> list[tuple[Option, ...]]:
    """By workload, the options that every workload has; `fast` are those that are worth having in some."""
    common = set.intersection(*({option.label for option in options} for options in costs))
    able = [[option for option in options if option.label in common] for options in costs]
    fast = {option.label for options in able for option in worth_having(options)}
    return [tuple(replace(option, fast=option.label in fast) for option in options) for options in able]


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
    """Options that are faster than every one with at least their weight and activation bits: the others' time does not speak for them.

    Of options with as many bits the dense one alone beats another, which is its weights rounded to another dtype.
    Unless bytes are limited, those are dropped before anything is calibrated. The dense option stays.
    """
    formats = {option.label: parse_format(option.format) for option in options}

    def beaten(option: Option) -> bool:
        mine = formats[option.label]
        return any(
            other.ms <= option.ms
            and (other.bits_per_weight, other.label == DENSE.label) > (option.bits_per_weight, False)
            and formats[other.label].act_bits >= mine.act_bits
            for other in options
        )

    return [option for option in options if option.label == DENSE.label or not beaten(option)]
