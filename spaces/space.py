"""The space: for every site of a model, the decisions that its runtime and its kernels can run. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from methods import catalogue
from methods.formats.format import Format, parse_format
from methods.model.structure import Site, Structure
from methods.policy import DENSE, Decision
from spaces.runtimes import Runtime

Refuses = Callable[[Format, Site], str | None]
"""Why a format cannot run at a site, or None."""

ROUNDED = Decision.of("rtn", format="bf16")
"""Dense weights in bf16 at a site of a model that is stored in another dtype."""

_GROUPS = (128, 64, 32, 16, -1)
_SIMULATED = "no latency of its own: "


@dataclass(frozen=True)
class Choice:
    """A decision at a site and what it stores: `bits_per_weight` with scales and offsets, `size_bytes` of the whole site."""

    decision: Decision
    format: Format
    bits_per_weight: float
    size_bytes: int


@dataclass(frozen=True)
class Space:
    """What can be decided: the choices of every site, the dense one first and the others as they were asked for.

    dropped: by site, the reason why a decision (or, by its name, a format) is no choice there; notes: what was changed to fit, in words.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    dropped: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()

    def choice(self, site: str, decision: Decision) -> Choice:
        """The choice of a decision at a site; raises KeyError with the reason or the alternatives where it is none."""
        for choice in self.choices[site]:
            if choice.decision == decision:
                return choice
        dropped = self.dropped.get(site, {})
        reason = dropped.get(decision.label) or dropped.get(str(decision.knob("format")))
        instead = reason or f"choices are {', '.join(choice.decision.label for choice in self.choices[site])}"
        raise KeyError(f"{site}: {decision.label} is not in the space: {instead}")

    @property
    def size_log10(self) -> float:
        """Decimal digits of the number of policies."""
        return sum(math.log10(len(choices)) for choices in self.choices.values())

    def describe(self) -> str:
        """A few lines for people: what can be chosen at how many sites, what was dropped and why."""
        n_choices = sum(len(choices) for choices in self.choices.values())
        lines = [f"{len(self.choices)} sites, {n_choices} choices, 10^{self.size_log10:.0f} policies"]
        sets: dict[tuple[str, ...], list[str]] = {}
        for site, choices in self.choices.items():
            sets.setdefault(tuple(choice.decision.label for choice in choices), []).append(site)
        lines += [f"  {_count(sites)}: {', '.join(labels)}" for labels, sites in sets.items()]
        reasons: dict[str, list[str]] = {}
        for site, dropped in self.dropped.items():
            for label, reason in dropped.items():
                reasons.setdefault(f"{label}: {reason}", []).append(site)
        lines += [f"  not at {_count(sites)}: {reason}" for reason, sites in reasons.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _count(sites: Sequence[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{len(sites)} sites like {sites[0]}"


def build(
    structure: Structure,
    formats: Sequence[str],
    methods: Sequence[str],
    runtime: Runtime,
    kernel_supports: Refuses,
    compute_dtype: str = "",
) -> Space:
    """The legal choices: every method with every format that divides the site and that the runtime and the kernels run.

    formats: names; dense ones add nothing, the dense choice is always there. compute_dtype: what the target multiplies dense weights in;
    where that is bf16 and the model is stored otherwise, weights rounded to it (`ROUNDED`) are a choice too: the model's own are
    multiplied in fp32. Not the other way round: fp16 does not reach as far as bf16. Where a group does not divide a site's inputs, the
    largest smaller one that does and that runs takes its place, or one scale a channel, and a note says so.
    What no kernel runs (`Plan.simulated`) has no latency and is dropped. Raises ValueError for an architecture or experts that the runtime
    does not get, for a method that is simulated wherever it is legal, and, with the commonest reason, where nothing can be compressed.
    """
    if runtime.architectures and structure.architecture not in runtime.architectures:
        raise ValueError(
            f"{structure.architecture} is not exported to {runtime.name}, only {', '.join(runtime.architectures)} are; use isolatency"
        )
    if not runtime.experts and any(site.kind.startswith("expert") for site in structure.sites):
        raise ValueError(
            f"{structure.architecture} has experts, and such models are not exported to {runtime.name}; use isolatency"
        )
    wanted = [fmt for fmt in (parse_format(name) for name in dict.fromkeys(formats)) if not fmt.dense or fmt.thinned]
    rounds = compute_dtype == "bf16" != structure.dtype and runtime.loads is None
    choices: dict[str, tuple[Choice, ...]] = {}
    dropped: dict[str, Mapping[str, str]] = {}
    replaced: dict[str, list[str]] = {}
    for site in structure.sites:
        fitting, reasons = _fitting(site, wanted, runtime, kernel_supports)
        for asked, fmt in fitting.items():
            if asked != fmt:
                replaced.setdefault(f"{asked.name} -> {fmt.name} where it does not divide {site.d_in} inputs", []).append(
                    site.name
                )
        found = _dense(site, structure, rounds and kernel_supports(parse_format("bf16"), site) is None)
        for decision in (with_format(m, fmt) for fmt in dict.fromkeys(fitting.values()) for m in methods):
            reason = catalogue.refuses(site, decision)
            simulated = reason is None and catalogue.plan(site, decision).simulated
            if reason or simulated:
                reasons[decision.label] = reason or f"{_SIMULATED}{simulated}"
            else:
                found.append(_choice(site, decision))
        choices[site.name] = tuple(found)
        if reasons:
            dropped[site.name] = MappingProxyType(reasons)
    _withdraw_lifts(structure, choices, dropped)
    notes = tuple(f"{text}: {_count(sites)}" for text, sites in replaced.items())
    space = Space(MappingProxyType(choices), MappingProxyType(dropped), notes)
    _check_priced(space, methods)
    if all(choice.decision in (DENSE, ROUNDED) for found in choices.values() for choice in found):
        raise ValueError(_nothing(space, formats, methods, runtime))
    return space


def _withdraw_lifts(
    structure: Structure, choices: dict[str, tuple[Choice, ...]], dropped: dict[str, Mapping[str, str]]
) -> None:
    """Takes out, in place, choices that leave a scale to rows whose format may not take it: sites are chosen apart."""
    site_of = {layer.name: site.name for site, layer in structure.layers()}
    for site in structure.sites:
        lifting = [choice for choice in choices[site.name] if catalogue.lifts(site, choice.decision)]
        if site.feed is None or not lifting:
            continue
        feeding = site_of[site.feed.layer]
        shared = next((choice.format.name for choice in choices[feeding] if not choice.format.lifts), "")
        if shared:
            choices[site.name] = tuple(choice for choice in choices[site.name] if choice not in lifting)
            reasons = {
                choice.decision.label: f"its scale goes to {feeding}, whose choice {shared} cannot take it"
                for choice in lifting
            }
            dropped[site.name] = MappingProxyType({**dropped.get(site.name, {}), **reasons})


def _check_priced(space: Space, methods: Sequence[str]) -> None:
    """Raises ValueError for a method, asked for by name, that nothing could ever choose because none of its choices has a latency."""
    chosen = {choice.decision.method for choices in space.choices.values() for choice in choices}
    reasons = [item for dropped in space.dropped.values() for item in dropped.items()]
    for method in methods:
        name = parsed_method(method).method
        own = [r for label, r in reasons if label.partition(":")[0] == name and r.startswith(_SIMULATED)]
        if own and name not in chosen:
            raise ValueError(
                f"{name} is simulated ({own[0].removeprefix(_SIMULATED)}), so it has no latency that an objective could meet; "
                "leave it out of --methods, `search materialize` applies it"
            )


def with_format(method: str, fmt: Format) -> Decision:
    """The decision of a method, written `NAME` or `NAME:KNOB=VALUE:KNOB=VALUE`, with a format."""
    decision = parsed_method(method)
    return Decision.of(decision.method, **{**dict(decision.knobs), "format": fmt.name})


def parsed_method(method: str) -> Decision:
    """The decision of a method, written `NAME` or `NAME:KNOB=VALUE:KNOB=VALUE`; raises ValueError on anything else."""
    return Decision.parse(method.replace(":", ",").replace(",", ":", 1))


def _fitting(
    site: Site, wanted: Sequence[Format], runtime: Runtime, kernels: Refuses
) -> tuple[dict[Format, Format], dict[str, str]]:
    """The format that stands for each wanted one at a site, and the reasons of those for which none does, by format name."""
    fitting: dict[Format, Format] = {}
    reasons: dict[str, str] = {}
    for asked in wanted:
        first = None
        for fmt in _candidates(asked, site.d_in):
            reason = runtime.supports(fmt, site) or kernels(fmt, site)
            if reason is None:
                fitting[asked] = fmt
                break
            first = first or (reason if fmt == asked else f"as {fmt.name}: {reason}")
        if asked not in fitting:
            reasons[asked.name] = first or "no group divides it"
    return fitting, reasons


def _candidates(asked: Format, d_in: int) -> list[Format]:
    # A format of another kind is what it is by its group, too.
    if asked.divides(d_in) or not asked.integer:
        return [asked]
    groups = [group for group in _GROUPS if group < asked.group and (group == -1 or d_in % group == 0)]
    return [replace(asked, group=group, act_group=-1 if asked.act_group == -1 else group) for group in groups]


def _dense(site: Site, structure: Structure, rounds: bool) -> list[Choice]:
    """The site as it is stored, and where it `rounds`, rounded to bf16."""
    fmt = parse_format(structure.dtype)
    stored = Choice(DENSE, fmt, float(fmt.bits), site.n_weights * fmt.bits // 8)
    return [stored, _choice(site, ROUNDED)] if rounds else [stored]


def _choice(site: Site, decision: Decision) -> Choice:
    plan = catalogue.plan(site, decision)
    bits = plan.cost.bits_per_weight
    return Choice(decision, plan.format, bits, math.ceil(bits * site.n_weights / 8))


def _nothing(space: Space, formats: Sequence[str], methods: Sequence[str], runtime: Runtime) -> str:
    reasons = [f"{label}: {reason}" for dropped in space.dropped.values() for label, reason in dropped.items()]
    if not reasons:
        asked = f"formats={list(formats)}, methods={list(methods)}"
        return f"nothing to choose: {asked} name no compression for any of {len(space.choices)} sites"
    usual = max(dict.fromkeys(reasons), key=reasons.count)
    return f"nothing can be compressed on runtime {runtime.name!r}: {usual} (at {reasons.count(usual)} of {len(space.choices)} sites)"
