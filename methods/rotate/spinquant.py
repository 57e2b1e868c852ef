"""Learns the rotations of a model whose weights and inputs are rounded: `spinquant`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods import catalogue
from methods.formats.format import Format, parse_format
from methods.formats.numerics import quantize_activation
from methods.learn import Training, learn, linear
from methods.method import SiteView
from methods.model.structure import Structure
from methods.policy import Decision
from methods.rotate.cayley import CayleySGD
from methods.rotate.rotation import Rotations, fused, rotated
from methods.rotate.wiring import Wiring

_EVALUATED = 4
"""Sequences on which the rotations of several steps are compared."""


@dataclass(frozen=True)
class Spin:
    """How to learn; format: what weights are rounded to and how inputs are; rate: of Cayley SGD, falling to zero in a line."""

    format: str
    steps: int
    rate: float
    batch: int
    seed: int


def spin(
    model: Any,
    structure: Structure,
    wiring: Wiring,
    start: Rotations,
    batches: Sequence[Tensor],
    settings: Spin,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Rotations:
    """Rotations that make the rounded model's cross-entropy small, from `start`, and never worse than it on the first few sequences.

    batches: token ids (b, t); the model is not modified, and gradients pass rounding straight through. No steps return `start`.
    SpinQuant (Liu 2024), section 3.2: Cayley SGD on the task's loss, with the weights frozen. Raises ValueError without batches or
    where no site takes the format.
    """
    if not settings.steps:
        return start
    if not batches:
        raise ValueError("spinquant: no text to learn from; give token batches, or take steps=0, which is quarot")
    tokens = [row for batch in batches for row in batch]
    state = {name: tensor.float() for name, tensor in fused(model, structure, wiring).items()}
    with _RoundedModel(model, structure, wiring, state, parse_format(settings.format)) as rounded:

        def loss(parameters: Mapping[str, Tensor], items: Tensor, done: float) -> Tensor:
            return rounded.loss(_rotations(parameters), torch.stack([tokens[i] for i in items.tolist()]))

        def evaluate(parameters: Mapping[str, Tensor]) -> float:
            return float(rounded.loss(_rotations(parameters), torch.stack(tokens[:_EVALUATED])))

        training = Training(
            steps=settings.steps,
            rate=settings.rate,
            optimizer=CayleySGD,
            schedule=linear,
            batch=settings.batch,
            seed=settings.seed,
            keep_best=True,
            every=max(1, settings.steps // 4),
        )
        initial = {"residual": start.residual} | ({} if start.heads is None else {"heads": start.heads})
        return _rotations(learn(initial, loss, len(tokens), training, evaluate=evaluate, progress=progress).parameters)


def _rotations(parameters: Mapping[str, Tensor]) -> Rotations:
    return Rotations(parameters["residual"], parameters.get("heads"))


class _RoundedModel(contextlib.AbstractContextManager["_RoundedModel"]):
    """The model with rotated, rounded weights and rounded inputs, as a function of the rotations."""

    def __init__(
        self, model: nn.Module, structure: Structure, wiring: Wiring, state: Mapping[str, Tensor], fmt: Format
    ) -> None:
        self._model, self._structure, self._wiring, self._state, self._format = model, structure, wiring, state, fmt
        self._decision = Decision.of("rtn", format=fmt.name)
        reasons = {site.name: catalogue.refuses(site, self._decision) for site in structure.sites}
        self._sites = [site for site in structure.sites if not reasons[site.name]]
        if not self._sites:
            raise ValueError(f"spinquant: {next(iter(reasons.values()))}; choose another format")
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> _RoundedModel:
        if self._format.act_bits != 16:
            for site in self._sites:
                for layer in site.layers:
                    handle = self._model.get_submodule(layer.name).register_forward_pre_hook(self._round_input)
                    self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def loss(self, rotations: Rotations, ids: Tensor) -> Tensor:
        """Mean cross-entropy, nats per token, of ids (b, t)."""
        state = rotated(self._state, self._structure, self._wiring, rotations)
        state.update(self._rounded(state))
        out = functional_call(self._model, state, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False)
        logits: Tensor = out.logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def _rounded(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Rounded weights by full name; their gradients are those of the weights."""
        for site in self._sites:
            weights = {layer.name: state[f"{layer.name}.weight"] for layer in site.layers if f"{layer.name}.weight" in state}
            plain = {name: weight.detach() for name, weight in weights.items()}
            edit = catalogue.apply(SiteView(site, plain), {}, self._decision)
            for name, weight in weights.items():
                yield f"{name}.weight", weight + (edit.linears[name].dense - plain[name])

    def _round_input(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = arguments[0]
        return (x + (quantize_activation(x.detach(), self._format) - x.detach()), *arguments[1:])
