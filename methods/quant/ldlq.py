"""Rounder `ldlq`: rounds each column plus what the errors of the columns before it add to it, against the weight as it was."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.sides import SIDE_DTYPE
from methods.quant.feedback import BLOCK, RoundColumn, upper_factor
from methods.quant.task import Rounded


def ldlq(
    weight: Tensor,
    hessian: Tensor,
    round_column: RoundColumn,
    damping: float,
    order: Tensor,
    *,
    block: int = BLOCK,
    kept: Tensor | None = None,
) -> Rounded:
    """Codes (d_out, d_in) uint8 that keep `trace(E H E^T)` of the error E small, with H = hessian + damping * mean(diag) * I.

    weight, hessian, round_column, kept: as `feedback` has them; order: (d_in,), the columns, that to be rounded first in front.
    With `H = (U + I) D (U + I)^T`, U strictly upper triangular in this order, column k becomes `Q(W_k + (W - Q)_{<k} U_{<k, k})`.
    In exact arithmetic these are the codes of `feedback` in the same order, without the inverse of a factor.
    QuIP (Chee 2023), equation 2 and theorem 6; from the last column to the first, as published, where `order` counts down.
    """
    d_in = len(order)
    factor = upper_factor(hessian[order][:, order], damping)
    unit = (factor / factor.diagonal()).to(weight.dtype)
    original = weight.T[order]
    columns, codes, held = original.clone(), torch.empty_like(original), None if kept is None else kept.T[order]
    values = torch.empty_like(original)
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        for i in range(start, stop):
            codes[i], value = round_column(columns[i], int(order[i]))
            if held is not None:
                value = torch.where(held[i], columns[i].to(SIDE_DTYPE).to(value.dtype), value)
            values[i] = value
            columns[i + 1 : stop].addr_(unit[i, i + 1 : stop], original[i] - value)
        columns[stop:].addmm_(unit[start:stop, stop:].T, original[start:stop] - values[start:stop])
    back = order.argsort()
    return Rounded(codes[back].T.to(torch.uint8).contiguous(), None if kept is None else values[back].T.float().contiguous())
