"""Learned rounding: what a learner says about one layer, and how the layers of a site, or of a block, are learned together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import Compressed
from methods.learn import Parameters, Training, learn, linear, through
from methods.method import BlockSample, Edit, SiteView, Stats
from methods.quant import first
from methods.quant.feedback import auto_damping
from methods.quant.fold import fold
from methods.quant.grid import Grid, grouped, payload, range_grid
from methods.quant.task import Knobs, Task

N_EVALUATED = 16
"""At most this many of a block's batches decide which parameters are kept."""


@dataclass(frozen=True)
class Place:
    """Where weights stand on their grid, in steps from its origin and before rounding: position (d_out, n_groups, group)."""

    position: Tensor
    grid: Grid


class Trainable(Protocol):
    """One layer's rounding as a function of parameters. At the initial ones it rounds as the recipe does without learning."""

    @property
    def soft(self) -> bool:
        """Whether it trains without rounding, because its penalty drives it to codes."""
        ...

    def initial(self) -> Parameters:
        """The parameters to start from."""
        ...

    def place(self, parameters: Parameters, weight: Tensor) -> Place:
        """The place of a weight (d_out, d_in), differentiable in the parameters and in the weight."""
        ...

    def penalty(self, parameters: Parameters, done: float) -> Tensor | None:
        """What is added to the loss, which is 1 at the initial rounding; the mean over weights, or None."""
        ...


@dataclass(frozen=True)
class Learner:
    """How a learner trains.

    training: its rates and bounds are by the parameter names of the trainable. scope: what output is kept: that of the layer alone, or
    that of the block. scale: (d_in,) > 0, initial, of what is learned along and folded into the site's norm; None for nothing.
    """

    trainable: Callable[[Task, Grid], Trainable]
    training: Callable[[Knobs], Training]
    scope: Literal["layer", "block"] = "block"
    scale: Callable[[SiteView, Mapping[str, Stats], Knobs], Tensor | None] | None = None


@dataclass(frozen=True)
class LearnedSite:
    """A site in training; tasks and trainables by layer name; tensors: what a transform made of the norm.

    scale: (d_in,) > 0, by which inputs are divided at first, through the norm; None where none is learned.
    """

    view: SiteView
    tasks: Mapping[str, Task]
    trainables: Mapping[str, Trainable]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None

    def initial(self) -> dict[str, Tensor]:
        """The parameters of all layers, named `layer/parameter`, and the logarithm of the scale as `site/scale`."""
        found = {f"{layer}/{name}": value for layer, own in self.trainables.items() for name, value in own.initial().items()}
        return found if self.scale is None else {**found, self._scale_name: self.scale.log()}

    def folded(self, parameters: Parameters) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The ratio (d_in,) by which columns are multiplied, and the norm's parameters, as they will be stored."""
        if self.scale is None:
            return None, dict(self.tensors)
        norm, scale = self.view.fold_into, parameters[self._scale_name].exp()
        stored = fold(norm, scale.detach())
        exact = {f"{norm.name}.weight": (norm.weight.float() + norm.unit_offset) / scale - norm.unit_offset}
        if norm.bias is not None:
            exact[f"{norm.name}.bias"] = norm.bias.float() / scale
        tensors = {name: through(value, stored.tensors[name].float()) for name, value in exact.items()}
        return through(scale, stored.ratio), tensors

    def places(self, parameters: Parameters) -> dict[str, Place]:
        """By layer."""
        ratio, _ = self.folded(parameters)
        return {
            layer: own.place(_own(parameters, layer), self.tasks[layer].weight * (1.0 if ratio is None else ratio))
            for layer, own in self.trainables.items()
        }

    def weights(self, parameters: Parameters, *, rounded: bool) -> dict[str, Tensor]:
        """(d_out, d_in) by layer; what the payload decodes to, bit for bit, where rounded."""
        return {
            layer: values(place, self.tasks[layer].fmt, rounded=rounded or not self.trainables[layer].soft)
            for layer, place in self.places(parameters).items()
        }

    def penalty(self, parameters: Parameters, done: float) -> Tensor | float:
        """The sum over layers, each weighted by its number of weights."""
        found = {layer: own.penalty(_own(parameters, layer), done) for layer, own in self.trainables.items()}
        return sum((value * self.tasks[layer].weight.numel() for layer, value in found.items() if value is not None), 0.0)

    @torch.no_grad()
    def edit(self, parameters: Parameters) -> Edit:
        """What is stored."""
        stored = self.tensors if self.scale is None else fold(self.view.fold_into, parameters[self._scale_name].exp()).tensors
        linears: dict[str, Compressed] = {}
        for layer, place in self.places(parameters).items():
            fmt = self.tasks[layer].fmt
            linears[layer] = Compressed.of(fmt, payload(codes(place, fmt), place.grid))
        return Edit({layer: linears[layer] for layer in self.view.weights}, stored)

    @property
    def _scale_name(self) -> str:
        return f"{self.view.site.name}/scale"


def adam(knobs: Knobs) -> Training:
    """Adam with one rate for all parameters that falls to zero in a line; the batch is one where there is nothing to draw from."""
    return Training(
        int(knobs["steps"]),
        float(knobs["rate"]),
        schedule=linear,
        batch=int(knobs.get("batch", 1)),
        seed=int(knobs.get("seed", 0)),
        keep_best=True,
    )


def values(place: Place, fmt: Format, *, rounded: bool) -> Tensor:
    """The weight (d_out, d_in) at a place, with the arithmetic of `decode`; rounding passes gradients straight through."""
    position, scale = place.position, place.grid.scale.float()[..., None]
    steps = through(position, position.detach().round()) if rounded else position
    lowest, highest = _range(fmt)
    dense = steps.clamp(lowest, highest) * scale
    dense = dense if place.grid.offset is None else dense + place.grid.offset.float()[..., None]
    return dense.flatten(1)


def codes(place: Place, fmt: Format) -> Tensor:
    """The codes (d_out, d_in) uint8 at a place."""
    shift = fmt.levels // 2 if fmt.symmetric else 0
    return (place.position.round().clamp(*_range(fmt)) + shift).to(torch.uint8).flatten(1)


def position(weight: Tensor, fmt: Format, grid: Grid) -> Tensor:
    """(d_out, n_groups, group): steps of a weight (d_out, d_in) from the origin of its grid, with the arithmetic of `encode`."""
    groups = grouped(weight, fmt)
    offset = 0.0 if grid.offset is None else grid.offset.float()[..., None]
    return (groups - offset) / grid.scale.float()[..., None]


def clipped_grid(weight: Tensor, fmt: Format, low: Tensor, high: Tensor) -> Grid:
    """The grid that spans `low` and `high` (d_out, n_groups) times the least and largest weight of each group; differentiable.

    Scales and offsets are as stored; their rounding passes gradients straight through, for so does a cast.
    """
    least, most = grouped(weight, fmt).aminmax(dim=-1)
    return range_grid(least * low, most * high, fmt)


def learn_layers(site: LearnedSite, learner: Learner, knobs: Knobs) -> Edit:
    """Each layer of a site on its own: the least `trace(E H E^T)` of its error E, the output's mean squared error over all tokens.

    H is damped as `feedback` damps it, so that few tokens do not decide on inputs that they hardly tell apart.
    """
    linears: dict[str, Compressed] = {}
    for name, task in site.tasks.items():
        moment = first.hessian(task)
        floor = auto_damping(task.stats.n_tokens, len(moment)) * first.others(task) * moment.diagonal().mean()
        damped = moment + floor * torch.eye(len(moment))

        def loss(weights: Mapping[str, Tensor], _tensors: object, _item: int, task: Task = task, h: Tensor = damped) -> Tensor:
            error = weights[task.name] - task.weight
            return (error @ h * error).mean()

        alone = replace(site, tasks={name: task}, trainables={name: site.trainables[name]})
        alone = replace(alone, view=replace(site.view, weights={name: site.view.weights[name]}))
        linears.update(_train([alone], learner, knobs, loss, 1)[0].linears)
    return Edit(linears, site.tensors)


def learn_block(
    sites: Sequence[LearnedSite], learner: Learner, knobs: Knobs, block: BlockSample, beside: Mapping[str, Edit]
) -> list[Edit]:
    """Several sites of a block together: the least mean squared error of the block's output.

    beside: edits of other sites, which stand as they are; sites that are neither learned nor beside are as in the model.
    """
    fixed = {name: c.dense for edit in beside.values() for name, c in edit.linears.items()}
    fixed.update({name: tensor.float() for edit in beside.values() for name, tensor in edit.tensors.items()})
    formats = {name: c.format for edit in beside.values() for name, c in edit.linears.items()}
    formats.update({name: task.fmt for site in sites for name, task in site.tasks.items()})

    def loss(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], item: int) -> Tensor:
        output = block.run(block.inputs[item], {**fixed, **weights, **tensors}, formats)
        return (output - block.targets[item]).square().mean()

    return _train(sites, learner, knobs, loss, len(block.inputs))


ItemLoss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], Tensor]
"""(weights by layer, other parameters by full name, item) -> scalar."""


def _train(sites: Sequence[LearnedSite], learner: Learner, knobs: Knobs, item_loss: ItemLoss, n_items: int) -> list[Edit]:
    """The loss is relative to that of the initial rounding; a site whose rounding makes no error stays as it is."""
    initial = {name: value for site in sites for name, value in site.initial().items()}
    n_weights = sum(task.weight.numel() for site in sites for task in site.tasks.values())
    held = range(0, n_items, -(-n_items // N_EVALUATED))

    def error(parameters: Parameters, items: Sequence[int], *, rounded: bool) -> Tensor:
        weights = {name: w for site in sites for name, w in site.weights(parameters, rounded=rounded).items()}
        tensors = {name: t for site in sites for name, t in site.folded(parameters)[1].items()}
        return torch.stack([item_loss(weights, tensors, item) for item in items]).mean()

    training = _by_layer(learner.training(knobs), initial)
    with torch.no_grad():
        unit = float(error(initial, held, rounded=True)) if training.steps else 0.0
    if not unit:
        return [site.edit(initial) for site in sites]

    def loss(parameters: Parameters, drawn: Tensor, done: float) -> Tensor:
        penalty = sum(site.penalty(parameters, done) for site in sites) / n_weights
        return error(parameters, drawn.tolist(), rounded=False) / unit + penalty

    def evaluate(parameters: Parameters) -> float:
        return float(error(parameters, held, rounded=True)) / unit

    learned = learn(initial, loss, n_items, training, evaluate=evaluate)
    return [site.edit(learned.parameters) for site in sites]


def _by_layer(training: Training, initial: Parameters) -> Training:
    """Rates and bounds by full parameter names, those of the trainable's parameters spread over all layers."""
    own = {name: name.rpartition("/")[2] for name in initial}
    rates = training.rate
    rate = {name: rates[short] for name, short in own.items()} if isinstance(rates, Mapping) else rates
    bounds = {name: training.bounds[short] for name, short in own.items() if short in training.bounds}
    return replace(training, rate=rate, bounds=bounds, every=max(1, training.steps // 10))


def _own(parameters: Parameters, layer: str) -> dict[str, Tensor]:
    prefix = f"{layer}/"
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _range(fmt: Format) -> tuple[int, int]:
    """The least and largest number of steps from the origin."""
    shift = fmt.levels // 2 if fmt.symmetric else 0
    lowest, highest = fmt.code_range
    return lowest - shift, highest - shift
