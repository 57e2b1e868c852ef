"""The loss predictor: from a policy's features to its KL divergence, with intervals, and its honest report on unseen policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from methods.policy import Policy
from predictors.features import Features
from predictors.intervals import Interval, conformal_half_width, spearman

Floats = NDArray[np.float64]
Kind = Literal["offset", "affine", "lightgbm"]

MIN_TREES = 16
"""Records from which trees are tried on the residual of the calibrated score."""

_MIN_AFFINE = 3
_N_BAGS = 10
_N_FOLDS = 5
_SLOPE_PRIOR = 0.5  # squared ratio of the noise of log KL (about 0.2) to the prior spread of the slope around 1 (about 0.3)
_PAYS = 0.98
_UNKNOWN = 0.5  # standard deviation of log KL assumed where fewer than 2 records are known
_BAND = 0.03


@dataclass(frozen=True)
class Record:
    """A policy with its true KL divergence in nats per token, above 0, all records on the same tokens."""

    policy: Policy
    kl: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.kl) and self.kl > 0):
            raise ValueError(
                f"loss record: kl={self.kl} of {self.policy.key()}; needs a positive number (leave the dense model out)"
            )


@dataclass(frozen=True)
class PredictorReport:
    """How good a predictor is on policies that it never saw.

    spearman: rank correlation of predicted and true KL; spearman_score: the same of the raw additive score, the bar to beat;
    spearman_in_bands: mean within bands of +-3 % kernel time that hold 4 policies or more, weighted by their number, None where there
    is none; mae_log: mean absolute error of log KL (0.1 is about ten per cent); coverage: share of true values inside the
    intervals, which promise `promised`; kinds: which predictor each fold chose; pairs: (predicted, lower, upper, true) KL of each record.
    """

    n: int
    spearman: float | None
    spearman_score: float | None
    spearman_in_bands: float | None
    n_in_bands: int
    mae_log: float
    coverage: float
    promised: float
    kinds: tuple[Kind, ...]
    pairs: tuple[tuple[float, float, float, float], ...] = ()


class LossModel:
    """Log KL = calibrated log score, plus bagged trees on the features where cross-validation says that they pay.

    kind: `offset` (fewer than 3 records, or none: the score as it is), `affine` (log-log line, its slope shrunk to 1), `lightgbm`.
    Made by `fit_loss`.
    """

    def __init__(
        self, features: Features, kind: Kind, line: tuple[float, float, float], bags: Sequence[Any], unseen: Floats
    ) -> None:
        self.kind = kind
        self._features = features
        self._line = line
        self._bags = list(bags)
        self._unseen = unseen

    def predict_log(self, policies: Sequence[Policy]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of log KL, (n,) and (n,); the order that a search ranks by."""
        mean = _along(self._line, np.log(self._features.score(policies)))
        spread = float(np.sqrt(np.mean(self._unseen**2))) if len(self._unseen) else _UNKNOWN
        std = np.full(len(policies), spread)
        if self._bags:
            matrix = self._features.matrix(policies)
            residuals = np.stack([bag.predict(matrix, num_threads=1) for bag in self._bags])
            mean = mean + residuals.mean(axis=0)
            std = np.sqrt(std**2 + residuals.var(axis=0))
        return mean, std

    def predict(self, policies: Sequence[Policy], coverage: float = 0.9) -> list[Interval]:
        """KL in nats per token with conformal bounds, from residuals on records that were not fitted."""
        mean, _ = self.predict_log(policies)
        half = conformal_half_width(self._unseen, coverage) if len(self._unseen) > 1 else 2 * _UNKNOWN
        return [Interval(float(np.exp(m)), float(np.exp(m - half)), float(np.exp(m + half))) for m in mean]


def fit_loss(records: Sequence[Record], features: Features, seed: int = 0) -> LossModel:
    """The predictor fitted on all records; deterministic in the seed and in the set of records, whatever their order."""
    ordered = sorted(records, key=lambda record: (record.policy.key(), record.kl))
    if not ordered:
        return LossModel(features, "offset", (0.0, 0.0, 1.0), (), np.zeros(0))
    policies = [record.policy for record in ordered]
    x, y = np.log(features.score(policies)), np.log([record.kl for record in ordered])
    line = _fit_line(x, y)
    n = len(ordered)
    if n < _MIN_AFFINE:
        return LossModel(features, "offset", line, (), np.zeros(0))
    folds = _folds([policy.key() for policy in policies], min(n, 10), seed)
    unseen = np.zeros(n)
    for fold in np.unique(folds):
        test = folds == fold
        unseen[test] = y[test] - _along(_fit_line(x[~test], y[~test]), x[test]) if (~test).any() else y[test] - x[test]
    if n < MIN_TREES:
        return LossModel(features, "affine", line, (), unseen)
    matrix = features.matrix(policies)
    with_trees = _unseen_with_trees(matrix, x, y, [policy.key() for policy in policies], seed)
    if np.mean(with_trees**2) > _PAYS * np.mean(unseen**2):
        return LossModel(features, "affine", line, (), unseen)
    bags = _grow(matrix, y - _along(line, x), _N_BAGS, seed)
    return LossModel(features, "lightgbm", line, bags, with_trees)


def evaluate_unseen(
    records: Sequence[Record], features: Features, *, seed: int = 0, n_folds: int = _N_FOLDS, coverage: float = 0.9
) -> PredictorReport:
    """Cross-validation by policy: every policy is predicted by a model, choice of kind included, that never saw it.

    Raises ValueError on fewer than 6 different policies: a rank correlation of fewer says nothing.
    """
    ordered = sorted(records, key=lambda record: (record.policy.key(), record.kl))
    keys = [record.policy.key() for record in ordered]
    if len(set(keys)) < 6:
        raise ValueError(f"predictor: {len(set(keys))} different policies; evaluate at least 6 before its error can be told")
    folds = _folds(keys, n_folds, seed)
    found = np.zeros((len(ordered), 3))
    kinds: list[Kind] = []
    for fold in np.unique(folds):
        test = np.flatnonzero(folds == fold)
        model = fit_loss([record for record, own in zip(ordered, folds, strict=True) if own != fold], features, seed)
        kinds.append(model.kind)
        intervals = model.predict([ordered[i].policy for i in test], coverage)
        for i, interval in zip(test, intervals, strict=True):
            found[i] = interval.mean, interval.lo, interval.hi
    policies, kl = [record.policy for record in ordered], np.array([record.kl for record in ordered])
    mean, y = np.log(found[:, 0]), np.log(kl)
    in_bands, n_in_bands = _spearman_in_bands(features.latency_ms(policies), mean, y)
    return PredictorReport(
        n=len(set(keys)),
        spearman=spearman(mean, y),
        spearman_score=spearman(features.score(policies), y),
        spearman_in_bands=in_bands,
        n_in_bands=n_in_bands,
        mae_log=float(np.mean(np.abs(mean - y))),
        coverage=float(((found[:, 1] <= kl) & (kl <= found[:, 2])).mean()),
        promised=coverage,
        kinds=tuple(kinds),
        pairs=tuple((float(m), float(lo), float(hi), float(true)) for (m, lo, hi), true in zip(found, kl, strict=True)),
    )


def _spearman_in_bands(latency: Floats, predicted: Floats, true: Floats) -> tuple[float | None, int]:
    """Rank correlation where latency tells nothing: policies sorted into bands that are 6 % wide."""
    order = np.argsort(latency, kind="stable")
    found: list[tuple[float, int]] = []
    start = 0
    while start < len(order):
        top = latency[order[start]] * (1 + _BAND) / (1 - _BAND)
        end = int(np.searchsorted(latency[order], top, side="right"))
        band = order[start:end]
        value = spearman(predicted[band], true[band]) if len(band) >= 4 else None
        if value is not None:
            found.append((value, len(band)))
        start = max(end, start + 1)
    n = sum(size for _, size in found)
    return (sum(value * size for value, size in found) / n, n) if n else (None, 0)


def _fit_line(x: Floats, y: Floats) -> tuple[float, float, float]:
    """(mean of x, mean of y, slope): least squares with the slope shrunk to 1, which is what an exact additive score would have."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = 1 + float(dx @ (dy - dx)) / (float(dx @ dx) + _SLOPE_PRIOR)
    return float(x.mean()), float(y.mean()), max(slope, 0.1)


def _along(line: tuple[float, float, float], x: Floats) -> Floats:
    at, height, slope = line
    return height + slope * (x - at)


def _folds(keys: Sequence[str], n_folds: int, seed: int) -> NDArray[np.intp]:
    """A fold for each record; records of one policy share theirs."""
    unique = sorted(set(keys))
    place = np.random.default_rng(seed).permutation(len(unique)) % n_folds
    fold = dict(zip(unique, place, strict=True))
    return np.array([fold[key] for key in keys], dtype=np.intp)


def _unseen_with_trees(matrix: Floats, x: Floats, y: Floats, keys: Sequence[str], seed: int) -> Floats:
    """Residuals of log KL on records left out of both the line and the trees."""
    folds = _folds(keys, _N_FOLDS, seed)
    residuals = np.zeros(len(y))
    for fold in np.unique(folds):
        test, train = folds == fold, folds != fold
        line = _fit_line(x[train], y[train])
        bags = _grow(matrix[train], y[train] - _along(line, x[train]), 3, seed)
        added = np.mean([bag.predict(matrix[test], num_threads=1) for bag in bags], axis=0)
        residuals[test] = y[test] - _along(line, x[test]) - added
    return residuals


def _grow(matrix: Floats, residual: Floats, n_bags: int, seed: int) -> list[Any]:
    """Small boosted trees on bootstrap samples; one thread, so that equal seeds give equal trees."""
    import lightgbm  # slow to import, and needed only once there are records enough

    generator = np.random.default_rng(seed)
    options = {
        "objective": "regression",
        "learning_rate": 0.08,
        "num_leaves": 4,
        "min_data_in_leaf": 3,
        "feature_fraction": 0.7,
        "lambda_l2": 1.0,
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "max_bin": 63,
        "min_data_in_bin": 1,
    }
    bags = []
    for bag in range(n_bags):
        rows = generator.integers(0, len(residual), size=len(residual))
        data = lightgbm.Dataset(matrix[rows], residual[rows], params={"verbosity": -1, "max_bin": 63, "min_data_in_bin": 1})
        bags.append(lightgbm.train({**options, "seed": seed + bag}, data, num_boost_round=60))
    return bags
