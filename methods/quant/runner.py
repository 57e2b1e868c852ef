"""Runs the parts of a recipe over a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from methods.formats.format import Format, parse_format
from methods.formats.numerics import DTYPES, Compressed
from methods.method import Edit, Need, SiteView, Stats
from methods.policy import Knob
from methods.quant.awq import awq
from methods.quant.feedback import auto_damping, feedback, stacked_rounder
from methods.quant.fold import Fold, fold, scaled_hessian
from methods.quant.grid import Grid, payload
from methods.quant.hqq import hqq
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest
from methods.quant.smooth import smooth
from methods.recipes.recipe import Recipe

Knobs = Mapping[str, Knob]


def run(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], knobs: Knobs) -> Edit:
    """The edit of a site: transform, fitter and rounder of the recipe, in this order.

    Layers that share one `Stats` object are rounded in one sweep: every part treats output rows apart, so that the result is the same.
    Raises ValueError where the recipe refuses the site, a weight is not finite or a statistic is missing.
    """
    return run_many(recipe, view, stats, [knobs])[0]


def run_many(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], many: Sequence[Knobs]) -> list[Edit]:
    """The edits of several settings of one recipe, equal to those of `run`; what they share is computed once.

    Settings that differ in their format alone go through one feedback sweep, one below the other, with one factorisation.
    """
    checked = [_checked(recipe, view, knobs) for knobs in many]
    together: dict[str, list[int]] = {}
    for index, knobs in enumerate(checked):
        alone = recipe.rounder != "feedback" or recipe.transform is not None or parse_format(str(knobs["format"])).dense
        others = sorted((name, value) for name, value in knobs.items() if name != "format")
        together.setdefault(f"{index if alone else ''}{others}", []).append(index)
    edits: dict[int, Edit] = {}
    for indices in together.values():
        edits.update(zip(indices, _run(recipe, view, stats, [checked[index] for index in indices]), strict=True))
    return [edits[index] for index in range(len(many))]


def _checked(recipe: Recipe, view: SiteView, knobs: Knobs) -> Knobs:
    reason = recipe.refuses(view.site, knobs)
    if reason:
        raise ValueError(reason)
    for name, weight in view.weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{recipe.name}: {name} has infinite or NaN weights; repair the checkpoint")
    return recipe.resolve(knobs)


def _run(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], many: Sequence[Knobs]) -> list[Edit]:
    """Edits of settings that differ in their format alone; one setting where the recipe has a transform."""
    knobs, formats = many[0], [parse_format(str(own["format"])) for own in many]
    if formats[0].dense:
        return [Edit({name: _cast(name, weight, formats[0]) for name, weight in view.weights.items()})]
    folded = _transform(recipe, view, stats, formats[0], knobs)
    linears: list[dict[str, Compressed]] = [{} for _ in many]
    for names in _sweeps(recipe, view, stats):
        weight = torch.cat([view.weights[name] for name in names]) * (1.0 if folded is None else folded.ratio)
        grids = [_FITTERS[str(knobs.get("fitter", recipe.fitter))](weight, fmt, knobs) for fmt in formats]
        if recipe.rounder == "feedback":
            hessian = _statistic(stats, names[0], Need.HESSIAN)
            hessian = hessian if folded is None else scaled_hessian(hessian, folded.ratio)
            damping = _damping(knobs, stats[names[0]].n_tokens, weight.shape[1])
            rounder = stacked_rounder(list(zip(formats, grids, strict=True)), weight.shape[1])
            codes = feedback(weight.repeat(len(formats), 1), hessian, rounder, damping, act_order=bool(knobs["act_order"]))
            payloads = [payload(own, grid) for own, grid in zip(codes.chunk(len(formats)), grids, strict=True)]
        else:
            payloads = [nearest(weight, fmt, grid) for fmt, grid in zip(formats, grids, strict=True)]
        rows = [len(view.weights[name]) for name in names]
        for fmt, parts, result in zip(formats, payloads, linears, strict=True):
            split = {part: torch.split(tensor, rows) for part, tensor in parts.items()}
            for index, name in enumerate(names):
                result[name] = Compressed.of(fmt, {part: tensors[index].clone() for part, tensors in split.items()})
    tensors = {} if folded is None else folded.tensors
    return [Edit({name: result[name] for name in view.weights}, tensors) for result in linears]


def _cast(name: str, weight: Tensor, fmt: Format) -> Compressed:
    stored = weight.to(DTYPES[fmt.dense])
    if not torch.isfinite(stored).all():
        raise ValueError(f"rtn: {name} has weights beyond the range of {fmt.dense}; use bf16")
    return Compressed.of(fmt, {"weight": stored})


_FITTERS: Mapping[str, Callable[[Tensor, Format, Knobs], Grid]] = {
    "minmax": lambda weight, fmt, knobs: minmax(weight, fmt),
    "mse": lambda weight, fmt, knobs: mse(weight, fmt),
    "hqq": lambda weight, fmt, knobs: hqq(weight, fmt, int(knobs["iterations"])),
}


def _sweeps(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats]) -> list[list[str]]:
    """The layers, those together that the rounder may take at once."""
    if recipe.rounder == "nearest":
        return [[name] for name in view.weights]
    together: dict[int, list[str]] = {}
    for name in view.weights:
        _statistic(stats, name, Need.HESSIAN)
        together.setdefault(id(stats[name]), []).append(name)
    return list(together.values())


def _transform(recipe: Recipe, view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Fold | None:
    """The recipe's transform of the site's input, folded into the norm; None where the recipe has none."""
    if recipe.transform is None:
        return None
    if view.norm is None:
        raise ValueError(f"{recipe.name}: the view of {view.site.name} lacks its norm {view.site.norm}")
    first = next(iter(view.weights))
    if recipe.transform == "smooth":
        return fold(view.norm, smooth(view.weights, _statistic(stats, first, Need.ABS_MAX), float(knobs["alpha"])))
    abs_mean, sample = _statistic(stats, first, Need.ABS_MEAN), _statistic(stats, first, Need.SAMPLE)
    return fold(view.norm, awq(view.weights, view.norm, abs_mean, sample, fmt))


def _damping(knobs: Knobs, n_tokens: int, d_in: int) -> float:
    return auto_damping(n_tokens, d_in) if knobs["damping"] == "auto" else float(knobs["damping"])


def _statistic(stats: Mapping[str, Stats], name: str, need: Need) -> Tensor:
    if name not in stats:
        raise ValueError(f"no calibration statistics for {name}; they are there for {sorted(stats)}")
    value: Tensor | None = getattr(stats[name], need.value)
    if value is None:
        raise ValueError(f"the calibration statistics of {name} lack {need.value}; collect what the method's `needs` declares")
    return value
