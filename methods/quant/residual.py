"""Compensator `residual`: further terms of the same format, each for what the terms before left of the rows that need it most."""

from __future__ import annotations

from torch import Tensor

from methods.formats.numerics import decode
from methods.formats.sides import residual as stored
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.outliers import at_most, largest
from methods.quant.task import Task


def residual(task: Task, dense: Tensor) -> dict[str, Tensor]:
    """The payload parts of the terms after the first; knobs `terms`, with the first, and `rows`, the share that each stands for.

    dense: (d_out, d_in), what the first term decodes to. A term stands for the rows whose residual is largest when its turn comes.
    REx (Yvinec 2023), section 3: R_k = W - (what the k terms before stand for), the next term Q(R_k); group-sparse by rows.
    """
    parts: dict[str, Tensor] = {}
    n_rows = at_most(task.number("rows"), len(dense))
    for term in range(1, int(task.number("terms")) if n_rows else 1):
        error = task.weight - dense
        rows = largest(error.square().sum(1), n_rows).nonzero()[:, 0]
        payload = nearest(error[rows], task.fmt, minmax(error[rows], task.fmt))
        dense = dense.index_add(0, rows, decode(task.fmt, payload))
        parts.update(stored(term, rows, payload, task.fmt.bits))
    return parts
