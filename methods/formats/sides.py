"""What a payload may hold beside the grid: elements and columns kept in 16 bits, low-rank corrections, rotations to be undone.

Each side is a few payload parts named `side.part`; `with_sides` applies all that are there, in a fixed order. The arithmetic is in
fp64 where it adds up, so that the fp32 result does not depend on how a product was split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Payload = Mapping[str, Tensor]

SIDE_DTYPE = torch.bfloat16
"""Values beside the grid are stored in bf16, as scales are."""


def plain(payload: Payload) -> bool:
    """Whether there is nothing beside the grid, so that a kernel of the format runs the whole weight."""
    return not any("." in part for part in payload)


def with_sides(dense: Tensor, payload: Payload) -> Tensor:
    """The weight (d_out, d_in) fp32 that a payload stands for, from what its grid decodes to. `dense` is not modified.

    Kept elements first, then low rank, then the rotation: both are in the basis in which the grid was fitted.
    """
    if "elements.value" in payload:
        dense = _with_elements(dense, payload)
    if "columns.value" in payload:
        dense = dense.index_copy(1, payload["columns.index"].long(), payload["columns.value"].float())
    if "low_rank.left" in payload:
        product = payload["low_rank.left"].double() @ payload["low_rank.right"].double()
        dense = (dense.double() + product).float()
    return dense


def elements(values: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Kept elements as compressed sparse rows; values: (d_out, d_in); kept: (d_out, d_in) bool.

    Parts: `elements.value` (n,) bf16, `elements.column` (n,) int16 (int32 above 32,767 inputs), `elements.start` (d_out + 1,) int32.
    """
    counts = kept.sum(1)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    narrow = torch.int16 if kept.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    column = kept.nonzero()[:, 1].to(narrow)
    return {"elements.value": values[kept].to(SIDE_DTYPE), "elements.column": column, "elements.start": start}


def columns(values: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Whole columns kept; values: (d_out, d_in); index: (n,). Parts: `columns.value` (d_out, n) bf16, `columns.index` (n,) int32."""
    return {"columns.value": values[:, index].to(SIDE_DTYPE), "columns.index": index.to(torch.int32)}


def low_rank(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """A correction `left @ right`; left: (d_out, r), right: (r, d_in), stored in bf16."""
    return {"low_rank.left": left.to(SIDE_DTYPE), "low_rank.right": right.to(SIDE_DTYPE)}


def _with_elements(dense: Tensor, payload: Payload) -> Tensor:
    start = payload["elements.start"].long()
    rows = torch.repeat_interleave(torch.arange(len(start) - 1), start.diff())
    result = dense.clone()
    result[rows, payload["elements.column"].long()] = payload["elements.value"].float()
    return result
