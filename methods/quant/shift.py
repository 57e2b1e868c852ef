"""Moves the inputs of a site by an offset a channel, which its layers' biases undo, and divides them by a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.method import NormView, SiteView, Stats
from methods.quant.fold import Rows, change, fold, fold_shifted
from methods.quant.task import Change


def centre(span: Tensor) -> Tensor:
    """The middle of each input's range, (max + min) / 2; span: (2, d_in), least and largest -> (d_in,)."""
    return (span[0] + span[1]) / 2


def takes_shift(view: SiteView) -> bool:
    """Whether an offset of the inputs can be undone without a cost: the norm and every layer that reads it have a bias."""
    return view.norm is not None and view.norm.bias is not None and set(view.biases) == set(view.weights)


def move(view: SiteView, scale: Tensor, shift: Tensor | None = None, taker: NormView | Rows | None = None) -> Change:
    """The inputs become `(x - shift) / scale`, as nearly as it can be stored; the layers' outputs stay exactly what they are.

    scale: (d_in,) > 0; shift: (d_in,), None for zero. Where the site takes no shift, it is left out and the scale alone is folded.
    taker: what the scale folds into; None for the site's norm.
    """
    if not takes_shift(view):
        return change(view, fold(taker or view.fold_into, scale))
    folded = fold_shifted(view.fold_into, scale, torch.zeros_like(scale) if shift is None else shift)
    assert folded.shift is not None
    biases = {
        f"{name}.bias": (view.biases[name].double() + weight.double() @ folded.shift.double()).to(view.biases[name].dtype)
        for name, weight in view.weights.items()
    }
    moved = Shifted(folded.shift / folded.ratio)
    return Change(folded.ratio, {**folded.tensors, **biases}, dict.fromkeys(view.weights, moved))


@dataclass(frozen=True)
class Shifted:
    """The turn of a layer whose inputs are moved by `-shift` (d_in,): its weight stays, and its bias, not its payload, undoes it."""

    shift: Tensor

    def weight(self, weight: Tensor) -> Tensor:
        """The weight (d_out, d_in), as it is."""
        return weight

    def stats(self, stats: Stats) -> Stats:
        """The statistics of the moved inputs: range and sample, and the largest magnitudes where the range is there."""
        span = None if stats.range is None else stats.range - self.shift
        largest = None if span is None or stats.abs_max is None else span.abs().amax(0)
        sample = None if stats.sample is None else stats.sample - self.shift
        kept = replace(stats, range=span, abs_max=largest, sample=sample)
        return replace(kept, hessian=None, abs_mean=None, drift=None, fisher=None)

    def parts(self) -> Mapping[str, Tensor]:
        """Nothing: the payload is that of a plain grid."""
        return {}
