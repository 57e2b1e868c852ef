"""Rounder `greedy`: moves codes one column at a time to where the layer's output error is least, all others staying as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from methods.formats.numerics import decode
from methods.formats.sides import SIDE_DTYPE
from methods.quant.feedback import BLOCK, RoundColumn, column_rounder
from methods.quant.first import hessian
from methods.quant.grid import Grid, payload
from methods.quant.task import Rounded, Task


def refine(task: Task, grid: Grid, rounded: Rounded, damping: float, passes: int) -> Rounded:
    """What another rounder gave, after `greedy` passes over it."""
    grid = grid if rounded.grid is None else rounded.grid
    values = decode(task.fmt, payload(rounded.codes, grid))
    if task.kept is not None:
        own = task.weight.to(SIDE_DTYPE).to(values.dtype) if rounded.values is None else rounded.values
        values = torch.where(task.kept, own, values)
    rounder = column_rounder(task.fmt, grid, task.weight.shape[1])
    return replace(
        rounded, codes=greedy(task.weight, rounded.codes, values, hessian(task), rounder, damping, passes, kept=task.kept)
    )


def greedy(
    weight: Tensor,
    codes: Tensor,
    values: Tensor,
    hessian: Tensor,
    round_column: RoundColumn,
    damping: float,
    passes: int,
    *,
    kept: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Codes (d_out, d_in) uint8 after at most `passes` passes over the columns; fewer where nothing moves any more.

    weight, values: (d_out, d_in), values being what the codes decode to, and those of `kept` elements, which never move.
    A move takes the grid's value nearest to the minimum over that element alone, and only where it is nearer than the present one, so
    that no pass makes `trace(E H E^T)` of the error E larger, with H = hessian + damping * mean(diag) * I.
    QuIP (Chee 2023), the greedy updates of its supplement: coordinate descent, here from the first column to the last.
    """
    d_in = len(hessian)
    identity = torch.eye(d_in, dtype=weight.dtype)
    h, original = hessian.to(weight.dtype) + damping * hessian.diagonal().mean() * identity, weight.T
    pivots = h.diagonal().tolist()
    found, current = codes.T.contiguous(), values.T.to(weight.dtype, copy=True)
    moves = torch.empty(min(block, d_in), len(weight), dtype=weight.dtype)
    for _ in range(passes):
        slope = h @ (current - original)
        before = found.clone()
        for start in range(0, d_in, block):
            stop = min(start + block, d_in)
            for i in range(start, stop):
                target = current[i] - slope[i] / pivots[i]
                code, value = round_column(target, i)
                better = (value - target).abs() < (current[i] - target).abs()
                better = better if kept is None else better & ~kept[:, i]
                moves[i - start] = torch.where(better, value - current[i], 0.0)
                current[i] = torch.where(better, value, current[i])
                found[i] = torch.where(better, code.to(found.dtype), found[i])
                slope[i + 1 : stop].addr_(h[i, i + 1 : stop], moves[i - start])
            slope[stop:].addmm_(h[stop:, start:stop], moves[: stop - start])
        if torch.equal(found, before):
            break
    return found.T.contiguous()
