"""Whether a CPU runs at its full pace, by a yardstick.

Work of strangers on a core's other hardware thread, heat, a battery: all of them slow a core down and none shows in load, switches or
stolen time. Fixed work that lives in the core's own cache shows them within microseconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from methods.atomic import write_text
from profilers.kernels.build import kernel_folder
from profilers.target import Target
from profilers.timer import quantile

SLOW = 1.25
"""Time of the yardstick, over its best, above which a core is shared: that takes 1.35 to 1.6 times as long, and the clock of a free one
moves by up to 1.2.
"""

WINDOW = 64
"""The best is one that a tenth of so many consecutive readings reach: a pace, not a moment."""

_FIRST_S = 1.0
_VALUES = 4096  # floats: in every first-level cache
_PASSES = 64  # over them, for each thread: enough for all to get a part of the sum
_TIMES = 3
_WARM = 4  # sums that are not timed: whatever ran before has the caches

YARDSTICK = f"{_WARM} and {_TIMES} sums of {_PASSES} times {_VALUES} numbers a thread"
"""What is kept is the pace of this; the pace of another yardstick says nothing."""

Reading = Callable[[], float]


def yardstick(threads: int) -> Reading:
    """Reads how long a sum takes that `threads` threads share, seconds: the median of a few; one reading is some 50 µs.

    torch runs on as many threads meanwhile: the caller sees to that.
    """
    values = torch.ones(_VALUES).expand(threads * _PASSES, _VALUES)
    clock = time.perf_counter

    @torch.inference_mode()
    def read() -> float:
        for _ in range(_WARM):
            values.sum()
        times = []
        for _ in range(_TIMES):
            begin = clock()
            values.sum()
            times.append(clock() - begin)
        return quantile(sorted(times), 0.5)

    return read


class Pace:
    """The yardstick of a machine, now, against the best pace that it ever had there.

    kept: file of the best pace, so that a process that starts on a busy core knows; what cannot be read there is measured anew.
    """

    def __init__(self, read: Reading, kept: Path | None = None, first_s: float = _FIRST_S) -> None:
        self._read = read
        self._kept = kept
        self._window: list[float] = []
        self.best_s = best_in(kept)
        until = time.perf_counter() + (first_s if math.isinf(self.best_s) else 0.0)
        while math.isinf(self.best_s) or time.perf_counter() < until:
            self.now()

    def now(self) -> float:
        """What the yardstick takes over its best; about 1 on a free machine."""
        seconds = self._read()
        self._window.append(seconds)
        if len(self._window) == WINDOW:
            self._note(quantile(sorted(self._window), 0.1))
            self._window = []
        return seconds / self.best_s

    def full(self) -> bool:
        """Whether the CPU is as fast as it can be."""
        return self.now() <= SLOW

    def _note(self, seconds: float) -> None:
        if seconds >= 0.99 * self.best_s:
            return
        self.best_s = seconds
        if self._kept is not None:
            with contextlib.suppress(
                OSError
            ):  # a cache that cannot be written costs the next process a second, not this one its run
                write_text(self._kept, json.dumps({"yardstick": YARDSTICK, "seconds": seconds}) + "\n")


def best_in(path: Path | None) -> float:
    """Seconds that the yardstick took at best, from the file that keeps it; infinite where it does not say, or of another yardstick."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        seconds = float(found["seconds"]) if found["yardstick"] == YARDSTICK else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return seconds if seconds > 0 else math.inf


@functools.cache
def pace_of(target: Target) -> Pace:
    """The pace of this machine's CPU with a target's threads; its best is kept in the cache."""
    return Pace(yardstick(target.threads), kernel_folder().parent / "pace" / f"{target.fingerprint}.json")
