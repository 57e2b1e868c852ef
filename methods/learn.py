"""THE training loop: whatever is learned by gradients, at the scope of a layer, a block or the model, is learned here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
Loss = Callable[[Parameters, Tensor, float], Tensor]
"""(parameters, indices (batch,) int64 of the items drawn, part of the steps done, in [0, 1)) -> scalar to be made small."""
Groups = list[dict[str, Any]]


class SignSGD(torch.optim.Optimizer):
    """Steps of one size, `lr`, against the sign of the gradient (Bernstein 2018, algorithm 1 without momentum)."""

    def __init__(self, params: Groups, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, whose gradient goes straight to `x`; both of one shape and dtype."""
    result: Tensor = _Through.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def constant(done: float) -> float:
    """Schedule: the rate as it is."""
    return 1.0


def linear(done: float) -> float:
    """Schedule: falls to zero in a line."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Schedule: falls to zero along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Training:
    """How to train.

    rate: the learning rate, or one by parameter name; schedule: part of the steps done -> factor of the rate.
    optimizer: from groups of one parameter each, with `params`, `lr` and `name`. batch: items a step, at most all there are.
    clip: largest 2-norm of all gradients together; inf leaves them. bounds: by parameter name, what values are clamped to after a step.
    keep_best: the result is where the loss was least, instead of where the last step led. every: steps between evaluations.
    """

    steps: int
    rate: float | Mapping[str, float]
    optimizer: Callable[[Groups], torch.optim.Optimizer] = torch.optim.Adam
    schedule: Callable[[float], float] = constant
    batch: int = 1
    seed: int = 0
    clip: float = math.inf
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    keep_best: bool = False
    every: int = 10


@dataclass(frozen=True)
class Learned:
    """parameters: detached; step: after how many steps they stood so; losses: of each step's batch, before the step;
    evaluations: (steps done, loss of the evaluation), empty without one.
    """

    parameters: dict[str, Tensor]
    step: int
    losses: tuple[float, ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()


def learn(
    initial: Parameters,
    loss: Loss,
    n_items: int,
    training: Training,
    *,
    evaluate: Callable[[Parameters], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Learned:
    """Parameters that make the loss small, from `initial`, which is not modified; no steps return it as it is.

    n_items: how many items batches are drawn from, all of them once before any comes again, in an order made from the seed.
    evaluate: loss of parameters on a fixed set, taken before the first step, every `training.every` steps and after the last; with
    `keep_best` the least of these decides, and without it the least loss of a batch. progress: (steps done, steps).
    Nothing but the parameters is given gradients. Raises ValueError where a loss is infinite, NaN or independent of the parameters.
    """
    _check(initial, n_items, training)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in initial.items()}
    rates = training.rate if isinstance(training.rate, Mapping) else dict.fromkeys(initial, training.rate)
    optimizer = training.optimizer([{"params": [leaf], "lr": rates[name], "name": name} for name, leaf in leaves.items()])
    best, losses, evaluations = _Best(leaves), [], []

    def evaluated(step: int) -> None:
        if evaluate is not None:
            with torch.no_grad():
                evaluations.append((step, _finite(evaluate(leaves), step, training)))
            best.offer(leaves, step, evaluations[-1][1])

    draw = batches(n_items, training.batch, training.seed)
    for step in range(training.steps):
        if step % training.every == 0:
            evaluated(step)
        done = step / training.steps
        value = _gradients(leaves, loss, next(draw), done, training.clip)
        losses.append(_finite(value, step, training))
        if evaluate is None:
            best.offer(leaves, step, losses[-1])
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]] * training.schedule(done)
        optimizer.step()
        _clamp_(leaves, training.bounds)
        if progress is not None:
            progress(step + 1, training.steps)
    evaluated(training.steps)
    if not training.keep_best:
        best.take(leaves, training.steps)
    return Learned(best.parameters, best.step, tuple(losses), tuple(evaluations))


def batches(n_items: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices (min(batch, n_items),) without end: all items in a new random order each time round."""
    generator = torch.Generator().manual_seed(seed)
    size, waiting = min(batch, n_items), torch.empty(0, dtype=torch.int64)
    while True:
        if len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(n_items, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


class _Best:
    """A copy of the parameters at their least loss."""

    def __init__(self, parameters: Parameters) -> None:
        self._loss = math.inf
        self.take(parameters, 0)

    def take(self, parameters: Parameters, step: int) -> None:
        self.parameters = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        self.step = step

    def offer(self, parameters: Parameters, step: int, loss: float) -> None:
        if loss < self._loss:
            self._loss = loss
            self.take(parameters, step)


def _gradients(leaves: Mapping[str, Tensor], loss: Loss, drawn: Tensor, done: float, clip: float) -> float:
    """The loss of a batch; its gradients go to the leaves, and to nothing else that happens to require one."""
    with torch.enable_grad():
        value = loss(leaves, drawn, done)
    if not value.requires_grad:
        raise ValueError("learn: the loss does not depend on the parameters; nothing can be learned from it")
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for leaf, gradient in zip(leaves.values(), found, strict=True):
        leaf.grad = gradient
    if math.isfinite(clip):
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
    return float(value.detach())


@torch.no_grad()
def _clamp_(leaves: Mapping[str, Tensor], bounds: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in bounds.items():
        leaves[name].clamp_(low, high)


def _finite(loss: float, step: int, training: Training) -> float:
    if not math.isfinite(loss):
        raise ValueError(
            f"learn: the loss is {loss} after {step} of {training.steps} steps; use a rate below {training.rate}, or check the inputs"
        )
    return loss


def _check(initial: Parameters, n_items: int, training: Training) -> None:
    if training.steps < 0 or training.batch < 1 or training.every < 1 or n_items < 1:
        raise ValueError(
            f"learn: steps={training.steps}, batch={training.batch}, every={training.every}, n_items={n_items}; "
            "steps may be 0, the others are at least 1"
        )
    named: Sequence[tuple[str, Parameters | Mapping[str, object]]] = [("bounds", training.bounds)]
    if isinstance(training.rate, Mapping):
        named = [*named, ("rate", training.rate)]
        missing = sorted(set(initial) - set(training.rate))
        if missing:
            raise ValueError(f"learn: no rate for {missing[:3]}; give one for every parameter")
    for what, mapping in named:
        unknown = sorted(set(mapping) - set(initial))
        if unknown:
            raise ValueError(f"learn: {what} of {unknown[:3]}, which are no parameters; there are {sorted(initial)[:6]}")
