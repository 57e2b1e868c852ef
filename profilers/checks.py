"""Whether a latency table can be trusted, by what was measured twice while it was made."""

from __future__ import annotations

from profilers.table import Check, LatencyTable
from profilers.timer import quantile

SMALL_BYTES = 2_500_000
"""Weights below this size stay in a cache that nobody else uses up; above, neighbours are felt."""

REPEATS_WITHIN = {"small": 1.10, "large": 1.20}
"""Ratio of two timings of one cell that counts as equal, by the size of its weight."""

SHARE_WITHIN = 0.9
"""Share of the repeated cells that have to be equal."""

MOST_DRIFT = {"cpu": 1.2, "cuda": 1.05}
"""How far the reference cell may be from its median in the course of a sweep, for the device to have been in one state; on a CPU it is a
large cell like others.
"""

MOST_DISTURBED = 0.1
"""Share of the cells for which the device was not free, from which they are no picture of it."""

BUSY_LOAD = 3.0


def problems(table: LatencyTable) -> list[str]:
    """What a table's own checks say against it, in words; empty where nothing does, also where nothing was checked."""
    found = []
    repeats = [check for check in table.checks if check.kind == "repeat"]
    for size in REPEATS_WITHIN:
        own = [check for check in repeats if _size(check) == size]
        within = sum(check.ratio <= REPEATS_WITHIN[size] for check in own)
        if own and within < SHARE_WITHIN * len(own):
            worst = max(check.ratio for check in own)
            found.append(
                f"measured again, {within} of {len(own)} cells with {size} weights agree within {REPEATS_WITHIN[size] - 1:.0%} "
                f"(worst {worst - 1:.0%})"
            )
    looks = sorted(check.again_ms for check in table.checks if check.kind == "drift")
    drift = max(looks[-1] / quantile(looks, 0.5), quantile(looks, 0.5) / looks[0]) if looks else 1.0
    if drift > MOST_DRIFT[table.header.get("device", "cpu")]:
        found.append(f"the reference cell changed by {drift - 1:.0%} in the course of the sweep")
    timings = [row.timing for row in table.rows.values() if row.timing is not None]
    disturbed = sum(timing.disturbed for timing in timings)
    if disturbed > MOST_DISTURBED * len(timings):
        found.append(f"the device was interrupted or slowed down during all of {disturbed} of {len(timings)} timings")
    busy = [check for check in table.checks if check.load >= BUSY_LOAD]
    if len(busy) > len(table.checks) / 2:
        found.append(f"the machine's load was {max(check.load for check in busy):.1f}")
    return found


def _size(check: Check) -> str:
    return "small" if check.size_bytes < SMALL_BYTES else "large"


def summary(table: LatencyTable) -> str:
    """How many cells were measured twice and what came of it, and what blocks take of their cells' sum, in a line."""
    kinds = [check.kind for check in table.checks]
    bad = problems(table)
    state = "; ".join(bad) if bad else "they agree"
    said = f"{kinds.count('repeat')} cells measured twice, reference cell measured {kinds.count('drift')} times: {state}"
    shares = sorted(check.again_ms / check.first_ms for check in table.checks if check.kind == "block")
    if shares:
        said += (
            f"; {len(shares)} blocks of random models, by the difference of two depths, take {shares[0]:.2f} to {shares[-1]:.2f} of "
            f"their cells' sum (median {quantile(shares, 0.5):.2f})"
        )
    return said
