"""What the command line imports at its start stays light."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import predictors.features, predictors.intervals, predictors.latency, predictors.loss
import search.frontier, search.report.page, search.strategies.presets, search.strategies.refine, search.strategies.solve, search.study
print(sorted({"torch", "matplotlib", "lightgbm", "optuna", "sklearn", "pandas", "ray"} & set(sys.modules)))
"""


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
