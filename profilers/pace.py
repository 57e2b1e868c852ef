"""Whether a CPU runs at its full pace, by a yardstick.

Work of strangers on a core's other hardware thread, heat, a battery: all of them slow a core down and none shows in load, switches or
stolen time. Fixed work that lives in the core's own cache shows them within microseconds. A machine that is never free, a rented one with a
neighbour that does not rest, has a pace of its own: what is learned of it is taken as full, so that nothing waits for what does not come.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from methods.atomic import write_text
from methods.errors import InputError
from methods.sealed import sealed, unsealed
from methods.typed import Positive, Range, read
from profilers.kernels.build import kernel_folder
from profilers.target import Target
from profilers.timer import quantile

SLOW = 1.25
"""Time of the yardstick, over its best, above which a core is shared: that takes 1.35 to 1.6 times as long, and the clock of a free one
moves by up to 1.2.
"""

WINDOW = 64
"""The best is one that a tenth of so many consecutive readings reach: a pace, not a moment."""

LEEWAY = 1.15
"""Time of the yardstick, over what the machine usually shows, up to which a machine that is never free counts as at its full pace."""

SPAN_S = 0.25
"""Seconds whose best pace counts as one look at what a machine usually shows."""

SPANS = 40
"""Looks after which that is known, ten seconds of them, and so many are remembered."""

RARELY = 0.1
"""A machine that is at its best pace in a smaller share of the looks is one that is never free."""

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

    best_s: seconds that the yardstick took at best; usual: what the machine shows time after time over that, 1 where it is free now and
    then. kept: file of both, so that a process that starts on a busy core knows; what cannot be read there is measured anew.
    """

    def __init__(
        self, read: Reading, kept: Path | None = None, first_s: float = _FIRST_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._read, self._clock = read, clock
        self._kept = kept
        self._window: list[float] = []
        self._spans: deque[float] = deque(maxlen=SPANS)  # the best pace in each, seconds
        self._span, self._span_ends = math.inf, -math.inf
        self.best_s, self.usual = kept_in(kept)
        until = clock() + (first_s if math.isinf(self.best_s) else 0.0)
        while math.isinf(self.best_s) or clock() < until:
            self.now()

    def now(self) -> float:
        """What the yardstick takes over its best; about 1 on a free machine."""
        seconds = self._read()
        self._window.append(seconds)
        if len(self._window) == WINDOW:
            self._note(quantile(sorted(self._window), 0.1))
            self._window = []
        return seconds / self.best_s

    @property
    def limit(self) -> float:
        """Time of the yardstick, over its best, up to which the CPU is as fast as it can be here."""
        return max(SLOW, LEEWAY * self.usual)

    def full(self) -> bool:
        """Whether the CPU is as fast as it can be here."""
        return self.now() <= self.limit

    @property
    def words(self) -> str:
        """What is unusual of this machine's pace, in a sentence; "" where it is free now and then."""
        if self.limit <= SLOW:
            return ""
        return (
            f"something always shares this machine's cores or holds their clock back: latencies are those of its usual pace, at which "
            f"arithmetic takes {self.usual:.2f} times as long as at the best that was seen"
        )

    def _note(self, seconds: float) -> None:
        """A pace that lasted for a window: perhaps the best, and a part of what is usual."""
        best, usual = min(self.best_s, seconds), self.usual
        if self._clock() >= self._span_ends:
            if math.isfinite(self._span):
                self._spans.append(self._span)
            self._span, self._span_ends = math.inf, self._clock() + SPAN_S
        self._span = min(self._span, seconds)
        if len(self._spans) == SPANS:
            ordered = sorted(self._spans)
            usual = quantile(ordered, 0.5) / best if quantile(ordered, RARELY) > SLOW * best else 1.0
        if best >= 0.99 * self.best_s and abs(usual - self.usual) <= 0.05 * self.usual:
            return
        self.best_s, self.usual = best, usual
        if self._kept is not None:
            with contextlib.suppress(
                OSError
            ):  # a cache that cannot be written costs the next process a second, not this one its run
                kept = {"yardstick": YARDSTICK, "seconds": self.best_s, "usual": round(usual, 3)}
                write_text(self._kept, sealed(kept) + "\n")


@dataclass(frozen=True)
class _Kept:
    """What the file holds."""

    yardstick: str
    seconds: Positive
    usual: Annotated[float, Range(1)] = 1.0


def kept_in(path: Path | None) -> tuple[float, float]:
    """Seconds that the yardstick took at best and what is usual over them, from the file that keeps it.

    Infinite and 1 where it does not say, was changed after it was written, or is of another yardstick.
    """
    try:
        found = read(_Kept, unsealed(path.read_bytes(), path), path, strict=False) if path is not None else None
    except (OSError, InputError):
        return math.inf, 1.0
    return (found.seconds, found.usual) if found is not None and found.yardstick == YARDSTICK else (math.inf, 1.0)


@functools.cache
def pace_of(target: Target) -> Pace:
    """The pace of this machine's CPU with a target's threads; its best is kept in the cache."""
    return Pace(yardstick(target.threads), kernel_folder().parent / "pace" / f"{target.fingerprint}.json")
