"""Running a model block by block, with exactly the arguments that the model gives each of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.model.products import fast_linears
from methods.model.structure import Structure
from methods.model.trace import first_tensor


class _Stop(Exception):
    """The first block was reached: the rest of the forward pass is not needed."""


class BlockRunner:
    """Feeds batches through one block at a time.

    batches: token ids (b, t), all of one shape and without padding, so that the masks and positions which the model computes
    for the first of them, and which may differ from block to block, hold for all. Raises ValueError otherwise.
    """

    def __init__(self, model: Any, structure: Structure, batches: Sequence[Tensor]) -> None:
        shapes = {tuple(batch.shape) for batch in batches}
        if len(shapes) != 1:
            raise ValueError(f"block runner: batches of shapes {sorted(shapes)}; give at least one, all of one shape (b, t)")
        self._model = model
        self._batches = batches
        self._names = structure.blocks
        self._blocks: list[nn.Module] = [model.get_submodule(name) for name in structure.blocks]
        self._tuples = False
        self._arguments = self._capture(batches[0])

    def inputs(self) -> list[Tensor]:
        """What the first block reads, (b, t, d) for each batch."""
        return [self._embed(batch) for batch in self._batches]

    def run(self, block: int, hidden: Tensor) -> Tensor:
        """Hidden states (b, t, d) -> those after this block, with the weights and hooks that it has now.

        Builds a graph only where `hidden` requires a gradient.
        """
        return self.run_with(block, hidden, {})

    def run_with(self, block: int, hidden: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        """As `run`, with parameters replaced by full name, in their stored layout; a graph is built where any of them requires one."""
        args, kwargs = self._arguments[block]
        module, prefix = self._blocks[block], f"{self._names[block]}."
        foreign = sorted(name for name in replaced if not name.startswith(prefix))
        if foreign:
            raise ValueError(f"block runner: {foreign[:3]} are no parameters of {self._names[block]}")
        own = {name.removeprefix(prefix): tensor for name, tensor in replaced.items()}
        grad = hidden.requires_grad or any(tensor.requires_grad for tensor in replaced.values())
        with torch.set_grad_enabled(grad), fast_linears():
            output = functional_call(module, own, (hidden, *args), kwargs) if own else module(hidden, *args, **kwargs)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result

    def finish(self, hidden: Tensor) -> Tensor:
        """The last block's output (b, t, d) -> what the output projection reads: the final norm and whatever stands beside it.

        The base model runs with its blocks passing the hidden states on, the last one handing over `hidden`.
        """
        own = [vars(block).get("forward") for block in self._blocks]
        try:
            for block in self._blocks:
                block.forward = lambda *_args, **_kwargs: (hidden,) if self._tuples else hidden
            with torch.set_grad_enabled(hidden.requires_grad):
                out: Tensor = self._model.base_model(input_ids=self._batches[0], use_cache=False)[0]
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
        return out

    @torch.no_grad()
    def _capture(self, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        captured: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def hook(block: int) -> Any:
            def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                captured[block] = _without_hidden(args, kwargs)

            return keep

        def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._tuples = isinstance(output, tuple)

        handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(self._blocks)]
        handles.append(self._blocks[-1].register_forward_hook(note))
        try:
            self._model.base_model(input_ids=batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [captured[block] for block in range(len(self._blocks))]

    @torch.no_grad()
    def _embed(self, batch: Tensor) -> Tensor:
        found: list[Tensor | None] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(first_tensor(args, kwargs))
            raise _Stop

        handle = self._blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self._model.base_model(input_ids=batch, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        hidden = found[0]
        assert hidden is not None, "describe() has seen the block's input"
        return hidden


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments without the hidden states, which every decoder block of transformers takes first."""
    if args:
        return args[1:], dict(kwargs)
    return (), {name: value for name, value in kwargs.items() if name != "hidden_states"}
