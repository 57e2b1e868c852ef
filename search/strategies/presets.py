"""The simple policies that people use: one format everywhere, the better of equally wide ones, wider ends, one kind wider.

They are what a search has to beat at the same latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from methods.formats.format import parse_format
from methods.formats.twins import float_twin, has_twin
from methods.policy import Decision, Policy
from search.strategies.problem import TOLERANCE, Problem

Family = Literal["uniform", "format", "mofq", "ends", "kind"]

Errors = Mapping[str, Mapping[str, float]]
"""By site and format, the squared error of the weights rounded to nearest, relative to their energy."""

_Width = tuple[float, float, float, bool]


@dataclass(frozen=True)
class Preset:
    """A simple policy with a readable name; `notes` says at which sites another format had to be taken, "" where at none."""

    name: str
    policy: Policy
    family: Family
    notes: str = ""


def uniform(problem: Problem) -> list[Preset]:
    """Every decision that some site has, at all sites; a site without it takes its nearest wider choice."""
    return [_uniform(problem, decision) for decision in _decisions(problem)]


def _decisions(problem: Problem) -> list[Decision]:
    return sorted({decision for choices in problem.choices for decision in choices}, key=lambda d: d.label)


def _uniform(problem: Problem, decision: Decision) -> Preset:
    return _preset(problem, f"uniform {decision.label}", "uniform", lambda _: decision)


def better_format(problem: Problem, decisions: Iterable[Decision]) -> list[Preset]:
    """Of decisions that are equally wide and of one method, such as integers and NormalFloat of 4 bits, each site's of least loss."""
    alike: dict[tuple[object, ...], list[Decision]] = {}
    for decision in decisions:
        alike.setdefault((decision.method, _width(decision)), []).append(decision)
    return [_best_of(problem, several) for several in alike.values() if len(several) > 1]


def mofq(problem: Problem, decisions: Iterable[Decision], errors: Errors) -> list[Preset]:
    """Integers or the minifloats of as many bits, at each site those in which its weights have the smaller error.

    Pairs are decisions that differ in their format alone, where the one's is the other's `float_twin`; integers where errors are equal or
    not known. MoFQ (Zhang 2023), the rule for inputs in 16 bits; the one for rounded inputs, by the error of the layer's output, is left
    out: `better_format` judges them by their effect on the whole model.
    """
    known, found = set(decisions), []
    for decision in sorted(known, key=lambda d: d.label):
        name = decision.knob("format")
        fmt = parse_format(name) if isinstance(name, str) else None
        if fmt is None or fmt.act_bits != 16 or not has_twin(fmt):
            continue
        twin = float_twin(fmt).name
        other = Decision.of(decision.method, **{**dict(decision.knobs), "format": twin})
        if other in known:
            found.append(_mofq(problem, decision, other, (fmt.name, twin), errors))
    return found


def _mofq(problem: Problem, whole: Decision, floats: Decision, names: tuple[str, str], errors: Errors) -> Preset:
    def chosen(site: str) -> Decision:
        own, other = (errors.get(site, {}).get(name, math.inf) for name in names)
        return floats if other < own else whole

    return _preset(problem, f"mofq of {whole.label} and {floats.label}", "mofq", chosen)


def _best_of(problem: Problem, decisions: list[Decision]) -> Preset:
    losses = {
        site: {d: float(loss) for d, loss in zip(choices, own, strict=True) if d in decisions}
        for site, choices, own in zip(problem.sites, problem.choices, problem.loss, strict=True)
    }
    name = f"at each site the better of {', '.join(d.label for d in decisions)}"
    return _preset(
        problem, name, "format", lambda site: min(losses[site], key=losses[site].__getitem__) if losses[site] else decisions[0]
    )


def ends(problem: Problem, block: Mapping[str, int], narrow: Decision, wide: Decision, n: int) -> Preset:
    """`wide` in the first `n` and the last `n` blocks, `narrow` between; block: by site, counted from 0."""
    last = max(block[site] for site in problem.sites)

    def chosen(site: str) -> Decision:
        return wide if block[site] < n or block[site] > last - n else narrow

    return _preset(problem, f"{narrow.label}, first and last {n} blocks {wide.label}", "ends", chosen)


def by_kind(problem: Problem, kind: Mapping[str, str], narrow: Decision, wide: Decision, wide_kind: str) -> Preset:
    """`wide` at all sites of one kind (`down`, …), `narrow` elsewhere; kind: by site."""
    name = f"{narrow.label}, {wide_kind} {wide.label}"
    return _preset(problem, name, "kind", lambda site: wide if kind[site] == wide_kind else narrow)


def within_budget(
    problem: Problem,
    block: Mapping[str, int],
    kind: Mapping[str, str],
    budget_ms: float,
    decisions: set[Decision] | None = None,
    errors: Errors | None = None,
) -> list[Preset]:
    """All simple policies of the five families that meet the budget and the limits, least additive loss first, no policy twice.

    `ends` keeps as many blocks wide as the budget allows. decisions: only these, where given; all that some site has
    otherwise. errors: for `mofq`, which needs them.
    """
    used = [d for d in _decisions(problem) if decisions is None or d in decisions]
    found = [_uniform(problem, decision) for decision in used]
    found += better_format(problem, used)
    found += mofq(problem, used, errors) if errors else []
    half = (max(block[site] for site in problem.sites) + 1) // 2
    for narrow in used:
        for wide in (d for d in used if _width(d) > _width(narrow)):
            found += [by_kind(problem, kind, narrow, wide, name) for name in sorted(set(kind.values()))]
            found += _most_blocks(problem, block, narrow, wide, half, budget_ms)
    unique = {preset.policy.key(): preset for preset in reversed(found)}
    scored = [(problem.totals(problem.indices(p.policy)), p) for p in unique.values()]
    fitting = [
        (totals[0], p.name, p)
        for totals, p in scored
        if totals[1] <= budget_ms * (1 + TOLERANCE) and problem.meets(problem.indices(p.policy))
    ]
    return [preset for _, _, preset in sorted(fitting, key=lambda item: item[:2])]


def _most_blocks(
    problem: Problem, block: Mapping[str, int], narrow: Decision, wide: Decision, half: int, budget_ms: float
) -> list[Preset]:
    """The `ends` preset with the most wide blocks that meets the budget, or none."""
    for n in range(half, 0, -1):
        preset = ends(problem, block, narrow, wide, n)
        indices = problem.indices(preset.policy)
        if problem.totals(indices)[1] <= budget_ms * (1 + TOLERANCE) and problem.meets(indices):
            return [preset]
    return []


def _preset(problem: Problem, name: str, family: Family, chosen: Callable[[str], Decision]) -> Preset:
    indices: list[int] = []
    instead: dict[str, int] = {}
    for site, choices in zip(problem.sites, problem.choices, strict=True):
        wanted = chosen(site)
        taken = wanted if wanted in choices else _nearest(choices, wanted)
        if taken != wanted:
            instead[taken.label] = instead.get(taken.label, 0) + 1
        indices.append(choices.index(taken))
    notes = "; ".join(f"{n} of {len(indices)} sites take {label}" for label, n in sorted(instead.items()))
    return Preset(name, problem.policy(indices), family, notes)


def _nearest(choices: tuple[Decision, ...], wanted: Decision) -> Decision:
    """The narrowest choice that is at least as wide as `wanted`, of the same method if there is one; else the widest."""
    target = _width(wanted)
    wider = [d for d in choices if _width(d) >= target]
    if not wider:
        return max(choices, key=_width)
    return min(wider, key=lambda d: (_width(d), d.method != wanted.method, d.label))


def _width(decision: Decision) -> _Width:
    """What orders formats by precision: bits, activation bits, scales a weight, offsets; what names no format is unquantized."""
    name = decision.knob("format")
    if not isinstance(name, str):
        return (float("inf"), 16.0, 0.0, False)
    form = parse_format(name)
    return (float(form.bits), float(form.act_bits), 0.0 if form.group == -1 else 1 / form.group, not form.symmetric)
