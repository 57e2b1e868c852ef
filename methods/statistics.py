"""Statistics that say which sites bear a coarser format: first-order changes, curvature, format errors. No decision is taken here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from methods import catalogue
from methods.formats.numerics import Compressed, quantize_activation
from methods.formats.sides import plain
from methods.gradients import Loss, Tap, every_linear, reverse
from methods.method import Edit, NormView, SiteView, Stats
from methods.model.blocks import BlockRunner
from methods.model.head import project
from methods.model.products import product
from methods.model.structure import Site, Structure
from methods.model.weights import weight_of
from methods.policy import Decision

Candidates = Callable[[Site], Iterator[tuple[str, Edit]]]
"""The decisions to look at, at a site: label and edit, one after the other so that only one is in memory."""


def first_order(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    candidates: Candidates,
    norm_of: Callable[[Site], NormView | None],
    loss: Loss,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """By site and label: `g.(q - w)`, how far the loss moves to first order, activation rounding included; samples (n,).

    A sample is a probe on a sequence (on a batch, for experts). With the loss of the text, the mean's size is the score of first-order
    allocators; with `divergence`, half the mean square is the KL divergence to second order.
    """
    result: dict[str, dict[str, Tensor]] = {}
    shape = (batches[0].shape[0], batches[0].shape[1])
    n_blocks = len(structure.blocks)
    for passage in reverse(model, structure, batches, loss, every_linear(structure)):
        for site in structure.in_block(passage.block):
            result[site.name] = _site_samples(site, passage.taps, candidates(site), norm_of(site), model, shape)
        if progress:
            progress(n_blocks - passage.block, n_blocks)
    return result


def _site_samples(
    site: Site,
    taps: Sequence[Mapping[str, Tap]],
    candidates: Iterator[tuple[str, Edit]],
    norm: NormView | None,
    model: nn.Module,
    shape: tuple[int, int],
) -> dict[str, Tensor]:
    """Samples of every candidate: one a batch, probe and sequence of `shape` (n_sequences, length), for experts a batch and probe."""
    # Rows that routing mixed make one sample of all sequences, whose sum varies as many times more.
    factor = 1.0 if site.shares_input else shape[0] ** -0.5
    split = shape if site.shares_input else None
    weights = {layer.name: weight_of(model.get_submodule(layer.name)).float() for layer in site.layers}
    names = [layer.name for layer in site.layers]
    batches = [
        [_Layer.of(name, weights[name], found[name].by_sequence(split)) for name in names if name in found] for found in taps
    ]
    result: dict[str, Tensor] = {}
    for label, edit in candidates:
        ratio = input_ratio(norm, edit)
        changes = _changes(weights, edit, ratio)
        moved = [
            [
                layer.moved(changes[layer.name], edit.linears[layer.name], ratio, label)
                for layer in layers
                if layer.name in changes
            ]
            for layers in batches
        ]
        result[label] = torch.cat([sum(own, torch.zeros(1)) for own in moved]) * factor
    return result


def _changes(weights: Mapping[str, Tensor], edit: Edit, ratio: Tensor | None) -> dict[str, Tensor]:
    """`q - w` (d_out, d_in) by layer, in the coordinates of the inputs as they were before a fold."""
    return {
        name: (compressed.dense if ratio is None else compressed.dense * ratio) - weights[name]
        for name, compressed in edit.linears.items()
    }


@dataclass(frozen=True)
class _Layer:
    """One linear in one batch, and what all candidates read of it; samples (n,) run over probes, then sequences.

    x: (n_sequences, rows, d_in); per probe, gradients (n_sequences, rows, d_out) of its outputs and input_gradients (n_sequences, rows,
    d_in).
    """

    name: str
    x: Tensor
    gradients: Sequence[Tensor]
    input_gradients: Sequence[Tensor]
    shifts: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, weight: Tensor, tap: Tap) -> _Layer:
        return cls(name, tap.x, tap.gradients, [product(g, weight.T) for g in tap.gradients])

    def moved(self, change: Tensor, compressed: Compressed, ratio: Tensor | None, label: str) -> Tensor:
        """(n,): what changing the weight and rounding the activations does."""
        # The change of the outputs rather than gradients of the weight, which are as many weights again for every sample.
        outputs = product(self.x, change).flatten(1)
        weights = torch.cat([torch.linalg.vecdot(g.flatten(1), outputs) for g in self.gradients])
        return weights + self._activation_shift(compressed, ratio, label)

    def _activation_shift(self, compressed: Compressed, ratio: Tensor | None, label: str) -> Tensor:
        """What rounding the activations alone changes, (n,) or a single zero; computed once for all candidates with one rule."""
        fmt = compressed.format
        if fmt.act_bits >= 16:
            return torch.zeros(1)
        rule = (fmt.activation, None if ratio is None and plain(compressed.payload) else label)
        if rule not in self.shifts:
            scaled = self.x if ratio is None else self.x * ratio
            moved = quantize_activation(scaled, fmt, compressed.payload) - scaled
            moved = moved if ratio is None else moved / ratio
            self.shifts[rule] = torch.cat([(g * moved).sum((1, 2)) for g in self.input_gradients])
        return self.shifts[rule]


def input_ratio(norm: NormView | None, edit: Edit) -> Tensor | None:
    """(d_in,): new over old gain of the norm before a site, where an edit folds a scale into it; None where it does not."""
    if norm is None:
        return None
    replaced = edit.tensors.get(f"{norm.name}.weight")
    if replaced is None:
        return None
    old, new = norm.weight.float() + norm.unit_offset, replaced.float() + norm.unit_offset
    return torch.where(old != 0, new / torch.where(old != 0, old, torch.ones_like(old)), torch.ones_like(old))


@dataclass(frozen=True)
class Curvature:
    """The largest Hessian eigenvalue (by size) of a group of weights, on each batch.

    sharpness: `|mean| + standard deviation`, the sensitivity that Q-BERT (Shen 2020, section 3.1) allocates bits by.
    """

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.each) / len(self.each)

    @property
    def std(self) -> float:
        """Over the batches; 0 for a single one."""
        if len(self.each) < 2:
            return 0.0
        return float((sum((value - self.mean) ** 2 for value in self.each) / (len(self.each) - 1)) ** 0.5)

    @property
    def sharpness(self) -> float:
        return abs(self.mean) + self.std


def top_eigenvalues(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    steps: int = 50,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Curvature]:
    """Top Hessian eigenvalue of the text's mean loss for each group of weights, by power iteration with Hessian-vector products.

    groups: names of linears of one block, by the group's name; default: those of every site. A group's weights are one vector.
    Stops when a step moves the value by less than `tolerance` of it, or after `steps`. HAWQ (Dong 2019, section 3), Q-BERT.
    Memory: the graph, kept for double backward, of everything from the group's block to the loss, for one batch with all its logits:
    about three times what training on that batch without checkpointing takes. Time: `steps` double backward passes a group and batch.
    """
    if groups is None:
        groups = {site.name: [layer.name for layer in site.layers] for site in structure.sites}
    block_of = {layer.name: layer.block for _, layer in structure.layers()}
    by_block: dict[int, list[str]] = {}
    for name, layers in groups.items():
        blocks = {block_of[layer] for layer in layers}
        if len(blocks) != 1:
            raise ValueError(f"top_eigenvalues: group {name!r} lies in blocks {sorted(blocks)}; give linears of one block")
        by_block.setdefault(blocks.pop(), []).append(name)
    found: dict[str, list[float]] = {name: [] for name in groups}
    runner = BlockRunner(model, structure, batches)
    for index, (hidden, ids) in enumerate(zip(runner.inputs(), batches, strict=True)):
        for block in range(max(by_block, default=-1) + 1):
            if block in by_block:
                suffix = _Suffix(model, structure, runner, block, hidden, ids)
                for name in by_block[block]:
                    found[name].append(suffix.top(groups[name], steps, tolerance, seed))
            with torch.no_grad():
                hidden = runner.run(block, hidden)
        if progress:
            progress(index + 1, len(batches))
    return {name: Curvature(tuple(values)) for name, values in found.items()}


@dataclass(frozen=True)
class _Suffix:
    """The model from one block to the text's mean loss, on one batch."""

    model: nn.Module
    structure: Structure
    runner: BlockRunner
    block: int
    hidden: Tensor
    ids: Tensor

    def top(self, layers: Sequence[str], steps: int, tolerance: float, seed: int) -> float:
        """The largest eigenvalue by size; 0 where no token reaches the weights."""
        weights = [self.model.get_submodule(layer).get_parameter("weight") for layer in layers]
        generator = torch.Generator().manual_seed(seed)
        with _differentiable(weights):
            gradients = self._gradients(weights)
            if gradients is None:
                return 0.0
            v = _unit([torch.randn(w.shape, generator=generator).to(w) for w in weights])
            value = 0.0
            for _ in range(steps):
                product = [
                    torch.zeros_like(w) if h is None else h
                    for w, h in zip(weights, self._product(gradients, weights, v), strict=True)
                ]
                before, value = value, float(sum((a * b).sum() for a, b in zip(v, product, strict=True)))
                if not any(h.any() for h in product) or abs(value - before) <= tolerance * abs(value):
                    break
                v = _unit(product)
        return value

    def _product(self, gradients: Sequence[Tensor], weights: Sequence[Tensor], v: Sequence[Tensor]) -> Sequence[Tensor | None]:
        slope = torch.stack([(g * direction).sum() for g, direction in zip(gradients, v, strict=True)]).sum()
        return torch.autograd.grad(slope, weights, retain_graph=True, allow_unused=True)

    def _gradients(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """Of the loss in the weights, differentiable again; None where none of them takes part."""
        # Fused attention has no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            hidden = self.hidden.detach().requires_grad_(True)
            for block in range(self.block, len(self.structure.blocks)):
                hidden = self.runner.run(block, hidden)
            logits = project(self.model, self.structure, self.runner.finish(hidden))
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
            found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        if all(g is None for g in found):
            return None
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that take part in graphs inside, and are as they were afterwards."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)


def _unit(v: Sequence[Tensor]) -> list[Tensor]:
    norm = torch.stack([part.square().sum() for part in v]).sum().sqrt()
    return [(part / norm).detach() for part in v]


@dataclass(frozen=True)
class EditError:
    """What an edit does to a site, as a share of the dense energy, all layers together.

    weight: `|Q - W|^2 / |W|^2`; output: `tr(D H D^T) / tr(W H W^T)` with `D = Q - W`, the weights' part of the output error; rounded:
    that of the outputs with activations rounded as the format says, on the sampled rows; nan where the statistic was not collected.
    """

    weight: float
    output: float
    rounded: float


def edit_error(view: SiteView, stats: Mapping[str, Stats], edit: Edit) -> EditError:
    """The errors of an edit; `stats` by layer name, of the site's inputs, with `HESSIAN` or `SAMPLE` or both."""
    ratio = input_ratio(view.norm, edit)
    changes = _changes(view.weights, edit, ratio)
    energy, error = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for name, weight in view.weights.items():
        own, compressed = stats[name], edit.linears[name]
        for index, tensor in ((0, weight), (1, changes[name])):
            sums = error if index else energy
            sums[0] += tensor.double().square().sum()
            sums[1] += float("nan") if own.hessian is None else ((tensor.double() @ own.hessian.double()) * tensor).sum()
        if own.sample is None:
            energy[2] = float("nan")
            continue
        x = own.sample if ratio is None else own.sample * ratio
        wanted = own.sample @ weight.T
        energy[2] += wanted.double().square().sum()
        rounded = quantize_activation(x, compressed.format, compressed.payload)
        error[2] += (rounded @ compressed.dense.T - wanted).double().square().sum()
    return EditError(*(error / energy).tolist())


def format_errors(
    view: SiteView, stats: Mapping[str, Stats], formats: Sequence[str], method: str = "rtn"
) -> dict[str, EditError]:
    """The errors of every format at a site by a method, of which MoFQ (Zhang 2023) takes the least; ValueError for a refused one."""
    decisions = [Decision.of(method, format=name) for name in formats]
    edits = catalogue.apply_many(view, stats, decisions)
    return {name: edit_error(view, stats, edit) for name, edit in zip(formats, edits, strict=True)}
