"""Groups of inputs with like ranges, which share a static scale: by k-means, or sorted and cut into equal parts."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100


def like_ranges(span: Tensor, clusters: int) -> Tensor:
    """k-means on each input's (min, max): labels (d_in,) int64 in [0, clusters); a label may be empty.

    span: (2, d_in), least and largest. Lloyd's rounds until no label changes, from inputs that stand at evenly spaced places when sorted
    by their largest magnitude: no seed, and one cluster is all inputs. RPTQ (Yuan 2023).
    """
    points = span.T.double()
    if clusters == 1:
        return torch.zeros(len(points), dtype=torch.int64)
    places = torch.linspace(0, len(points) - 1, clusters, dtype=torch.float64).round().long()
    centres = points[points.abs().amax(1).argsort(stable=True)[places]]
    labels = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        new = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if torch.equal(new, labels):
            break
        labels = new
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        counts = labels.bincount(minlength=clusters)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return labels


def sorted_ranges(span: Tensor, groups: int) -> Tensor:
    """Inputs sorted by max - min and cut into groups of equal size (to within one): labels (d_in,) int64, the narrowest first.

    span: (2, d_in), least and largest. PEG (Bondarenko 2021).
    """
    order = (span[1] - span[0]).argsort(stable=True)
    labels = torch.empty_like(order)
    labels[order] = torch.arange(len(order)) * groups // len(order)
    return labels


def range_of_label(span: Tensor, labels: Tensor) -> Tensor:
    """The range of each input's group, (2, d_in): every input of a label gets the least and the largest value of them all."""
    n_labels = int(labels.max()) + 1
    low = span.new_full((n_labels,), torch.inf).scatter_reduce_(0, labels, span[0], "amin")
    high = span.new_full((n_labels,), -torch.inf).scatter_reduce_(0, labels, span[1], "amax")
    return torch.stack([low[labels], high[labels]])
