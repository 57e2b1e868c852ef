"""What a latency table is worth: how far two timings of a cell differ, and how well weights that it does not hold are predicted.

    python -m profilers.sweep --out FOLDER --target cpu --shapes results/benchmarks/latency/shapes.txt --plan 0 --models smollm2-135m \
        --rows 1,8,128,512 --repeat 3
    python -m results.benchmarks.latency.cells FOLDER/*.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from predictors.cells import Cell, evaluate_shapes
from profilers.checks import REPEATS_WITHIN, SMALL_BYTES, summary
from profilers.plan import DECODE_ROWS
from profilers.table import Check, LatencyTable
from profilers.timer import quantile
from search.report.table import markdown


def repeats(table: LatencyTable) -> str:
    """Ratios of two timings of the same cell, by the size of its weight."""
    found = [check for check in table.checks if check.kind == "repeat"]
    small = [check for check in found if check.size_bytes < SMALL_BYTES]
    large = [check for check in found if check.size_bytes >= SMALL_BYTES]
    rows = [_repeats(name, own) for name, own in (("small", small), ("large", large)) if own]
    return markdown("weights | cells timed twice | limit | within | median | 90 % | worst | load at most", rows)


def _repeats(size: str, checks: Sequence[Check]) -> tuple[str, ...]:
    ratios = sorted(check.ratio - 1 for check in checks)
    limit = REPEATS_WITHIN[size] - 1
    return (
        f"below {SMALL_BYTES / 1e6:g} MB" if size == "small" else f"{SMALL_BYTES / 1e6:g} MB and more",
        str(len(checks)),
        f"{limit:.0%}",
        f"{sum(ratio <= limit for ratio in ratios) / len(ratios):.1%}",
        *(f"{quantile(ratios, q):.1%}" for q in (0.5, 0.9, 1.0)),
        f"{max(check.load for check in checks):.1f}",
    )


def unseen(table: LatencyTable) -> str:
    """Every weight predicted from all the others, in each phase and in both."""
    cells = [
        Cell(row.kernel, row.key.format, row.key.m, row.key.n, row.key.k, row.timing.median_ms)
        for row in table.rows.values()
        if row.timing is not None and row.key.op == "linear"
    ]
    few, most = set(DECODE_ROWS), max(DECODE_ROWS)
    phases = {
        "all": cells,
        f"decode, up to {most} rows": [cell for cell in cells if cell.m in few],
        "prefill": [cell for cell in cells if cell.m > most],
    }
    rows = []
    for name, own in phases.items():
        if not own:
            continue
        found = evaluate_shapes(own)
        shapes = len({cell.shape for cell in own})
        rows.append(
            (
                name,
                str(found.n),
                str(shapes),
                f"{found.mae_log:.1%}",
                f"{found.coverage:.1%}",
                f"{found.spearman:.3f}",
                f"{found.least_spearman:.2f}",
                "yes" if found.trees else "no",
            )
        )
    return markdown(
        "phase | cells | weights | mean error of log ms | inside 90 % | Spearman of formats, mean | least | trees pay", rows
    )


def main(paths: Sequence[str]) -> int:
    if not paths:
        sys.stderr.write("give the files of one or more latency tables\n")
        return 2
    for path in paths:
        table = LatencyTable.read(Path(path))
        sys.stdout.write(f"{table.description}: {summary(table)}\n\n{repeats(table)}\n\n{unseen(table)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
