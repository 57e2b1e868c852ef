"""Transforms `incoherence` and `block-hadamard`: random and fixed rotations around single weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.turns import turned, turned_inputs
from methods.hadamard import random_orthogonal
from methods.method import Need, SiteView, Stats
from methods.quant.grid import Grid, fit_in_chunks, grouped, range_grid
from methods.quant.task import Change, Knobs, Task, statistic
from methods.recipes.rotation import block_of, factors

RANGE = 2.4
"""QuIP's grid reaches this many root mean squares."""
_LARGEST_RATIO = 1e3


@dataclass(frozen=True)
class Rotation:
    """A turn that its payload parts describe (`methods.formats.turns`)."""

    own: Mapping[str, Tensor]

    def weight(self, weight: Tensor) -> Tensor:
        """(d_out, d_in) -> (d_out, d_in), turned."""
        return turned(weight, self.own).to(weight.dtype)

    def stats(self, stats: Stats) -> Stats:
        """Those of the turned inputs: second moments and samples turn; maxima, means and gradients do not carry over."""
        return replace(
            stats,
            hessian=self._moment(stats.hessian),
            drift=self._moment(stats.drift),
            sample=self._rows(stats.sample),
            first=self._rows(stats.first),
            first_drift=self._rows(stats.first_drift),
            abs_max=None,
            abs_mean=None,
            range=None,
            fisher=None,
        )

    def parts(self) -> Mapping[str, Tensor]:
        """The payload parts."""
        return self.own

    def _rows(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else turned_inputs(rows, self.own).to(rows.dtype)

    def _moment(self, moment: Tensor | None) -> Tensor | None:
        """V diag(1/s) M diag(1/s) V^T."""
        if moment is None:
            return None
        half = turned_inputs(moment, self.own)
        return turned_inputs(half.T, self.own).T.to(moment.dtype)


def by_incoherence(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """Random Kronecker rotations of both sides of every weight, and the rescaling before them where it is asked for.

    QuIP (Chee 2023), algorithm 1. Deviation: no permutations, since a Kronecker product of dense rotations mixes all channels already.
    """
    turns: dict[str, Rotation] = {}
    for name, weight in view.weights.items():
        parts: dict[str, Tensor] = {}
        if knobs["rescale"]:
            parts["turn.ratio"] = rescaling(weight, statistic(stats[name], name, Need.HESSIAN))
        if knobs["rotate"]:
            parts |= kronecker_turn(len(weight), weight.shape[1], int(knobs["seed"]))
        if parts:
            turns[name] = Rotation(parts)
    return Change(turns=turns)


def by_block_hadamard(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """A Hadamard matrix in every block of inputs; blocks of 1 are no turn."""
    block = block_of(view.site.d_in, knobs)
    own = {"turn.block": torch.tensor([block], dtype=torch.int32)}
    return Change(turns=dict.fromkeys(view.weights, Rotation(own)) if block > 1 else {})


def kronecker_turn(d_out: int, d_in: int, seed: int) -> dict[str, Tensor]:
    """Random orthogonal factors of both sides; weights of one width share their side of the inputs."""
    parts = {}
    for side, n in (("left", d_out), ("right", d_in)):
        generator = torch.Generator().manual_seed(seed + (n << 1) + (side == "left"))
        for factor, size in zip("ab", factors(n), strict=True):
            parts[f"turn.{side}_{factor}"] = random_orthogonal(size, generator).float()
    return parts


def rescaling(weight: Tensor, hessian: Tensor) -> Tensor:
    """s (d_in,) bf16, by which columns are multiplied and inputs divided: `(diag H / diag W^T W)^(1/4)`, of geometric mean 1.

    QuIP (Chee 2023), section 4.1; 1 where an input was never seen or its column is zero.
    """
    h, w = hessian.diagonal().double(), weight.double().square().sum(0)
    known = (h > 0) & (w > 0)
    log = torch.where(known, (h / w).log() / 4, torch.zeros_like(h)).nan_to_num(0.0)
    centred = torch.where(known, log - log[known].mean() if bool(known.any()) else log, torch.zeros_like(log))
    return centred.exp().clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO).to(torch.bfloat16)


def by_rms(task: Task) -> Grid:
    """The grid from -2.4 to 2.4 root mean squares of the whole weight, whose entries are near to Gaussian once it is incoherent.

    QuIP (Chee 2023), section 5. Deviation: our symmetric grids have one value more on one side.
    """
    reach = RANGE * float(task.weight.double().square().mean().sqrt())

    def fit(rows: Tensor) -> Grid:
        low = torch.full_like(grouped(rows, task.fmt)[..., 0], -reach)
        return range_grid(low, -low, task.fmt)

    return fit_in_chunks(task.weight, fit)
