"""Channel disassembly, a large input becomes several equal parts, each with a copy of its column; and assembly, like inputs become one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.elements import largest
from methods.formats.format import Format
from methods.formats.numerics import decode, linear
from methods.formats.turns import turned
from methods.method import Need, SiteView, Stats
from methods.quant.incoherence import Rotation
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.site_error import few
from methods.quant.task import Change, Knobs, Task, statistic

_HALVINGS = 60


def copies(abs_max: Tensor, growth: float) -> tuple[Tensor, float]:
    """(T (d_in,) int64, theta): T_j = ceil(max|x_j| / theta), 1 at least, the parts into which each input is split.

    theta: the smallest threshold, found by halving, with at most (1 + growth) d_in parts in all; growth 0 splits nothing. Split inputs
    x_j / T_j, T_j of them, on copies of column j give the same outputs. abs_max: (d_in,). QLLM (Liu 2024), channel disassembly.
    """
    size, budget = abs_max.double(), int((1 + growth) * len(abs_max))

    def parts(theta: float) -> Tensor:
        return (size / theta).ceil().clamp(min=1).long()

    low, theta = 0.0, float(size.max())
    if theta == 0:
        return torch.ones_like(size, dtype=torch.int64), 0.0
    for _ in range(_HALVINGS):
        middle = (low + theta) / 2
        if middle > 0 and int(parts(middle).sum()) <= budget:
            theta = middle
        else:
            low = middle
    return parts(theta), theta


def by_disassembly(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """One fixed scale for the parts of all inputs; knob `growth`.

    Rounding each of T_j equal parts x_j / T_j with a step s is rounding x_j with the step T_j s, which is what the payload says: the
    weight keeps its width. Nothing where no token was met.
    """
    split, theta = copies(task.statistic(Need.ABS_MAX), task.number("growth"))
    scale = split * (theta / largest(task.fmt.act_element, task.fmt.act_bits))
    return {"act.scale": scale.float()} if theta else {}


def distances(weight: Tensor, sample: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What joining inputs costs, (n_first, n_second) fp64: `|x_i - x_j|^2 |w_i - w_j|^2 / 4`, summed over tokens and outputs.

    It is exact: `x_i w_i + x_j w_j - (x_i + x_j) / 2 (w_i + w_j) = (x_i - x_j) (w_i - w_j) / 2`. weight: (d_out, d_in); sample:
    (n, d_in); first, second: indices of inputs. QLLM (Liu 2024), channel assembly.
    """
    return _apart(sample, first, second) * _apart(weight, first, second) / 4


def similar_pairs(cost: Tensor, n: int) -> Tensor:
    """Bipartite matching: n disjoint pairs (2, n) of a row and a column, each time the cheapest of those left.

    cost: (n_rows, n_columns), of which n is at most the smaller.
    """
    cost = cost.clone()
    least, mate = cost.min(1)
    pairs = []
    for _ in range(n):
        row = int(least.argmin())
        column = int(mate[row])
        pairs.append((row, column))
        cost[row], cost[:, column] = torch.inf, torch.inf
        # Of the rows whose mate this was, the taken one finds nothing but infinity.
        stale = (mate == column).nonzero()[:, 0]
        least[stale], mate[stale] = cost[stale].min(1)
    return torch.tensor(pairs, dtype=torch.int64).view(n, 2).T


def reassembled(weight: Tensor, abs_max: Tensor, sample: Tensor, growth: float) -> Tensor:
    """The part `turn.slots` (3, n) int32 (`methods.formats.slots`): inputs split by `copies`, and a pair of others joined for every copy.

    growth: at most 1/3, so that there are inputs enough to be joined; half of those that were not split are joined into the other half.
    weight: (d_out, d_in); sample: (n, d_in).
    """
    split, _ = copies(abs_max, growth)
    added = torch.repeat_interleave(torch.arange(len(split)), split - 1)
    whole = (split == 1).nonzero()[:, 0]
    first, second = whole[::2], whole[1::2]
    rows, columns = similar_pairs(distances(weight, sample, first, second), len(added)) if len(added) else added.expand(2, 0)
    return torch.stack([first[rows], second[columns], added]).to(torch.int32)


def by_reassembly(view: SiteView, stats: Mapping[str, Stats], fmt: Format, knobs: Knobs) -> Change:
    """Inputs split and others joined, so that the width stays; the threshold of the splits is that of the least output error.

    Knobs: `growth`, the most by which splits alone would widen the layer; `steps`, how many parts of it are tried beside none. The error
    is that of sampled outputs with weights (min-max, to nearest) and inputs rounded: never above that of plain rounding there. Layers
    that share their inputs are split alike. QLLM (Liu 2024); its low-rank error correction, which needs training, is left out.
    """
    together: dict[int, list[str]] = {}
    for name in view.weights:
        together.setdefault(id(stats[name]), []).append(name)
    turns: dict[str, Rotation] = {}
    for names in together.values():
        own = stats[names[0]]
        abs_max, sample = (statistic(own, names[0], need) for need in (Need.ABS_MAX, Need.SAMPLE))
        weight = torch.cat([view.weights[name] for name in names])
        slots = _best(weight, abs_max, sample, fmt, knobs)
        if slots.shape[1]:
            turns |= dict.fromkeys(names, Rotation({"turn.slots": slots}))
    return Change(turns=turns)


def _best(weight: Tensor, abs_max: Tensor, sample: Tensor, fmt: Format, knobs: Knobs) -> Tensor:
    growth, steps = float(knobs["growth"]), int(knobs["steps"])
    if not len(sample):
        growth = 0.0
    some = few(sample)
    wanted = some @ weight.T

    def error(slots: Tensor) -> float:
        parts = {"turn.slots": slots}
        inner = turned(weight, parts).to(weight.dtype)
        payload = {**nearest(inner, fmt, minmax(inner, fmt)), **parts}
        outputs = linear(some, decode(fmt, payload), fmt, payload=payload)
        return float((outputs - wanted).square().sum(dtype=torch.float64))

    ratios = [growth * step / steps for step in range(steps + 1)] if growth else [0.0]
    return min((reassembled(weight, abs_max, sample, ratio) for ratio in ratios), key=error)


def _apart(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Squared distances between columns: (n_first, n_second) fp64, since those of like columns cancel."""
    a, b = rows[:, first].double(), rows[:, second].double()
    squares = a.square().sum(0)[:, None] + b.square().sum(0)
    return (squares - 2 * a.T @ b).clamp_(min=0)
