"""What a kernel takes at a shape that was not timed: a fitted count of bytes and products, and trees on what that leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from predictors.intervals import Interval, conformal_half_width, spearman

Floats = NDArray[np.float64]

MIN_SHAPES = 4
"""Different weights (n, k) that a kernel has to be timed on before another one is predicted."""
_MIN_TREES = 40
_PAYS = 0.95  # trees have to lower the error at unseen shapes by this factor
_NOISE = 0.01  # an error of one per cent is that of the timings themselves
_ROUNDS = 80


@dataclass(frozen=True)
class Cell:
    """A timing: `kernel` under `format`, x (m, k) times a weight (n, k), median ms > 0."""

    kernel: str
    format: str
    m: int
    n: int
    k: int
    ms: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.n, self.k


@dataclass(frozen=True)
class Unseen:
    """How good the model is at weights that it never saw, each shape left out in turn.

    n: cells; mae_log: mean absolute error of log ms (0.1 is about ten per cent); coverage: share inside intervals that promise
    `promised`; spearman: mean rank correlation of the formats of a cell (m, n, k), the fastest kernel of each, and the least one; nan
    where no cell has three formats; trees: whether they stand in the model of all cells.
    """

    n: int
    mae_log: float
    coverage: float
    promised: float
    spearman: float
    least_spearman: float
    trees: bool


class CellModel:
    """Log ms of a cell = log of its analytic model, `a + b nk + c mnk + d m(n + k)` with a, b, c, d >= 0 of its kernel and format, plus
    boosted trees on shape and kernel where unseen shapes say that these pay. Made by `fit_cells`.
    """

    def __init__(self, lines: Mapping[tuple[str, str], Floats], trees: Any, names: Sequence[str], unseen: Floats) -> None:
        self._lines, self._trees, self._names, self._unseen = dict(lines), trees, list(names), unseen

    @property
    def has_trees(self) -> bool:
        """Whether trees stand in it."""
        return self._trees is not None

    def knows(self, kernel: str, fmt: str) -> bool:
        """Whether it was timed on enough weights to be predicted at others."""
        return (kernel, fmt) in self._lines

    def predict(self, kernel: str, fmt: str, m: int, n: int, k: int, coverage: float = 0.9) -> Interval:
        """ms, with conformal bounds from residuals at shapes that were not fitted.

        Raises ValueError for a kernel and format that were timed on fewer than `MIN_SHAPES` weights, or not at all.
        """
        cell = Cell(kernel, fmt, m, n, k, 1.0)
        if (kernel, fmt) not in self._lines:
            raise ValueError(
                f"{kernel} with {fmt} was timed on fewer than {MIN_SHAPES} weights, too few to predict another; time it on more"
            )
        log = float(self._logs([cell])[0])
        half = conformal_half_width(self._unseen, coverage)
        return Interval(float(np.exp(log)), float(np.exp(log - half)), float(np.exp(log + half)))

    def _logs(self, cells: Sequence[Cell]) -> Floats:
        base = _analytic_logs(self._lines, cells)
        return base if self._trees is None else base + self._trees.predict(_matrix(cells, self._names), num_threads=1)


def fit_cells(cells: Sequence[Cell], seed: int = 0) -> CellModel:
    """The model fitted on all cells of kernels that were timed on enough weights; deterministic in the seed.

    Raises ValueError where there is no such kernel, or a time is not positive.
    """
    usable = _usable(cells)
    lines = _lines(usable)
    names = sorted({cell.kernel for cell in usable})
    found = {with_trees: _left_out(usable, names, seed, with_trees=with_trees) for with_trees in (False, True)}
    error = {kind: float(np.sqrt(np.mean(residuals**2))) for kind, residuals in found.items()}
    pays = len(usable) >= _MIN_TREES and error[False] > _NOISE and error[True] < _PAYS * error[False]
    trees = _grow(usable, lines, names, seed) if pays else None
    return CellModel(lines, trees, names, found[pays])


def evaluate_shapes(cells: Sequence[Cell], seed: int = 0, coverage: float = 0.9) -> Unseen:
    """Every weight's cells predicted by a model, choice of trees included, that never saw a cell of this weight."""
    usable = _usable(cells)
    logs, inside = np.zeros(len(usable)), np.zeros(len(usable), dtype=bool)
    true = np.log([cell.ms for cell in usable])
    for shape in sorted({cell.shape for cell in usable}):
        rest = [cell for cell in usable if cell.shape != shape]
        model = fit_cells(rest, seed)
        for i, cell in enumerate(usable):
            if cell.shape == shape:
                interval = model.predict(cell.kernel, cell.format, cell.m, cell.n, cell.k, coverage)
                logs[i], inside[i] = np.log(interval.mean), interval.lo <= cell.ms <= interval.hi
    ranks = _format_ranks(usable, logs)
    return Unseen(
        n=len(usable),
        mae_log=float(np.abs(logs - true).mean()),
        coverage=float(inside.mean()),
        promised=coverage,
        spearman=float(np.mean(ranks)) if ranks else float("nan"),
        least_spearman=float(np.min(ranks)) if ranks else float("nan"),
        trees=fit_cells(usable, seed).has_trees,
    )


def _usable(cells: Sequence[Cell]) -> list[Cell]:
    wrong = [cell for cell in cells if not (np.isfinite(cell.ms) and cell.ms > 0)]
    if wrong:
        raise ValueError(f"kernel times: {wrong[0]} is not positive; time it again")
    shapes: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for cell in cells:
        shapes.setdefault((cell.kernel, cell.format), set()).add(cell.shape)
    # One shape more than a prediction needs, so that each can be left out.
    usable = [cell for cell in cells if len(shapes[cell.kernel, cell.format]) > MIN_SHAPES]
    if not usable:
        raise ValueError(f"kernel times: no kernel was timed on more than {MIN_SHAPES} weights; time a plan of shapes first")
    return sorted(usable, key=lambda cell: (cell.kernel, cell.format, cell.n, cell.k, cell.m))


def _terms(cells: Sequence[Cell]) -> Floats:
    """(len(cells), 4): launch, bytes of the weight, products, bytes of inputs and outputs, in units that keep numbers near 1."""
    shape = np.array([[cell.m, cell.n, cell.k] for cell in cells], dtype=np.float64)
    m, n, k = shape.T
    return np.stack([np.ones(len(cells)), n * k / 1e6, m * n * k / 1e9, m * (n + k) / 1e6], axis=1)


def _lines(cells: Sequence[Cell]) -> dict[tuple[str, str], Floats]:
    """The analytic model of every kernel and format, least squares of relative errors over non-negative coefficients."""
    found = {}
    for key, own in groupby(cells, key=lambda cell: (cell.kernel, cell.format)):
        group = list(own)
        ms = np.array([cell.ms for cell in group])
        found[key] = nnls(_terms(group) / ms[:, None], np.ones(len(group)))[0]
    return found


def _analytic_logs(lines: Mapping[tuple[str, str], Floats], cells: Sequence[Cell]) -> Floats:
    terms = _terms(cells)
    times = np.array([row @ lines[cell.kernel, cell.format] for cell, row in zip(cells, terms, strict=True)])
    logs: Floats = np.log(np.maximum(times, 1e-9))
    return logs


def _matrix(cells: Sequence[Cell], names: Sequence[str]) -> Floats:
    index = {name: place for place, name in enumerate(names)}
    rows = [
        [np.log(c.m), np.log(c.n), np.log(c.k), np.log(c.n * c.k), np.log(c.n / c.k), index[c.kernel], c.n % 64, c.k % 256]
        for c in cells
    ]
    return np.array(rows, dtype=np.float64)


def _left_out(cells: Sequence[Cell], names: Sequence[str], seed: int, *, with_trees: bool) -> Floats:
    """Residuals of log ms, each weight's shape predicted from the others."""
    residuals = np.zeros(len(cells))
    for shape in sorted({cell.shape for cell in cells}):
        test = [i for i, cell in enumerate(cells) if cell.shape == shape]
        rest = [cell for cell in cells if cell.shape != shape]
        lines = _lines(rest)
        own = [cells[i] for i in test]
        logs = _analytic_logs(lines, own)
        if with_trees:
            logs = logs + _grow(rest, lines, names, seed).predict(_matrix(own, names), num_threads=1)
        residuals[test] = np.log([cell.ms for cell in own]) - logs
    return residuals


def _grow(cells: Sequence[Cell], lines: Mapping[tuple[str, str], Floats], names: Sequence[str], seed: int) -> Any:
    import lightgbm  # slow to import, and needed only where a table is fitted

    residual = np.log([cell.ms for cell in cells]) - _analytic_logs(lines, cells)
    options = {
        "objective": "regression",
        "learning_rate": 0.08,
        "num_leaves": 8,
        "min_data_in_leaf": 8,
        "lambda_l2": 1.0,
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "seed": seed,
    }
    data = lightgbm.Dataset(_matrix(cells, names), residual, categorical_feature=[5], params={"verbosity": -1})
    return lightgbm.train(options, data, num_boost_round=_ROUNDS)


def _format_ranks(cells: Sequence[Cell], logs: Floats) -> list[float]:
    """The rank correlation of predicted and true times over the formats of each (m, n, k) that has three, the fastest kernel each."""
    best: dict[tuple[int, int, int], dict[str, tuple[float, float]]] = {}
    for cell, log in zip(cells, logs, strict=True):
        formats = best.setdefault((cell.m, cell.n, cell.k), {})
        predicted, true = formats.get(cell.format, (np.inf, np.inf))
        formats[cell.format] = (min(predicted, float(log)), min(true, cell.ms))
    found = []
    for formats in best.values():
        predicted_ms, true_ms = zip(*formats.values(), strict=True)
        value = spearman(predicted_ms, true_ms)
        if value is not None:
            found.append(value)
    return found
