"""Kernel times at shapes that were not timed: the analytic part is exact where the truth is, trees and bounds say how far they hold."""

import numpy as np
import pytest

from predictors.cells import Cell, CellModel, evaluate_shapes, fit_cells

SHAPES = [(n, k) for n in (192, 576, 960, 1536, 3072) for k in (576, 1536)]


def timed(m: int, n: int, k: int, rate: float, bend: float = 0.0) -> float:
    """Truth: 5 us a launch, weights at `rate` ms a million, products; `bend`: what no bytes explain, by the width."""
    return (0.005 + rate * n * k / 1e6 + 0.02 * m * n * k / 1e9) * (1 + bend * (k > 1000))


def cells(bend: float = 0.0, noise: float = 0.0, seed: int = 0) -> list[Cell]:
    generator = np.random.default_rng(seed)
    kernels = {("own", "w4"): 0.03, ("own", "w8"): 0.05, ("packed", "w8"): 0.07, ("dense", "bf16"): 0.1}
    return [
        Cell(kernel, fmt, m, n, k, timed(m, n, k, rate, bend) * float(np.exp(noise * generator.standard_normal())))
        for (kernel, fmt), rate in kernels.items()
        for n, k in SHAPES
        for m in (1, 8, 64)
    ]


def test_an_exact_law_is_found_and_needs_no_trees() -> None:
    model = fit_cells(cells())
    assert not model.has_trees
    found = model.predict("own", "w4", 16, 2048, 1024)
    assert found.mean == pytest.approx(timed(16, 2048, 1024, 0.03), rel=1e-3)
    report = evaluate_shapes(cells())
    assert report.n == 120 and report.mae_log < 1e-3 and report.spearman == report.least_spearman == 1.0


def test_trees_stand_only_where_they_pay() -> None:
    bent = fit_cells(cells(bend=0.5))
    assert bent.has_trees
    plain = evaluate_shapes(cells(bend=0.5))
    assert plain.trees and plain.mae_log < 0.12
    noisy = fit_cells(cells(noise=0.1))
    assert not noisy.has_trees


def test_bounds_hold_about_as_often_as_they_promise() -> None:
    report = evaluate_shapes(cells(noise=0.1), coverage=0.9)
    assert 0.8 <= report.coverage <= 0.98 and report.promised == 0.9
    assert 0.05 < report.mae_log < 0.12


def test_equal_cells_and_seeds_give_equal_models() -> None:
    def first(model: CellModel) -> float:
        return model.predict("packed", "w8", 3, 640, 640).mean

    assert first(fit_cells(cells(bend=0.5), 1)) == first(fit_cells(list(reversed(cells(bend=0.5))), 1))


def test_too_few_weights_are_refused() -> None:
    few = [cell for cell in cells() if cell.kernel != "own" or cell.shape in SHAPES[:3]]
    with pytest.raises(ValueError, match="fewer than 4 weights"):
        fit_cells(few).predict("own", "w4", 1, 576, 576)
    with pytest.raises(ValueError, match="time a plan of shapes first"):
        fit_cells([cell for cell in cells() if cell.shape in SHAPES[:4]])
    with pytest.raises(ValueError, match="is not positive"):
        fit_cells([*cells(), Cell("own", "w4", 1, 8, 8, 0.0)])
