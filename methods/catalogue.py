"""The catalogue: every method by name. Imports no torch until something is applied."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from methods.method import Edit, Need, Plan, SiteView
from methods.model.structure import Site
from methods.policy import Decision
from methods.recipes.awq import AWQ
from methods.recipes.combined import AWQ_GPTQ, SMOOTH_GPTQ
from methods.recipes.dense import NONE
from methods.recipes.gptq import GPTQ
from methods.recipes.hqq import HQQ
from methods.recipes.recipe import Recipe
from methods.recipes.rtn import RTN
from methods.recipes.smoothquant import SMOOTHQUANT

if TYPE_CHECKING:
    from methods.method import Stats

METHODS: Mapping[str, Recipe] = {
    recipe.name: recipe for recipe in (NONE, RTN, GPTQ, AWQ, HQQ, SMOOTHQUANT, AWQ_GPTQ, SMOOTH_GPTQ)
}
"""All methods, in the order in which they are listed."""


def method(name: str) -> Recipe:
    """The method of a name; raises ValueError with the names there are."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"no method {name!r}{hint}; there are {', '.join(METHODS)}")


def refuses(site: Site, decision: Decision) -> str | None:
    """Why the decision cannot stand at the site, or None; raises ValueError for an unknown method, knob, value or format."""
    return method(decision.method).refuses(site, dict(decision.knobs))


def plan(site: Site, decision: Decision, dtype: str = "bf16") -> Plan:
    """Format and cost of a decision; `dtype` is the checkpoint's, which `none` keeps. Raises ValueError where the site refuses it."""
    return method(decision.method).plan(site, dict(decision.knobs), dtype)


def needs(decisions: Iterable[Decision]) -> frozenset[Need]:
    """The statistics that any of the decisions reads."""
    return frozenset(need for decision in decisions for need in method(decision.method).needs)


def apply(view: SiteView, stats: Mapping[str, Stats], decision: Decision) -> Edit:
    """What a decision does to a site; `stats` by layer name, those of layers that share an input being one object."""
    return method(decision.method).apply(view, stats, dict(decision.knobs))


def apply_many(view: SiteView, stats: Mapping[str, Stats], decisions: Sequence[Decision]) -> list[Edit]:
    """What each of several decisions does to a site, equal to `apply` of each; decisions of one method share their work."""
    by_method: dict[str, list[int]] = {}
    for index, decision in enumerate(decisions):
        by_method.setdefault(decision.method, []).append(index)
    edits: dict[int, Edit] = {}
    for name, indices in by_method.items():
        settings = [dict(decisions[index].knobs) for index in indices]
        edits.update(zip(indices, method(name).apply_many(view, stats, settings), strict=True))
    return [edits[index] for index in range(len(decisions))]
