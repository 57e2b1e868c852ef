"""The whole-model latency map: from the sum of the sites' kernel times to what a model really takes, with its own error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from methods.typed import Finite, NonNegative, Positive, Range, WrongValue, read
from predictors.intervals import Interval, conformal_half_width

Floats = NDArray[np.float64]

MIN_RUNS = 3
_PENALTIES = (1e-3, 1e-2, 1e-1)
_PAYS = 0.95  # an extra term has to lower the leave-one-out error by this factor, or it is not worth a coefficient
_FLOOR = 0.02  # relative: what policies differ by that the form cannot say, however well a run was measured
_VERSION = 1
_TITLE, _AGAIN = "latency model", "fit it again"


@dataclass(frozen=True)
class Run:
    """One whole-model measurement.

    sum_ms: the sites' kernel times, added up; features: other counts that may cost time (launches, format switches);
    measured_ms, lo, hi: median and interval of the model's latency, in ms.
    """

    policy_key: str
    sum_ms: float
    measured_ms: float
    lo: float
    hi: float
    features: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = (self.sum_ms, self.lo, self.measured_ms, self.hi, *self.features.values())
        if not np.isfinite(values).all() or self.sum_ms < 0 or not 0 < self.lo <= self.measured_ms <= self.hi:
            raise ValueError(f"latency run: {self}; needs finite numbers, sum_ms >= 0 and 0 < lo <= measured_ms <= hi")


@dataclass(frozen=True)
class LooError:
    """Relative error of leave-one-out predictions: 0.02 is two per cent."""

    mean: float
    max: float


@dataclass(frozen=True)
class LatencyModel:
    """`T = b0 + b1 * sum_ms + terms`, fitted on `runs`; terms: (feature, ms a unit), usually none.

    Valid near the runs it was fitted on: intervals grow with the distance from them, but the form stays linear.
    residuals: relative leave-one-out residuals, the choice of terms repeated without the run that is left out.
    """

    b0: Finite
    b1: Positive
    terms: tuple[tuple[str, Finite], ...]
    penalty: NonNegative
    coverage: Annotated[float, Range(0.01, 0.99)]
    runs: tuple[Run, ...]
    residuals: tuple[Finite, ...]

    @cached_property
    def _inverse(self) -> Floats:
        """Inverse normal matrix, for the leverage of a new point."""
        names = tuple(name for name, _ in self.terms)
        return _inverse(_weighted(self.runs, names)[0], self.penalty)

    @cached_property
    def _half_width(self) -> float:
        """Relative half-width at zero leverage; never below the measurements' own noise."""
        scaled = np.array(self.residuals) / np.sqrt(1 + np.array(_leverages(self.runs, self.terms, self.penalty)))
        noise = float(np.median([(run.hi - run.lo) / (2 * run.measured_ms) for run in self.runs]))
        return max(conformal_half_width(scaled, self.coverage), noise)

    @property
    def loo_error(self) -> LooError:
        """How far off a run's latency is when predicted from all the others."""
        absolute = np.abs(self.residuals)
        return LooError(float(absolute.mean()), float(absolute.max()))

    @property
    def range_ms(self) -> tuple[float, float]:
        """The kernel sums between which the model was fitted."""
        sums = [run.sum_ms for run in self.runs]
        return min(sums), max(sums)

    @property
    def formula(self) -> str:
        """The map in words: `1.21 ms + 1.04 x kernels + 0.0103 ms x switches`."""
        terms = "".join(f" + {value:.3g} ms x {name}" for name, value in self.terms)
        return f"{self.b0:.3g} ms + {self.b1:.3g} x kernels{terms}"

    def predict(self, sum_ms: float, features: Mapping[str, float] | None = None) -> Interval:
        """The latency of a model with this kernel sum, with an interval for one new measurement.

        features: must name every fitted term; raises ValueError otherwise.
        """
        row = self._row(sum_ms, features or {})
        mean = float(row @ [self.b0, self.b1, *(value for _, value in self.terms)])
        if mean <= 0:
            raise ValueError(
                f"latency model: {sum_ms:g} ms of kernels gives {mean:g} ms; it is outside of the fitted {self.range_ms}"
            )
        scaled = row / mean
        half = self._half_width * float(np.sqrt(1 + scaled @ self._inverse @ scaled)) * mean
        return Interval(mean, max(mean - half, 0.0), mean + half)

    def budget(self, target_ms: float, features: Mapping[str, float] | None = None) -> float:
        """The largest kernel sum whose *upper* bound meets the target; raises ValueError where fixed costs alone exceed it."""
        given = features or {}
        fixed = self.b0 + sum(value * given.get(name, 0.0) for name, value in self.terms)
        high = (target_ms - fixed) / self.b1
        low = max((1e-3 * target_ms - fixed) / self.b1, 0.0)
        if high <= low:
            raise ValueError(f"latency model: {target_ms:g} ms cannot be met, {fixed:g} ms pass without any of the kernels")
        grid = np.linspace(high, low, 200)  # from above: far from the runs the bound can rise again
        met = [k for k, sum_ms in enumerate(grid) if self.predict(float(sum_ms), features).hi <= target_ms]
        if not met:
            raise ValueError(
                f"latency model: no kernel sum surely meets {target_ms:g} ms; its error is {self.loo_error.mean:.1%}"
            )
        low, high = float(grid[met[0]]), float(grid[max(met[0] - 1, 0)])
        for _ in range(60):
            middle = (low + high) / 2
            if self.predict(middle, features).hi <= target_ms:
                low = middle
            else:
                high = middle
        return low

    def collapsed(self) -> tuple[LatencyModel, dict[str, float]]:
        """The same map in one number, where every feature is a part of the kernel sum, and by how much to scale each part for it.

        `T = b0 + b1 * sum + c * part` is `b0 + b1 * (sum + c / b1 * part)`: an additive cost, which solvers need. Residuals stay those
        of the full fit. Raises ValueError where a part would cost less than nothing.
        """
        scales = {name: 1 + value / self.b1 for name, value in self.terms}
        if any(scale <= 0 for scale in scales.values()):
            raise ValueError(f"latency model: scales {scales} are not positive; time the kernels again, undisturbed")
        runs = tuple(
            replace(run, sum_ms=run.sum_ms + sum((scales[name] - 1) * run.features[name] for name in scales), features={})
            for run in self.runs
        )
        return replace(self, terms=(), runs=runs), scales

    def _row(self, sum_ms: float, features: Mapping[str, float]) -> Floats:
        missing = [name for name, _ in self.terms if name not in features]
        if missing:
            raise ValueError(f"latency model: it was fitted with {missing}, which this policy's features lack")
        return np.array([1.0, sum_ms, *(features[name] for name, _ in self.terms)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `from_dict` reads it back."""
        runs = [{**vars(run), "features": dict(run.features)} for run in self.runs]
        plain = {"b0": self.b0, "b1": self.b1, "penalty": self.penalty, "coverage": self.coverage}
        return {
            "version": _VERSION,
            **plain,
            "terms": [list(t) for t in self.terms],
            "runs": runs,
            "residuals": list(self.residuals),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyModel:
        """Inverse of `to_dict`; raises ValueError on another version or a missing field."""
        if data.get("version") != _VERSION:
            raise ValueError(f"latency model: version {data.get('version')!r}, this program reads {_VERSION}; fit it again")
        found = read(cls, {name: value for name, value in data.items() if name != "version"}, _TITLE, _AGAIN)
        if not found.runs or len(found.residuals) != len(found.runs):
            n, m = len(found.runs), len(found.residuals)
            raise WrongValue(_TITLE, "residuals", f"expected one for each run, found {m} for {n} runs", _AGAIN)
        lacking = [name for name, _ in found.terms for run in found.runs if name not in run.features]
        if lacking:
            raise WrongValue(_TITLE, "terms", f"the runs lack {lacking[0]!r}", _AGAIN)
        return found


def fit_latency(runs: Sequence[Run], coverage: float = 0.9) -> LatencyModel:
    """Fits the map by least squares on relative errors, with an extra term only where leave-one-out says that it pays.

    A run that was disturbed, whose own interval is wide, counts less; its residual counts as any other's, since the next run may be
    disturbed as well.
    Extra terms are ridge-penalised, one at most for every four runs. Raises ValueError on fewer than 3 runs, on runs whose kernel
    sums do not differ, and where more kernel time does not mean more latency (the table is then not of this machine).
    """
    ordered = tuple(sorted(runs, key=lambda run: (run.policy_key, run.sum_ms, run.measured_ms)))
    sums = [run.sum_ms for run in ordered]
    if len(ordered) < MIN_RUNS or max(sums) - min(sums) <= 1e-6 * max(sums):
        raise ValueError(f"latency model: {len(ordered)} runs with kernel sums {sums[:5]} ms; needs {MIN_RUNS} that differ")
    if len({frozenset(run.features) for run in ordered}) > 1:
        raise ValueError(f"latency model: runs name different features: {[sorted(run.features) for run in ordered][:5]}")
    names, penalty = _chosen(ordered)
    residuals = []
    for k, run in enumerate(ordered):
        rest = ordered[:k] + ordered[k + 1 :]
        own_names, own_penalty = _chosen(rest)
        predicted = float(_design([run], own_names)[0] @ _solved(rest, own_names, own_penalty))
        residuals.append((run.measured_ms - predicted) / run.measured_ms)
    solved = _solved(ordered, names, penalty).tolist()
    if solved[1] <= 0:
        raise ValueError(
            f"latency model: b1={solved[1]:.3g}: more kernel time gave less latency; time the kernels again, undisturbed"
        )
    terms = tuple(zip(names, solved[2:], strict=True))
    return LatencyModel(solved[0], solved[1], terms, penalty, coverage, ordered, tuple(residuals))


def _chosen(runs: Sequence[Run]) -> tuple[tuple[str, ...], float]:
    """The extra terms and their penalty, added one by one while leave-one-out improves."""
    available = sorted(runs[0].features)
    names: tuple[str, ...] = ()
    penalty = _PENALTIES[0]
    best = _loo(runs, names, penalty)
    while len(names) < min(len(available), len(runs) // 4):
        trials = [((*names, name), p) for name, p in product(available, _PENALTIES) if name not in names]
        scored = [(_loo(runs, *trial), trial) for trial in trials]
        score, trial = min(scored, key=lambda item: item[0])
        if score > _PAYS * best:
            break
        best, (names, penalty) = score, trial
    return names, penalty


def _loo(runs: Sequence[Run], names: tuple[str, ...], penalty: float) -> float:
    """Root mean square relative leave-one-out residual, by the hat matrix."""
    matrix, target = _weighted(runs, names)
    hat = matrix @ _inverse(matrix, penalty) @ matrix.T
    residual = (target - hat @ target) / np.maximum(1 - np.diag(hat), 1e-9)
    return float(np.sqrt(np.mean(residual**2)))


def _leverages(runs: Sequence[Run], terms: tuple[tuple[str, float], ...], penalty: float) -> list[float]:
    """Each run's leverage in the fit on the others."""
    matrix, _ = _weighted(runs, tuple(name for name, _ in terms))
    found = []
    for k in range(len(runs)):
        rest = np.delete(matrix, k, axis=0)
        found.append(float(matrix[k] @ _inverse(rest, penalty) @ matrix[k]))
    return found


def _design(runs: Sequence[Run], names: tuple[str, ...]) -> Floats:
    return np.array([[1.0, run.sum_ms, *(run.features[name] for name in names)] for run in runs])


def _weighted(runs: Sequence[Run], names: tuple[str, ...]) -> tuple[Floats, Floats]:
    """Design and target, each row divided by its latency, so that errors are relative, and by how unsteady it was."""
    by = np.array([run.measured_ms for run in runs]) * _unsteadiness(runs)
    return _design(runs, names) / by[:, None], 1 / _unsteadiness(runs)


def _unsteadiness(runs: Sequence[Run]) -> Floats:
    """Each run's expected error relative to that of the median run: its own interval, and what no measurement can take away."""
    own = np.array([(run.hi - run.lo) / (2 * run.measured_ms) for run in runs])
    error: Floats = np.hypot(own, _FLOOR)
    return error / float(np.median(error))


def _inverse(matrix: Floats, penalty: float) -> Floats:
    """Inverse of the normal matrix; only extra terms are penalised, in units of their own column."""
    scale = np.sqrt((matrix**2).sum(axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    unit = matrix / scale
    ridge = np.diag([1e-12, 1e-12, *[penalty] * (matrix.shape[1] - 2)])
    inverse: Floats = np.linalg.inv(unit.T @ unit + ridge) / np.outer(scale, scale)
    return inverse


def _solved(runs: Sequence[Run], names: tuple[str, ...], penalty: float) -> Floats:
    matrix, target = _weighted(runs, names)
    solved: Floats = _inverse(matrix, penalty) @ (matrix.T @ target)
    return solved


def unit_slope(runs: Sequence[Run], coverage: float = 0.9) -> LatencyModel:
    """The map with `b1 = 1`: kernel time counts as itself, everything else is a constant.

    For models so small that noise hides the kernels' share, where `fit_latency` raises; the residuals say how coarse it is.
    """
    ordered = tuple(replace(run, features={}) for run in runs)
    rest = np.array([run.measured_ms - run.sum_ms for run in ordered])
    n = len(rest)
    residuals = tuple(float((rest[k] - (rest.sum() - rest[k]) / max(n - 1, 1)) / ordered[k].measured_ms) for k in range(n))
    return LatencyModel(float(rest.mean()), 1.0, (), _PENALTIES[0], coverage, ordered, residuals)
