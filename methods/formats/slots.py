"""Inputs taken apart and joined within the width of a layer: large ones in several slots, like ones two to a slot.

One part of a payload, `turn.slots` (3, n) int32, says it all: slot `[0, k]`, whose input is joined with that of slot `[1, k]`, holds a
copy of the column of input `[2, k]` instead. With E the 0/1 matrix of inputs by slots and N the diagonal of one over the entries of
E's columns, or over the copies of a split input, slots see `N E^T x` and the weight of slots is `W E`: the same outputs but for joined
inputs, which are replaced by their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_slots(rows: Tensor, slots: Tensor) -> Tensor:
    """Rows (…, d_in) -> rows E (…, d_in): joined entries are added, split ones repeated. The weight of the slots, row by row."""
    freed, into, split = slots.long()
    joined = rows.index_add(-1, into, rows[..., freed])
    return joined.index_copy(-1, freed, rows[..., split])


def from_slots(rows: Tensor, slots: Tensor) -> Tensor:
    """Rows (…, d_in) -> rows E^T (…, d_in): the slots of a split input are added, joined inputs get the same."""
    freed, into, split = slots.long()
    added = rows.index_add(-1, split, rows[..., freed])
    return added.index_copy(-1, freed, rows[..., into])


def shares(d_in: int, slots: Tensor) -> Tensor:
    """N's diagonal (d_in,) fp64: one over the slots of a slot's split input, or over the inputs joined in it."""
    freed, into, split = slots.long()
    count = torch.ones(d_in, dtype=torch.float64)
    count = count.index_add(0, split, torch.ones(len(split), dtype=torch.float64)).index_fill(0, into, 2.0)
    return count.index_copy(0, freed, count[split]).reciprocal()
