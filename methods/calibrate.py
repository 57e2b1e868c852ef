"""THE calibration loop: statistics of every linear's inputs, block by block, optionally on the compressed prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.apply import Installer
from methods.method import Edit, Need, Stats
from methods.model.blocks import BlockRunner
from methods.model.structure import Site, Structure

N_SAMPLE = 512
"""At most this many input rows are kept for `Need.SAMPLE`."""

Visit = Callable[[int, Mapping[str, Stats]], Mapping[str, Edit] | None]


def sweep(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    needs: Mapping[str, frozenset[Need]],
    visit: Visit,
    *,
    start: int = 0,
    skip: Callable[[int], bool] = lambda block: False,
) -> None:
    """Calls `visit(block, stats)` for every block in order, with the statistics that its sites need.

    batches: token ids (b, t) of one shape. needs: by site; a site that is absent, or needs nothing, gets no statistics.
    stats: by layer name; layers that share an input share one object; an expert that no token reached has n_tokens = 0 and zeros.
    Where visit returns edits (by site) they are installed before the block's outputs are passed on, so that later blocks see
    the compressed prefix; otherwise the dense outputs are passed on. Blocks before `start`, and those that `skip` names, are
    run as they are and not visited: so a sweep resumes. At the end, or when visit raises, the model is as it was before.
    Memory: the model, one block's statistics, the hidden states before and after one block.
    """
    unknown = sorted(set(needs) - {site.name for site in structure.sites})
    if unknown:
        example = structure.sites[0].name
        raise ValueError(f"sweep: {unknown[:3]} are no sites of this {structure.architecture}; they look like {example!r}")
    runner = BlockRunner(model, structure, batches)
    hidden = runner.inputs()
    with Installer(model, structure) as installer:
        for block in range(len(structure.blocks)):
            if block < start or skip(block):
                hidden = [runner.run(block, h) for h in hidden]
                continue
            wanted = {site: needs[site.name] for site in structure.in_block(block) if needs.get(site.name)}
            stats, after = _collect(model, runner, block, hidden, wanted)
            edits = visit(block, stats) or {}
            for name, edit in edits.items():
                installer.install(name, edit)
            hidden = [runner.run(block, h) for h in hidden] if edits or after is None else after


def _collect(
    model: nn.Module, runner: BlockRunner, block: int, hidden: list[Tensor], wanted: Mapping[Site, frozenset[Need]]
) -> tuple[dict[str, Stats], list[Tensor] | None]:
    """Statistics by layer, and the block's outputs where it had to be run for them."""
    if not wanted:
        return {}, None
    collectors: dict[str, _Collector] = {}
    handles = []
    for site, need in wanted.items():
        for layer in site.layers:
            first = site.layers[0].name
            if site.shares_input and first in collectors:
                collectors[layer.name] = collectors[first]
                continue
            collectors[layer.name] = _Collector(site.d_in, need)
            handles.append(model.get_submodule(layer.name).register_forward_pre_hook(collectors[layer.name]))
    try:
        after = [runner.run(block, h) for h in hidden]
    finally:
        for handle in handles:
            handle.remove()
    stats = {id(collector): collector.stats() for collector in collectors.values()}
    return {layer: stats[id(collector)] for layer, collector in collectors.items()}, after


class _Collector:
    """A forward pre-hook that adds up what is needed of a linear's inputs: products in fp32, sums over batches in fp64."""

    def __init__(self, d_in: int, need: frozenset[Need]) -> None:
        self._n_tokens = 0
        self._products = torch.zeros(d_in, d_in, dtype=torch.float64) if Need.HESSIAN in need else None
        self._maxima = torch.zeros(d_in) if Need.ABS_MAX in need else None
        self._sums = torch.zeros(d_in, dtype=torch.float64) if Need.ABS_MEAN in need else None
        self._range = torch.zeros(2, d_in) if Need.RANGE in need else None
        self._sample = torch.zeros(0, d_in) if Need.SAMPLE in need else None
        self._stride = 1

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Adds the rows of one call's input (…, d_in)."""
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        if not len(x):
            return
        if self._products is not None:
            self._products += x.T @ x
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
        self._n_tokens += len(x)

    def stats(self) -> Stats:
        """The statistics of all rows so far; zeros where there was none."""
        n = max(self._n_tokens, 1)
        hessian = None if self._products is None else (self._products / n).float()
        mean = None if self._sums is None else (self._sums / n).float()
        return Stats(self._n_tokens, hessian, self._maxima, mean, self._range, self._sample)

    def _keep(self, x: Tensor) -> None:
        """Every `stride`-th row of the whole stream, the stride doubling whenever they become too many."""
        assert self._sample is not None
        rows = x[-self._n_tokens % self._stride :: self._stride]
        self._sample = torch.cat([self._sample, rows])
        while len(self._sample) > N_SAMPLE:
            self._sample = self._sample[::2].clone()
            self._stride *= 2
