"""What an operator takes at a batch and length between those that it was timed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from profilers.label import weakest
from profilers.operators import kind_of
from profilers.table import KernelKey, Row
from profilers.timer import Timing

_STATISTICS = ("median_ms", "p10_ms", "p90_ms", "lo_ms", "hi_ms")


def between(rows: Iterable[Row], key: KernelKey) -> Iterator[tuple[str, Timing]]:
    """Kernels that were timed around an operator's cell, and what they take there: linear in the batch (m), and of attention in its length.

    The length is the context of one query, or the number of queries of a prefill, whose time per query is what is linear. Nothing is said
    beyond the timed cells.
    """
    tokens, length = _per_and_length(key)
    timed: dict[str, dict[int, dict[int, Timing]]] = {}
    for row in rows:
        if row.timing is not None and _alike(row.key, key):
            per, at = _per_and_length(row.key)
            timed.setdefault(row.kernel, {}).setdefault(row.key.m, {})[at] = _mixed([(row.timing, 1 / per)])
    for kernel, batches in timed.items():
        reached = {m: timing for m, lengths in batches.items() if (timing := _at(lengths, length)) is not None}
        found = _at(reached, key.m)
        if found is not None:
            yield kernel, _mixed([(found, tokens)])


def _alike(one: KernelKey, other: KernelKey) -> bool:
    """Whether two cells differ in nothing but batch and length."""
    if kind_of(one.op) == "attention" and (one.n == 1) == (other.n == 1):
        other = replace(other, n=one.n) if one.k == other.k == 0 else replace(other, k=one.k)
    return replace(one, m=other.m) == other


def _per_and_length(key: KernelKey) -> tuple[int, int]:
    """What time is divided by, and what it is then linear in."""
    if kind_of(key.op) != "attention":
        return 1, 0
    return (1, key.k) if key.n == 1 else (key.n, key.n)


def _at(timings: Mapping[int, Timing], place: int) -> Timing | None:
    """On the line between the two nearest around a place; None beyond all of them."""
    low = max((at for at in timings if at <= place), default=None)
    high = min((at for at in timings if at >= place), default=None)
    if low is None or high is None:
        return None
    share = (place - low) / (high - low) if high > low else 0.0
    return _mixed([(timings[low], 1 - share), (timings[high], share)])


def _mixed(parts: Iterable[tuple[Timing, float]]) -> Timing:
    """Timings times factors, added up: `interpolated` at best."""
    parts = list(parts)
    sums = {name: sum(getattr(timing, name) * factor for timing, factor in parts) for name in _STATISTICS}
    return Timing(**sums, repeats=0, label=weakest(("interpolated", *(timing.label for timing, _ in parts))))
