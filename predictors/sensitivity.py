"""Sensitivity of the output distribution to every (site, decision): an output-space Fisher score, in nats per token.

With `p = softmax(z)` and Rademacher `e`, `r = sqrt(p) e - p (sqrt(p).e)` has covariance `diag(p) - p p^T`, the Hessian of the KL
divergence in the logits. The gradient of `z.r / sqrt(T)` with respect to a site's output `y`, contracted with the change `dy` that a
decision makes there, is a sample `a` with `E[a^2] / 2` = the KL divergence to second order. No labels, no fitted constant.
(KL-Fisher probes as in AURA, moved from weights to outputs so that activation rounding is scored too.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.formats.numerics import quantize_activation
from methods.method import Edit, NormView
from methods.model.blocks import BlockRunner
from methods.model.head import project
from methods.model.structure import LayerSpec, Site, Structure
from methods.model.weights import weight_of


@dataclass(frozen=True)
class Scores:
    """Sensitivities. kl: nats per token by site and decision label, with the standard error of the mean over samples."""

    kl: Mapping[str, Mapping[str, float]]
    stderr: Mapping[str, Mapping[str, float]]
    n_probes: int
    n_tokens: int


Candidates = Callable[[Site], Iterator[tuple[str, Edit]]]
"""The decisions to score at a site: label and edit, one after the other so that only one is in memory."""


def score(
    model: nn.Module,
    structure: Structure,
    tokens: Tensor,
    candidates: Candidates,
    norm_of: Callable[[Site], NormView | None],
    *,
    n_probes: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every candidate of every site with one forward and `n_probes` backward passes, block by block.

    tokens: (n_sequences, length). A sample is one probe on one sequence. Memory: the hidden states at every block, and one block's graph.
    Second order: trust a score up to about 0.1 nats; 2-bit choices often leave that region and must be measured.
    """
    runner = BlockRunner(model, structure, [tokens])
    hidden = [runner.inputs()[0]]
    with torch.no_grad():
        for block in range(len(structure.blocks)):
            hidden.append(runner.run(block, hidden[-1]))
    gradients = _output_gradients(model, structure, runner, hidden[-1], n_probes, seed)
    kl: dict[str, dict[str, float]] = {}
    stderr: dict[str, dict[str, float]] = {}
    for block in reversed(range(len(structure.blocks))):
        taps, gradients = _backward(model, structure, runner, block, hidden.pop(-2), gradients)
        for site in structure.in_block(block):
            samples = _site_samples(site, taps, candidates(site), norm_of(site), model, (tokens.shape[0], tokens.shape[1]))
            kl[site.name] = {label: float(a.square().mean() / 2) for label, a in samples.items()}
            stderr[site.name] = {
                label: float(a.square().std() / 2 / max(1, a.numel()) ** 0.5) if a.numel() > 1 else float("nan")
                for label, a in samples.items()
            }
        if progress:
            progress(len(structure.blocks) - block, len(structure.blocks))
    return Scores(kl, stderr, n_probes, tokens.numel())


def _output_gradients(
    model: nn.Module, structure: Structure, runner: BlockRunner, hidden: Tensor, n_probes: int, seed: int
) -> list[Tensor]:
    """Gradient of each probe's scalar with respect to the last block's output: n_probes of (n_sequences, length, d)."""
    generator = torch.Generator().manual_seed(seed)
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        final = runner.finish(leaf)
    upstream = [torch.zeros_like(final) for _ in range(n_probes)]
    for sequence in range(final.shape[0]):
        piece = final[sequence].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = project(model, structure, piece)
        root = logits.detach().softmax(-1).sqrt()
        for probe in range(n_probes):
            sign = torch.randint(0, 2, root.shape, generator=generator, dtype=torch.int8).to(root.dtype).mul_(2).sub_(1)
            weighted = root * sign
            r = weighted - root.square() * (root * weighted).sum(-1, keepdim=True)
            (g,) = torch.autograd.grad(logits, piece, r / piece.shape[0] ** 0.5, retain_graph=probe + 1 < n_probes)
            upstream[probe][sequence] = g
    return [
        torch.autograd.grad(final, leaf, upstream[probe], retain_graph=probe + 1 < n_probes)[0].detach()
        for probe in range(n_probes)
    ]


@dataclass(frozen=True)
class _Tap:
    """What passed through one linear: inputs x (…, d_in), and the gradient of its output for every probe (…, d_out)."""

    x: Tensor
    gradients: Sequence[Tensor]

    def by_sequence(self, shape: tuple[int, int] | None) -> _Tap:
        """Inputs and gradients as (n_sequences, length, features), some models flatten them; as one sample without `shape`."""
        n, length = shape or (1, -1)
        x = self.x.reshape(n, length, self.x.shape[-1]).float()
        return _Tap(x, [g.reshape(n, length, g.shape[-1]) for g in self.gradients])


def _backward(
    model: nn.Module, structure: Structure, runner: BlockRunner, block: int, hidden: Tensor, upstream: Sequence[Tensor]
) -> tuple[dict[str, _Tap], list[Tensor]]:
    """Run one block with its graph kept; gradients at its linears' outputs and at its input, for every probe."""
    names = [layer.name for site in structure.in_block(block) for layer in site.layers]
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    leaf = hidden.detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            out = runner.run(block, leaf)
    finally:
        for handle in handles:
            handle.remove()
    reached = [name for name in names if name in outputs]
    taps: dict[str, list[Tensor]] = {name: [] for name in reached}
    below: list[Tensor] = []
    for probe, g in enumerate(upstream):
        grads = torch.autograd.grad(
            out, [leaf, *(outputs[name] for name in reached)], g, retain_graph=probe + 1 < len(upstream)
        )
        below.append(grads[0].detach())
        for name, grad in zip(reached, grads[1:], strict=True):
            taps[name].append(grad.detach())
    return {name: _Tap(inputs[name], taps[name]) for name in reached}, below


def _site_samples(
    site: Site,
    taps: Mapping[str, _Tap],
    candidates: Iterator[tuple[str, Edit]],
    norm: NormView | None,
    model: nn.Module,
    shape: tuple[int, int],
) -> dict[str, Tensor]:
    """Samples `a` of every candidate, one a probe and sequence of `shape` (n_sequences, length), one a probe for experts.

    Each is the first-order change of a probe's scalar.
    """
    layers = [layer for layer in site.layers if layer.name in taps]
    taps = {layer.name: taps[layer.name].by_sequence(shape if site.shares_input else None) for layer in layers}
    # Rows that routing mixed make one sample of all sequences, whose sum varies as many times more.
    norm_of_samples = 1.0 if site.shares_input else shape[0] ** -0.5
    weight_gradients = {layer.name: _weight_gradients(taps[layer.name]) for layer in layers}
    input_gradients = {layer.name: _input_gradients(model, layer, taps[layer.name]) for layer in layers}
    shifts: dict[tuple[object, ...], Tensor] = {}
    result: dict[str, Tensor] = {}
    for label, edit in candidates:
        ratio = input_ratio(norm, edit)
        total = torch.zeros(1)
        for layer in layers:
            compressed = edit.linears.get(layer.name)
            if compressed is None:
                continue
            dense = compressed.dense if ratio is None else compressed.dense * ratio
            change = (dense - weight_of(model.get_submodule(layer.name)).float()).flatten()
            total = total + weight_gradients[layer.name].flatten(1) @ change
            if compressed.format.act_bits < 16:
                rule = (layer.name, compressed.format.act_group, None if ratio is None else label)
                if rule not in shifts:
                    shifts[rule] = _activation_shift(taps[layer.name].x, input_gradients[layer.name], compressed.format, ratio)
                total = total + shifts[rule]
        result[label] = total * norm_of_samples
    return result


def _weight_gradients(tap: _Tap) -> Tensor:
    """(n_probes * n_samples, d_out, d_in)."""
    return torch.cat([g.transpose(1, 2) @ tap.x for g in tap.gradients])


def _input_gradients(model: nn.Module, layer: LayerSpec, tap: _Tap) -> list[Tensor]:
    """Per probe, (n_samples, rows, d_in): the gradient at this linear's own input."""
    weight = weight_of(model.get_submodule(layer.name)).float()
    return [g @ weight for g in tap.gradients]


def _activation_shift(x: Tensor, gradients: Sequence[Tensor], fmt: object, ratio: Tensor | None) -> Tensor:
    """(n_probes * n_samples,): what rounding the activations alone changes, to first order."""
    scaled = x if ratio is None else x * ratio
    moved = quantize_activation(scaled, fmt) - scaled  # type: ignore[arg-type]
    if ratio is not None:
        moved = moved / ratio
    return torch.cat([(g * moved).sum((1, 2)) for g in gradients])


def input_ratio(norm: NormView | None, edit: Edit) -> Tensor | None:
    """(d_in,): new over old gain of the norm before a site, where an edit folds a scale into it; None where it does not."""
    if norm is None:
        return None
    replaced = edit.tensors.get(f"{norm.name}.weight")
    if replaced is None:
        return None
    old, new = norm.weight.float() + norm.unit_offset, replaced.float() + norm.unit_offset
    return torch.where(old != 0, new / torch.where(old != 0, old, torch.ones_like(old)), torch.ones_like(old))
