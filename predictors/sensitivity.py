"""Sensitivity of the output distribution to every (site, decision): an output-space Fisher score, in nats per token.

A decision's first-order change of a KL-Fisher probe's scalar (`methods.gradients.Loss`, divergence) is a sample `a` with `E[a^2] / 2` =
the KL divergence to second order. No labels, no fitted constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from methods.gradients import Loss
from methods.method import NormView
from methods.model.structure import Site, Structure
from methods.statistics import Candidates, first_order


@dataclass(frozen=True)
class Scores:
    """Sensitivities. kl: nats per token by site and decision label, with the standard error of the mean over samples."""

    kl: Mapping[str, Mapping[str, float]]
    stderr: Mapping[str, Mapping[str, float]]
    n_probes: int
    n_tokens: int


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
    loss = Loss("divergence", n_probes, seed)
    samples = first_order(model, structure, [tokens], candidates, norm_of, loss, progress=progress)
    kl = {site: {label: float(a.square().mean() / 2) for label, a in own.items()} for site, own in samples.items()}
    stderr = {site: {label: _stderr(a.square() / 2) for label, a in own.items()} for site, own in samples.items()}
    return Scores(kl, stderr, n_probes, tokens.numel())


def _stderr(values: Tensor) -> float:
    return float(values.std()) / values.numel() ** 0.5 if values.numel() > 1 else float("nan")
