"""Algebra that several families share."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 128
_ROWS = 4096


class Gram:
    """The sum of `x^T x` over batches of rows: products in fp32 of 4,096 rows, a few more where a batch is longer, sums of them in fp64.

    Only what lies on and above the diagonal is computed, in strips: half the work of the whole product.
    """

    def __init__(self, d: int) -> None:
        self._sum = torch.zeros(d, d, dtype=torch.float64)
        self._part = torch.zeros(d, d)
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Adds the rows of a batch (n, d), fp32."""
        for rows in torch.split(x, _ROWS):
            for start in range(0, x.shape[1], _STRIP):
                strip = rows[:, start : start + _STRIP]
                self._part[start : start + _STRIP, start:].addmm_(strip.T, rows[:, start:])
            self._rows += len(rows)
            if self._rows >= _ROWS:
                self._settle()

    def mean(self, n: int) -> Tensor:
        """The sum divided by `n`, (d, d) fp32, symmetric."""
        self._settle()
        result = torch.div(self._sum, n, out=torch.empty_like(self._part)).triu_()
        return result.add_(result.triu(1).T)

    def _settle(self) -> None:
        self._sum += self._part
        self._part.zero_()
        self._rows = 0
