"""The catalogue: every method by name. Imports no torch until something is applied."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from methods.method import Edit, Need, Plan, SiteView
from methods.model.structure import Site
from methods.policy import Decision
from methods.recipes.activation import (
    DISASSEMBLY,
    FPTQ_STATIC,
    LLM_FP4,
    OUTLIER_SUPPRESSION,
    PEG,
    QLLM,
    RPTQ,
    SMOOTHQUANT_STATIC,
    STATIC,
    ZEROQUANT,
    ZEROQUANT_FP,
)
from methods.recipes.awq import AWQ
from methods.recipes.cache import KV_CACHE
from methods.recipes.combined import AWQ_GPTQ, SMOOTH_GPTQ
from methods.recipes.compensation import LORC, LORC_GPTQ, LQER, QERA, QERA_GPTQ, REX
from methods.recipes.dense import NONE
from methods.recipes.formats import BCQ, FOUR_SIX, IMATRIX, LUT_GEMM, VS_QUANT
from methods.recipes.gptq import GPTQ
from methods.recipes.hqq import HQQ
from methods.recipes.learned import ADAROUND, ADAROUND_BLOCK, FLEXROUND, OMNIQUANT, SIGNROUND, ZEROQUANT_LKD
from methods.recipes.model_method import ModelMethod
from methods.recipes.partition import GOBO, LLM_INT8, OLIVE, OWQ, SPQR, SQUEEZELLM
from methods.recipes.recipe import Recipe
from methods.recipes.recipe import lifts as may_lift
from methods.recipes.rotation import BLOCK_HADAMARD, QUAROT, QUIP, SPINQUANT
from methods.recipes.rounding import GPTAQ, GPTQ_GREEDY, GREEDY, LDLQ, OBQ, OUTPUT_CLIP, PERCENTILE, STOCHASTIC
from methods.recipes.rtn import RTN
from methods.recipes.scaling import FPTQ, OUTLIER_SUPPRESSION_PLUS
from methods.recipes.smoothquant import SMOOTHQUANT

if TYPE_CHECKING:
    from methods.method import Stats

REVISION = 3
"""Counts what a decision's name has meant: edits of another revision are not those that `apply` gives today.

2: what first tokens share counts more where keys and values are computed (knob `first`). 3: so it does for awq and output-clip.
"""

METHODS: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(NONE, RTN, PERCENTILE, OUTPUT_CLIP, STOCHASTIC),
        *(GPTQ, GPTAQ, LDLQ, OBQ, GREEDY, GPTQ_GREEDY),
        *(AWQ, HQQ, SMOOTHQUANT, OUTLIER_SUPPRESSION_PLUS, FPTQ, AWQ_GPTQ, SMOOTH_GPTQ),
        *(
            ZEROQUANT,
            ZEROQUANT_FP,
            LLM_FP4,
            STATIC,
            SMOOTHQUANT_STATIC,
            FPTQ_STATIC,
            OUTLIER_SUPPRESSION,
            RPTQ,
            PEG,
            DISASSEMBLY,
            QLLM,
        ),
        *(BLOCK_HADAMARD, QUIP),
        *(ADAROUND, ADAROUND_BLOCK, FLEXROUND, SIGNROUND, OMNIQUANT, ZEROQUANT_LKD),
        *(LLM_INT8, OWQ, SPQR, SQUEEZELLM, GOBO, OLIVE),
        *(VS_QUANT, BCQ, LUT_GEMM, FOUR_SIX, IMATRIX),
        *(LORC, LORC_GPTQ, LQER, QERA, QERA_GPTQ, REX),
    )
}
"""All methods, in the order in which they are listed."""

MODEL_METHODS: Mapping[str, ModelMethod] = {method.name: method for method in (QUAROT, SPINQUANT, KV_CACHE)}
"""What can be decided for a model as a whole (`Policy.model`)."""


def method(name: str) -> Recipe:
    """The method of a name; raises ValueError with the nearest names there are."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"no method {name!r}{hint} (`search methods` lists all {len(METHODS)})")


def model_method(name: str) -> ModelMethod:
    """The method of a whole model; raises ValueError with the names there are."""
    if name in MODEL_METHODS:
        return MODEL_METHODS[name]
    where = "is decided at sites" if name in METHODS else "does not exist"
    raise ValueError(f"no method {name!r} for a model as a whole (it {where}); there are {', '.join(MODEL_METHODS)}")


def refuses(site: Site, decision: Decision) -> str | None:
    """Why the decision cannot stand at the site, or None; raises ValueError for an unknown method, knob, value or format."""
    return method(decision.method).refuses(site, dict(decision.knobs))


def plan(site: Site, decision: Decision, dtype: str = "bf16") -> Plan:
    """Format and cost of a decision; `dtype` is the checkpoint's, which `none` keeps. Raises ValueError where the site refuses it."""
    return method(decision.method).plan(site, dict(decision.knobs), dtype)


def format_of(decision: Decision) -> str | None:
    """The name of a decision's format, its method's own where it names none; None where there is neither."""
    named = decision.knob("format")
    own = METHODS[decision.method].format if decision.method in METHODS else ""
    return own or None if named is None else str(named)


def lifts(site: Site, decision: Decision) -> bool:
    """Whether the decision may leave a scale to the rows that feed the site, whose format must then take it (`Format.lifts`)."""
    return may_lift(site, method(decision.method).resolve(dict(decision.knobs)))


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


def apply_block(
    views: Sequence[SiteView], stats: Mapping[str, Stats], decisions: Mapping[str, Decision], made: Mapping[str, Edit]
) -> dict[str, Edit]:
    """What decisions do to sites of one block that are compressed together, by site; `apply` of each where none learns from the block.

    Sites whose method learns from the block's output see the others compressed, those in `made` and those without learning; sites of one
    method whose knobs are the same but for the format are learned together, one such group after the other.
    """
    edits: dict[str, Edit] = {}
    groups: dict[tuple[object, ...], list[SiteView]] = {}
    for view in views:
        decision = decisions[view.site.name]
        recipe = method(decision.method)
        if Need.BLOCK not in recipe.needs:
            edits[view.site.name] = apply(view, stats, decision)
            continue
        knobs = recipe.resolve(dict(decision.knobs))
        key = (recipe.name, *sorted((name, value) for name, value in knobs.items() if name != "format"))
        groups.setdefault(key, []).append(view)
    for group in groups.values():
        from methods.quant.runner import run_block

        names = [view.site.name for view in group]
        many = [dict(decisions[name].knobs) for name in names]
        together = run_block(method(decisions[names[0]].method), group, stats, many, {**made, **edits})
        edits.update(zip(names, together, strict=True))
    return edits
