"""Moves a per-channel scale, and an offset, from the inputs of a site into its layers.

Through the norm before it, or through the rows of the linear that write its inputs, which take powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.formats.turns import POWER
from methods.method import NormView, SiteView, Stats
from methods.quant.task import Change, scaled

LARGEST_POWER = 15
"""Rows are multiplied by 2**15 at most, by which a weight of 1 stays a number of fp16."""


@dataclass(frozen=True)
class Rows:
    """The rows of a linear that write a site's inputs; row: (d_in,) int64, that of each; largest: (d_in,), of an input's magnitudes."""

    row: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Fold:
    """ratio: (d_in,), by what the site's inputs are divided and its columns multiplied; tensors: the norm's new parameters.

    shift: (d_in,), what is subtracted from the inputs before; None for nothing. In fp32, or in fp64 where the norm is.
    power: (d_in,) int8, with ratio = 2**-power, where rows take it.
    """

    ratio: Tensor
    tensors: Mapping[str, Tensor]
    shift: Tensor | None = None
    power: Tensor | None = None


@dataclass(frozen=True)
class Powers:
    """The turn of a layer whose inputs are multiplied by 2**power; power: (d_in,) int8."""

    power: Tensor

    @property
    def _ratio(self) -> Tensor:
        return torch.exp2(-self.power.float())

    def weight(self, weight: Tensor) -> Tensor:
        """(d_out, d_in) -> (d_out, d_in), columns divided."""
        return weight * self._ratio

    def stats(self, stats: Stats) -> Stats:
        """All of them."""
        return scaled(stats, self._ratio)

    def parts(self) -> Mapping[str, Tensor]:
        """The powers."""
        return {POWER: self.power}


def into(view: SiteView, largest: Tensor) -> NormView | Rows:
    """What takes a site's scale: its norm, or the rows that feed it; largest: (d_in,), its inputs' largest magnitudes.

    Raises ValueError where it has neither.
    """
    feed = view.site.feed
    if view.norm is not None or feed is None:
        return view.fold_into
    return Rows(torch.tensor(feed.rows(view.site.d_in)), largest)


def change(view: SiteView, folded: Fold) -> Change:
    """What a transform gives that folds a scale and no offset."""
    if folded.power is None:
        return Change(folded.ratio, folded.tensors)
    return Change(turns=dict.fromkeys(view.weights, Powers(folded.power)) if bool(folded.power.any()) else {})


def fold(taker: NormView | Rows, scale: Tensor) -> Fold:
    """Divides the inputs of a site by `scale` (d_in,) > 0, as nearly as what takes it can."""
    return fold_rows(taker, scale) if isinstance(taker, Rows) else fold_norm(taker, scale)


def fold_rows(rows: Rows, scale: Tensor) -> Fold:
    """The nearest powers of two, the same for all inputs that one row writes: the geometric mean of their scales.

    Scales count relative to their largest, so that rows are multiplied and never divided: what fp16 and 8-bit exponents store at their
    lower end stays exact. And no input becomes larger than the largest one, which low precision of what runs between might not bear.
    """
    n = int(rows.row.max()) + 1
    count = torch.bincount(rows.row, minlength=n)
    log = torch.zeros(n, dtype=torch.float64).index_add(0, rows.row, scale.double().log2()) / count.clamp(min=1)
    peak = torch.zeros(n, dtype=torch.float64).scatter_reduce(0, rows.row, rows.largest.double(), "amax")[rows.row]
    room = (peak.max() / peak).log2().floor().nan_to_num(0.0, posinf=LARGEST_POWER)
    power = (log[rows.row].max() - log[rows.row]).round()
    power = torch.minimum(power, room).clamp(0, LARGEST_POWER).to(torch.int8)
    return Fold(torch.exp2(-power.float()), {}, power=power)


def fold_norm(norm: NormView, scale: Tensor) -> Fold:
    """Divides the norm's output by `scale` (d_in,) > 0, as nearly as its stored dtype can.

    The new weight is rounded first and `ratio` is that of what is stored, so that columns times `ratio` undo it exactly. A channel
    stays as it is where that is impossible: its weight is or becomes zero, or its bias does not come back bit for bit. Channels with a
    bias take the nearest power of two, by which weight and bias divide without rounding.
    """
    weight = gain(norm)
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.to(weight.dtype)
    divisor = torch.where(bias == 0, scale.to(weight.dtype), torch.exp2(scale.to(weight.dtype).log2().round()))
    new_weight = (weight / divisor - norm.unit_offset).to(norm.weight.dtype)
    ratio = weight / (new_weight.to(weight.dtype) + norm.unit_offset)
    new_bias = (bias / ratio).to(norm.weight.dtype if norm.bias is None else norm.bias.dtype)
    # False, too, where the ratio is NaN or infinite because the weight was or has become zero.
    exact = new_bias.to(weight.dtype) * ratio == bias
    tensors = {f"{norm.name}.weight": torch.where(exact, new_weight, norm.weight)}
    if norm.bias is not None:
        tensors[f"{norm.name}.bias"] = torch.where(exact, new_bias, norm.bias)
    return Fold(torch.where(exact, ratio, torch.ones_like(ratio)), tensors)


def fold_shifted(norm: NormView, scale: Tensor, shift: Tensor) -> Fold:
    """Makes the output `y` of a norm that has a bias `(y - shift) / scale`, as nearly as its stored dtypes can.

    scale: (d_in,) > 0; shift: (d_in,). What the norm loses to rounding, in its weight and in its bias, is in the `ratio` and the `shift`
    that come back: the layers' columns take the one and their biases the other. No channel needs a power of two; one whose weight is or
    becomes zero keeps its scale. Raises ValueError where the norm has no bias.
    """
    if norm.bias is None:
        raise ValueError(f"{norm.name} has no bias that could take a shift; fold the scale alone")
    weight = gain(norm)
    bias = norm.bias.to(weight.dtype)
    new_weight = (weight / scale.to(weight.dtype) - norm.unit_offset).to(norm.weight.dtype)
    ratio = weight / (new_weight.to(weight.dtype) + norm.unit_offset)
    possible = torch.isfinite(ratio) & (ratio != 0)
    ratio = torch.where(possible, ratio, torch.ones_like(ratio))
    new_bias = ((bias - shift.to(weight.dtype)) / ratio).to(norm.bias.dtype)
    tensors = {f"{norm.name}.weight": torch.where(possible, new_weight, norm.weight), f"{norm.name}.bias": new_bias}
    return Fold(ratio, tensors, bias - new_bias.to(weight.dtype) * ratio)


def gain(norm: NormView) -> Tensor:
    """What the norm multiplies by, (d_in,): its weight with the unit offset, in fp32 or, where it is stored so, in fp64."""
    return norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32)) + norm.unit_offset
