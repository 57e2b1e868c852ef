"""Runs the parts of a recipe over a site: transform, partition, fitter, rounder, compensator, in this order.

A learner takes the place of all that follows the fitter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from methods.formats.format import Format, parse_format
from methods.formats.numerics import DTYPES, Compressed
from methods.method import Edit, SiteView, Stats
from methods.quant.feedback import feedback, stacked_rounder
from methods.quant.first import hessian
from methods.quant.grid import Grid, payload
from methods.quant.learned import LearnedSite, learn_block, learn_layers
from methods.quant.parts import COMPENSATORS, FITTERS, LEARNERS, PARTITIONS, ROUNDERS, TRANSFORMS, side_of
from methods.quant.rounders import damping
from methods.quant.task import Change, Knobs, Task
from methods.recipes.recipe import Recipe


def run(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], knobs: Knobs) -> Edit:
    """The edit of a site.

    Layers that share one `Stats` object are compressed as one weight where the recipe stacks: its parts treat output rows apart, so that
    the result is the same. Raises ValueError where the recipe refuses the site, a weight is not finite or a statistic is missing.
    """
    return run_many(recipe, view, stats, [knobs])[0]


def run_many(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], many: Sequence[Knobs]) -> list[Edit]:
    """The edits of several settings of one recipe, equal to those of `run`; what they share is computed once.

    Settings that differ in their format alone go through one feedback sweep, one below the other, with one factorisation.
    """
    checked = [_checked(recipe, view, knobs) for knobs in many]
    plain = recipe.parts.keys() == {"fitter", "rounder"} and recipe.rounder == "feedback"
    together: dict[str, list[int]] = {}
    for index, knobs in enumerate(checked):
        alone = not plain or parse_format(str(knobs["format"])).dense
        others = sorted((name, value) for name, value in knobs.items() if name != "format")
        together.setdefault(f"{index if alone else ''}{others}", []).append(index)
    edits: dict[int, Edit] = {}
    for indices in together.values():
        edits.update(zip(indices, _run(recipe, view, stats, [checked[index] for index in indices]), strict=True))
    return [edits[index] for index in range(len(many))]


def run_block(
    recipe: Recipe, views: Sequence[SiteView], stats: Mapping[str, Stats], many: Sequence[Knobs], beside: Mapping[str, Edit]
) -> list[Edit]:
    """The edits of several sites of one block by a recipe that learns, their knobs equal but for the format.

    beside: edits of the block's other sites. A learner of the block's output learns all sites together, beside those; one of the
    layers' outputs each layer alone.
    """
    checked = [_checked(recipe, view, knobs) for view, knobs in zip(views, many, strict=True)]
    learner = LEARNERS[recipe.learner]
    sites: list[LearnedSite] = []
    declared: dict[str, Stats] = {}
    for view, knobs in zip(views, checked, strict=True):
        declared.update(_declared(recipe, view, stats))
        sites.append(_learned_site(recipe, view, declared, knobs))
    if learner.scope == "layer":
        return [learn_layers(site, learner, knobs) for site, knobs in zip(sites, checked, strict=True)]
    name = next(iter(views[0].weights))
    block = declared[name].block
    if block is None:
        raise ValueError(f"the calibration statistics of {name} lack block; collect what the method's `needs` declares")
    return learn_block(sites, learner, checked[0], block, beside)


def _learned_site(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], knobs: Knobs) -> LearnedSite:
    learner, fmt = LEARNERS[recipe.learner], parse_format(str(knobs["format"]))
    change = TRANSFORMS[recipe.transform](view, stats, fmt, knobs) if recipe.transform else Change()
    if recipe.partition or recipe.compensator or change.turns:
        raise ValueError(f"{recipe.name}: a learner has no place for a partition, a compensator or a rotation")
    tasks = {
        name: Task(name, view, change.weight(name, weight), change.stats(name, stats[name]), fmt, knobs)
        for name, weight in view.weights.items()
    }
    fitter = FITTERS[str(knobs.get("fitter", recipe.fitter))]
    trainables = {name: learner.trainable(task, fitter(task)) for name, task in tasks.items()}
    scale = learner.scale(view, stats, knobs) if learner.scale else None
    return LearnedSite(view, tasks, trainables, change.tensors, scale)


def _checked(recipe: Recipe, view: SiteView, knobs: Knobs) -> Knobs:
    reason = recipe.refuses(view.site, knobs)
    if reason:
        raise ValueError(reason)
    for name, weight in view.weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{recipe.name}: {name} has infinite or NaN weights; repair the checkpoint")
    return recipe.resolve(knobs)


def _run(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], many: Sequence[Knobs]) -> list[Edit]:
    """Edits of settings that differ in their format alone, which only feedback takes together."""
    if recipe.learner:
        return run_block(recipe, [view], stats, many, {})
    knobs, formats = many[0], [parse_format(str(own["format"])) for own in many]
    if recipe.needs:
        stats = _declared(recipe, view, stats)
    if formats[0].dense:
        return [Edit({name: _cast(name, weight, formats[0]) for name, weight in view.weights.items()})]
    change = TRANSFORMS[recipe.transform](view, stats, formats[0], knobs) if recipe.transform else Change()
    linears: list[dict[str, Compressed]] = [{} for _ in many]
    for names in _sweeps(recipe, view, stats, change, formats):
        first = names[0]
        weight = torch.cat([change.weight(name, view.weights[name]) for name in names])
        inputs = change.stats(first, stats[first]) if first in stats else Stats(0)
        tasks = [Task(first, view, weight, inputs, fmt, knobs) for fmt in formats]
        rows = [len(view.weights[name]) for name in names]
        for task, parts, result in zip(tasks, _payloads(recipe, tasks, change), linears, strict=True):
            split = [parts] if len(names) == 1 else _split(parts, rows)
            for name, own in zip(names, split, strict=True):
                result[name] = Compressed.of(task.fmt, own)
    return [Edit({name: result[name] for name in view.weights}, change.tensors) for result in linears]


def _payloads(recipe: Recipe, tasks: Sequence[Task], change: Change) -> list[Mapping[str, Tensor]]:
    fitter = FITTERS[str(tasks[0].knobs.get("fitter", recipe.fitter))]
    if len(tasks) > 1:
        grids = [fitter(task) for task in tasks]
        return [payload(codes, grid) for codes, grid in zip(_one_sweep(tasks, grids), grids, strict=True)]
    return [_payload(recipe, tasks[0], change)]


def _payload(recipe: Recipe, task: Task, change: Change) -> Mapping[str, Tensor]:
    fitter = FITTERS[str(task.knobs.get("fitter", recipe.fitter))]
    if recipe.partition:
        task = replace(task, kept=PARTITIONS[recipe.partition](task))
    grid = fitter(task)
    rounded = ROUNDERS[recipe.rounder](task, grid)
    parts = payload(rounded.codes, grid if rounded.grid is None else rounded.grid)
    kept = task.kept if rounded.kept is None else rounded.kept
    if kept is not None and bool(kept.any()):
        parts.update(side_of(kept, task.weight if rounded.values is None else rounded.values))
    if recipe.compensator:
        parts.update(COMPENSATORS[recipe.compensator](task, Compressed.of(task.fmt, parts).dense))
    if task.name in change.turns:
        # Layers may share a turn; each payload owns its parts, as files cannot hold one tensor twice.
        parts.update({part: tensor.clone() for part, tensor in change.turns[task.name].parts().items()})
    return parts


def _one_sweep(tasks: Sequence[Task], grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """The codes of one weight in several formats, from one feedback sweep over copies of it, one below the other."""
    task = tasks[0]
    rounder = stacked_rounder([(own.fmt, grid) for own, grid in zip(tasks, grids, strict=True)], task.weight.shape[1])
    stacked, order = task.weight.repeat(len(tasks), 1), bool(task.knobs["act_order"])
    return feedback(stacked, hessian(task), rounder, damping(task), act_order=order).codes.chunk(len(tasks))


def _split(parts: Mapping[str, Tensor], rows: list[int]) -> list[dict[str, Tensor]]:
    """The payload of every layer of a stack."""
    split = {part: torch.split(tensor, rows) for part, tensor in parts.items()}
    return [{part: tensors[index].clone() for part, tensors in split.items()} for index in range(len(rows))]


def _cast(name: str, weight: Tensor, fmt: Format) -> Compressed:
    stored = weight.to(DTYPES[fmt.dense])
    if not torch.isfinite(stored).all():
        raise ValueError(f"rtn: {name} has weights beyond the range of {fmt.dense}; use bf16")
    return Compressed.of(fmt, {"weight": stored})


def _declared(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats]) -> Mapping[str, Stats]:
    """The statistics that the recipe declares and no others, so that none is read by accident.

    Layers for which all of them are the same tensors share one object, whatever else is known of each.
    """
    kept: dict[tuple[int, ...], Stats] = {}
    result = {}
    for name in view.weights:
        if name not in stats:
            raise ValueError(f"no calibration statistics for {name}; they are there for {sorted(stats)}")
        own = stats[name]
        declared = {need.value: getattr(own, need.value) for need in recipe.needs}
        key = tuple(id(value) for value in declared.values())
        result[name] = kept.setdefault(key, Stats(own.n_tokens, **declared))
    return result


def _sweeps(
    recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], change: Change, formats: Sequence[Format]
) -> list[list[str]]:
    """The layers, those together that may be compressed as one weight."""
    if not recipe.needs:
        return [[name] for name in view.weights]
    by_rows = all(fmt.by_rows for fmt in formats)
    together: dict[int, list[str]] = {}
    for index, name in enumerate(view.weights):
        stacks = by_rows and recipe.stacks and recipe.rounder != "nearest" and name not in change.turns
        together.setdefault(id(stats[name]) if stacks else -1 - index, []).append(name)
    return list(together.values())
