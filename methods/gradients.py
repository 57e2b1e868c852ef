"""Gradients at every linear, block by block from the head back: hidden states at the blocks' boundaries, one block's graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.model.blocks import BlockRunner
from methods.model.head import project
from methods.model.structure import Structure

N_TOKENS = 4096
"""At most this many calibration tokens are differentiated for `Need.FISHER`."""


@dataclass(frozen=True)
class Loss:
    """What is differentiated: `n_probes` scalars a sequence.

    text: the mean cross-entropy of the text. sampled: that of labels drawn from the model itself, whose squared gradients are the true
    Fisher information. divergence: `z.r / sqrt(t)` with `r = sqrt(p) e - p (sqrt(p).e)` and Rademacher `e`: r has covariance
    `diag(p) - p p^T`, the Hessian of the KL divergence in the logits z, so that half the squared change of a scalar is that divergence
    (KL-Fisher probes as in AURA, moved from weights to outputs). Raises ValueError for several probes of the text, which has one loss.
    """

    kind: Literal["text", "sampled", "divergence"] = "text"
    n_probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("text", "sampled", "divergence"):
            raise ValueError(f"loss: kind={self.kind!r}; use text, sampled or divergence")
        if self.n_probes < 1 or (self.kind == "text" and self.n_probes != 1):
            raise ValueError(f"loss: n_probes={self.n_probes}; use 1 with text, and at least 1 with sampled or divergence")

    def gradients(self, logits: Tensor, ids: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Gradient of each scalar in the logits (t, n_vocab) of one sequence ids (t,)."""
        p = logits.softmax(-1)
        for _ in range(self.n_probes):
            yield self._gradient(p, ids, generator)

    def _gradient(self, p: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        length = len(p)
        if self.kind == "divergence":
            root = p.sqrt()
            sign = torch.randint(0, 2, root.shape, generator=generator, dtype=torch.int8).to(root.dtype).mul_(2).sub_(1)
            weighted = root * sign
            r: Tensor = (weighted - p * weighted.sum(-1, keepdim=True)) / length**0.5
            return r
        if self.kind == "sampled":
            labels = torch.multinomial(p, 1, generator=generator)
            return p.scatter_add(-1, labels, -torch.ones_like(labels, dtype=p.dtype)) / length
        # The last position has no next token.
        labels = ids[1:, None]
        inner = p[:-1].scatter_add(-1, labels, -torch.ones_like(labels, dtype=p.dtype)) / (length - 1)
        return torch.cat([inner, torch.zeros_like(p[-1:])])


@dataclass(frozen=True)
class Tap:
    """What passed through one linear in a batch: inputs x (…, d_in), and for every probe the gradient at its output (…, d_out)."""

    x: Tensor
    gradients: Sequence[Tensor]

    def by_sequence(self, shape: tuple[int, int] | None) -> Tap:
        """As (n_sequences, length, features), which some models flatten; as one sample without `shape`."""
        n, length = shape or (1, -1)
        x = self.x.reshape(n, length, self.x.shape[-1]).float()
        return Tap(x, [g.reshape(n, length, g.shape[-1]).float() for g in self.gradients])


@dataclass(frozen=True)
class Passage:
    """One block in a reverse sweep, for each batch: its input hidden (b, t, d), the probes' gradients at its output, and its taps.

    taps: by layer name; an expert that no token reached has none.
    """

    block: int
    hidden: Sequence[Tensor]
    upstream: Sequence[Sequence[Tensor]]
    taps: Sequence[Mapping[str, Tap]]


def every_linear(structure: Structure) -> Callable[[int], list[str]]:
    """The layers of a block, by the block's number."""
    return lambda block: [layer.name for site in structure.in_block(block) for layer in site.layers]


def reverse(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    loss: Loss,
    tapped: Callable[[int], Sequence[str]],
    *,
    until: int = 0,
) -> Iterator[Passage]:
    """The blocks from the last to `until`, each with the taps of the layers that `tapped` names.

    batches: token ids (b, t) of one shape. Memory: the model, hidden states at every block's input, and one block's graph of one batch.
    """
    runner = BlockRunner(model, structure, batches)
    hidden = [[h] for h in runner.inputs()]
    with torch.no_grad():
        for block in range(len(structure.blocks)):
            for own in hidden:
                own.append(runner.run(block, own[-1]))
    generator = torch.Generator().manual_seed(loss.seed)
    upstream = [
        _head(model, structure, runner, own.pop(), batch, loss, generator) for own, batch in zip(hidden, batches, strict=True)
    ]
    for block in reversed(range(until, len(structure.blocks))):
        inputs = [own.pop() for own in hidden]
        passed = [
            backward(model, runner, block, h, g, tapped(block), below=block > until)
            for h, g in zip(inputs, upstream, strict=True)
        ]
        yield Passage(block, inputs, upstream, [taps for taps, _ in passed])
        upstream = [below for _, below in passed]


def backward(
    model: nn.Module,
    runner: BlockRunner,
    block: int,
    hidden: Tensor,
    upstream: Sequence[Tensor],
    names: Sequence[str],
    *,
    below: bool = True,
) -> tuple[dict[str, Tap], list[Tensor]]:
    """Runs one block with its graph kept: taps of the named linears, and every probe's gradient at the input if `below`."""
    if not (names or below):
        return {}, []
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    leaf = hidden.detach().requires_grad_(True)
    try:
        out = runner.run(block, leaf)
    finally:
        for handle in handles:
            handle.remove()
    reached = [name for name in names if name in outputs]
    found: dict[str, list[Tensor]] = {name: [] for name in reached}
    result: list[Tensor] = []
    for probe, g in enumerate(upstream):
        wanted = [*([leaf] if below else []), *(outputs[name] for name in reached)]
        if not wanted:
            break
        gradients = torch.autograd.grad(out, wanted, g, retain_graph=probe + 1 < len(upstream))
        if below:
            result.append(gradients[0])
        for name, gradient in zip(reached, gradients[int(below) :], strict=True):
            found[name].append(gradient)
    return {name: Tap(inputs[name], found[name]) for name in reached}, result


def _head(
    model: nn.Module,
    structure: Structure,
    runner: BlockRunner,
    hidden: Tensor,
    ids: Tensor,
    loss: Loss,
    generator: torch.Generator,
) -> list[Tensor]:
    """Gradient of each probe at the last block's output (b, t, d); the logits of one sequence exist at a time."""
    leaf = hidden.detach().requires_grad_(True)
    final = runner.finish(leaf)
    upstream = [torch.zeros_like(final) for _ in range(loss.n_probes)]
    for sequence in range(len(final)):
        piece = final[sequence].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = project(model, structure, piece)
        for probe, g in enumerate(loss.gradients(logits.detach(), ids[sequence], generator)):
            (upstream[probe][sequence],) = torch.autograd.grad(logits, piece, g, retain_graph=probe + 1 < loss.n_probes)
    last = loss.n_probes - 1
    return [torch.autograd.grad(final, leaf, g, retain_graph=probe < last)[0] for probe, g in enumerate(upstream)]


class Fisher:
    """The mean squared gradient of every weight, `E[g^2]` over sequences, one block at a time and in any order of blocks.

    g is the gradient of a sequence's mean loss. Every batch is run; give (1, t) ones where the model has experts: what routing mixes
    is told apart by batch only. Memory: hidden states and gradients at the boundary of every block from the first of `blocks` on;
    a block is run again when its turn comes, in the model as it then is, so its own weights must not have been edited before.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, batches: Sequence[Tensor], blocks: Sequence[int], loss: Loss | None = None
    ) -> None:
        self._model, self._structure = model, structure
        self._runner = BlockRunner(model, structure, batches)
        found = reverse(model, structure, batches, loss or Loss(), lambda _block: (), until=min(blocks))
        self._at = {passage.block: (passage.hidden, passage.upstream) for passage in found if passage.block in set(blocks)}

    def of(self, block: int, names: Sequence[str]) -> dict[str, Tensor]:
        """(d_out, d_in) fp32 of each named layer of the block; zeros for an expert that no token reached."""
        layers = {layer.name: (site, layer) for site in self._structure.in_block(block) for layer in site.layers}
        sums = {name: torch.zeros(layers[name][1].d_out, layers[name][1].d_in, dtype=torch.float64) for name in names}
        n_samples = 0
        for hidden, upstream in zip(*self._at[block], strict=True):
            taps, _ = backward(self._model, self._runner, block, hidden, upstream, names, below=False)
            shape = (hidden.shape[0], hidden.shape[1])
            n_samples += shape[0] * len(upstream)
            for name, tap in taps.items():
                own = tap.by_sequence(shape if layers[name][0].shares_input else None)
                for g in own.gradients:
                    for sample in range(len(own.x)):
                        sums[name] += (g[sample].T @ own.x[sample]).square()
        return {name: (total / n_samples).float() for name, total in sums.items()}


def bounded(batches: Sequence[Tensor], n_tokens: int = N_TOKENS) -> list[Tensor]:
    """Batches spread evenly over all of them, at most `n_tokens` tokens and at least one batch."""
    n = max(1, min(len(batches), n_tokens // batches[0].numel()))
    return [batches[index * len(batches) // n] for index in range(n)]
