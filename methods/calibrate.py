"""THE calibration loop: statistics of every linear's inputs, block by block, optionally on the compressed prefix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from methods.apply import Installer
from methods.formats.format import Format
from methods.formats.numerics import quantize_activation
from methods.gradients import Fisher, bounded
from methods.learn import through
from methods.linalg import Gram
from methods.method import BlockSample, Edit, Need, Stats
from methods.model.blocks import BlockRunner
from methods.model.structure import Site, Structure
from methods.model.weights import is_transposed

N_SAMPLE = 512
"""At most this many input rows are kept for `Need.SAMPLE`."""

N_BLOCK = 2**15
"""At most this many tokens, in whole batches spread evenly over all, are what a block is reconstructed on (`Need.BLOCK`)."""

Visit = Callable[[int, Mapping[str, Stats]], Mapping[str, Edit] | None]
Hook = Callable[[nn.Module, tuple[Any, ...]], Any]


def sweep(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    needs: Mapping[str, frozenset[Need]],
    visit: Visit,
    *,
    start: int = 0,
    skip: Callable[[int], bool] = lambda block: False,
    dense: bool = False,
) -> None:
    """Calls `visit(block, stats)` for every block in order, with the statistics that its sites need.

    batches: token ids (b, t) of one shape. needs: by site; a site that is absent, or needs nothing, gets no statistics.
    stats: by layer name; layers that share an input share one object; an expert that no token reached has n_tokens = 0 and zeros.
    Where visit returns edits (by site) they are installed while the block's outputs are made, so that later blocks see
    the compressed prefix; otherwise the dense outputs are passed on. Blocks before `start`, and those that `skip` names, are
    run as they are and not visited: so a sweep resumes. At the end, or when visit raises, the model is as it was before.
    dense: `visit` never returns edits (ValueError if it does), so that the hidden states are kept once, those behind a block in the
    place of those before it.
    DRIFT, FIRST_DRIFT and BLOCK compare with the model as it was before: where one of them is still needed after an edit, a second stream
    of hidden states passes through it. Memory: the model, one block's statistics, the hidden states before and after one block in each
    stream; for FISHER, that of the model as it was before, hidden states and gradients at the blocks' boundaries of at most
    `gradients.N_TOKENS` tokens. Raises ValueError for the drift of experts behind an edit: the tokens that reach them are not the same
    in both streams.
    """
    unknown = sorted(set(needs) - {site.name for site in structure.sites})
    if unknown:
        example = structure.sites[0].name
        raise ValueError(f"sweep: {unknown[:3]} are no sites of this {structure.architecture}; they look like {example!r}")
    # A block's sample refers to hidden states, which a visit may keep.
    own = not any(Need.BLOCK in need for need in needs.values())
    compared = {Need.DRIFT, Need.FIRST_DRIFT, Need.BLOCK}
    last = max((site.block for site in structure.sites if needs.get(site.name, frozenset()) & compared), default=-1)
    visited = {block for block in range(start, len(structure.blocks)) if not skip(block)}
    fisher = _Gradients.of(model, structure, batches, needs, visited)
    runner = BlockRunner(model, structure, batches)
    hidden = runner.inputs()
    streams = _Streams(hidden, hidden)
    with Installer(model, structure) as installer:
        for block in range(len(structure.blocks)):
            if block not in visited:
                streams = _through(model, runner, block, streams, {}, overwrite=own)
                continue
            wanted = {site: needs[site.name] for site in structure.in_block(block) if needs.get(site.name)}
            stats: dict[str, Stats] = {}
            after = None
            if wanted or block < last:
                stats, after = _collect(model, runner, structure, block, streams, wanted, overwrite=dense and own)
            if fisher is not None:
                stats = fisher.added(block, stats)
            edits = visit(block, stats) or {}
            if edits and dense:
                raise ValueError(f"sweep: dense=True, but visit returned edits of {sorted(edits)}; leave dense out")
            for name, edit in edits.items():
                installer.install(name, edit)
            now = [runner.run(block, h) for h in streams.now] if edits or after is None else after.now
            installer.restore()  # the block's outputs are made: its weights need not stay beside the model's own
            streams = _Streams(now, now if after is None or block >= last else after.dense)


@dataclass(frozen=True)
class _Streams:
    """Hidden states (b, t, d) of each batch, as they are now and in the dense model: the same list where nothing was edited yet."""

    now: list[Tensor]
    dense: list[Tensor]

    @property
    def same(self) -> bool:
        return self.now is self.dense


@dataclass(frozen=True)
class _Gradients:
    """The Fisher information of the layers that need it."""

    fisher: Fisher
    layers: Mapping[int, Sequence[str]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Tensor],
        needs: Mapping[str, frozenset[Need]],
        visited: Collection[int],
    ) -> _Gradients | None:
        """None where no block that is visited needs any."""
        sites = [site for site in structure.sites if Need.FISHER in needs.get(site.name, ()) and site.block in visited]
        layers: dict[int, list[str]] = {}
        for site in sites:
            layers.setdefault(site.block, []).extend(layer.name for layer in site.layers)
        return cls(Fisher(model, structure, bounded(batches), sorted(layers)), layers) if layers else None

    def added(self, block: int, stats: Mapping[str, Stats]) -> dict[str, Stats]:
        """Statistics by layer, with the Fisher information: those layers share no object any more."""
        if block not in self.layers:
            return dict(stats)
        found = self.fisher.of(block, self.layers[block])
        return {name: replace(own, fisher=found[name]) if name in found else own for name, own in stats.items()}


def _collect(
    model: nn.Module,
    runner: BlockRunner,
    structure: Structure,
    block: int,
    streams: _Streams,
    wanted: Mapping[Site, frozenset[Need]],
    *,
    overwrite: bool,
) -> tuple[dict[str, Stats], _Streams]:
    """Statistics by layer, and the streams behind the block as it stands."""
    collectors: dict[str, _Collector] = {}
    hooks: dict[str, _Collector] = {}
    for site, need in wanted.items():
        if need & {Need.DRIFT, Need.FIRST_DRIFT} and not (site.shares_input or streams.same):
            raise ValueError(f"sweep: {site.name} has no drift, for other tokens reach its experts than in the dense model")
        for layer in site.layers:
            first = site.layers[0].name
            if site.shares_input and first in collectors:
                collectors[layer.name] = collectors[first]
                continue
            length = streams.now[0].shape[1] if site.shares_input else None
            collectors[layer.name] = hooks[layer.name] = _Collector(site.d_in, need, length)
    after = _through(model, runner, block, streams, hooks, overwrite=overwrite)
    sample = None
    if any(Need.BLOCK in need for need in wanted.values()):
        sample = _block_sample(model, runner, structure, block, streams.now, after.dense)
    stats = {id(collector): collector.stats(sample) for collector in hooks.values()}
    return {layer: stats[id(collector)] for layer, collector in collectors.items()}, after


def _through(
    model: nn.Module,
    runner: BlockRunner,
    block: int,
    streams: _Streams,
    collectors: Mapping[str, _Collector],
    *,
    overwrite: bool,
) -> _Streams:
    """The streams behind the block as it stands; the collectors see the present one, beside what their layers read in the dense.

    overwrite: the outputs of a single stream take the place of its inputs, tensor by tensor: what lives long never moves, so that what
    does not leaves no gaps behind.
    """
    if streams.same:
        if overwrite:
            for h in streams.now:
                h.copy_(_run(model, runner, block, h, collectors))
            return streams
        now = [_run(model, runner, block, h, collectors) for h in streams.now]
        return _Streams(now, now)
    now, dense = [], []
    drifting = {name: collector for name, collector in collectors.items() if collector.drifts}
    for h, h_dense in zip(streams.now, streams.dense, strict=True):
        dense.append(_run(model, runner, block, h_dense, {name: c.see_dense for name, c in drifting.items()}))
        now.append(_run(model, runner, block, h, collectors))
    return _Streams(now, dense)


def _run(model: nn.Module, runner: BlockRunner, block: int, hidden: Tensor, hooks: Mapping[str, Hook]) -> Tensor:
    """The block's output, with hooks before the named layers."""
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        return runner.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _block_sample(
    model: nn.Module, runner: BlockRunner, structure: Structure, block: int, inputs: list[Tensor], targets: list[Tensor]
) -> BlockSample:
    """The block as a function of its weights, on batches spread evenly over all."""
    layers = {layer.name for site in structure.in_block(block) for layer in site.layers}

    def run(hidden: Tensor, weights: Mapping[str, Tensor], formats: Mapping[str, Format]) -> Tensor:
        replaced = {}
        for name, weight in weights.items():
            module = model.get_submodule(name) if name in layers else None
            full = name if module is None else f"{name}.weight"
            stored = weight.T if module is not None and is_transposed(module) else weight
            replaced[full] = stored.to(model.get_parameter(full).dtype)
        rounders = {name: _straight_rounder(fmt) for name, fmt in formats.items() if fmt.act_bits != 16}
        handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in rounders.items()]
        try:
            return runner.run_with(block, hidden.to(targets[0].dtype), replaced).float()
        finally:
            for handle in handles:
                handle.remove()

    step = -(-len(inputs) * inputs[0].shape[0] * inputs[0].shape[1] // N_BLOCK)
    return BlockSample([h.float() for h in inputs[::step]], [h.float() for h in targets[::step]], run)


def _straight_rounder(fmt: Format) -> Hook:
    """A pre-hook that rounds the input as the format says and passes gradients straight through."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = arguments[0]
        rounded = quantize_activation(x.detach(), fmt).to(x.dtype)
        return (through(x, rounded), *arguments[1:])

    return hook


class _Collector:
    """A forward pre-hook that adds up what is needed of a linear's inputs: products in fp32, sums over batches in fp64.

    length: rows of a sequence, which follow one another; None where rows are routed.
    """

    def __init__(self, d_in: int, need: frozenset[Need], length: int | None) -> None:
        self._n_tokens = 0
        self._products = Gram(d_in) if Need.HESSIAN in need else None
        self._maxima = torch.zeros(d_in) if Need.ABS_MAX in need else None
        self._sums = torch.zeros(d_in, dtype=torch.float64) if Need.ABS_MEAN in need else None
        self._range = torch.zeros(2, d_in) if Need.RANGE in need else None
        self._sample = torch.zeros(0, d_in) if Need.SAMPLE in need else None
        self._drift = torch.zeros(d_in, d_in, dtype=torch.float64) if Need.DRIFT in need else None
        self._dense: Tensor | None = None
        self._in_block = Need.BLOCK in need
        self._stride = 1
        self._length = length
        self._first = [torch.zeros(0, d_in)] if Need.FIRST in need else None
        self._first_drift = [torch.zeros(0, d_in)] if Need.FIRST_DRIFT in need else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Adds the rows of one call's input (…, d_in)."""
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        if not len(x):
            return
        if self._dense is not None:
            self._see_drift(self._dense - x, x)
            self._dense = None
        if self._products is not None:
            self._products.add(x)
        if self._maxima is not None:
            self._maxima = torch.maximum(self._maxima, x.abs().amax(0))
        if self._sums is not None:
            self._sums += x.abs().sum(0, dtype=torch.float64)
        if self._range is not None:
            low, high = x.aminmax(dim=0)
            own = torch.stack([low, high])
            first = self._n_tokens == 0
            self._range = (
                own if first else torch.stack([torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)])
            )
        if self._sample is not None:
            self._keep(x)
        if self._first is not None and self._length is not None:
            self._first.append(x[:: self._length].clone())
        self._n_tokens += len(x)

    @property
    def drifts(self) -> bool:
        """Whether it compares with the dense stream, which must then run first, with `see_dense` as the hook."""
        return self._drift is not None or self._first_drift is not None

    def see_dense(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Takes note of what the dense stream's next call reads; calls that no `see_dense` came before do not drift."""
        self._dense = args[0].detach().reshape(-1, args[0].shape[-1]).float()

    def stats(self, block: BlockSample | None) -> Stats:
        """The statistics of all rows so far; zeros where there was none."""
        n = max(self._n_tokens, 1)
        hessian = None if self._products is None else self._products.mean(n)
        drift = None if self._drift is None else (self._drift / n).float()
        mean = None if self._sums is None else (self._sums / n).float()
        own = block if self._in_block else None
        first = None if self._first is None else torch.cat(self._first)
        lost = None if self._first_drift is None else torch.cat(self._first_drift)
        if first is not None and lost is not None and not len(lost):
            lost = torch.zeros_like(first)  # nothing was edited yet
        seen = (hessian, self._maxima, mean, self._range, self._sample, drift)
        return Stats(self._n_tokens, *seen, block=own, first=first, first_drift=lost)

    def _see_drift(self, drift: Tensor, x: Tensor) -> None:
        if self._drift is not None:
            self._drift += drift.T @ x
        if self._first_drift is not None and self._length is not None:
            self._first_drift.append(drift[:: self._length].clone())

    def _keep(self, x: Tensor) -> None:
        """The last of every `stride` rows of the whole stream, the stride doubling whenever they become too many.

        The first of them would be first tokens, all that there are, wherever the stride divides a sequence.
        """
        assert self._sample is not None
        rows = x[(-1 - self._n_tokens) % self._stride :: self._stride]
        self._sample = torch.cat([self._sample, rows])
        while len(self._sample) > N_SAMPLE:
            self._sample = self._sample[1::2].clone()
            self._stride *= 2
