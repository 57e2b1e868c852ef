"""Timing on a CPU that others use too: what was interrupted or slowed down is rejected, candidates take turns."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from methods.locks import try_lock, unlock
from methods.typed import Count, NonNegative, Positive
from profilers.label import Label

if os.name != "nt":  # Windows has no such module; then no sample is known to be interrupted
    import resource

Call = Callable[[], object]

LOST_SHARE = 0.02
"""A sample during which the thread was descheduled and lost more than this share of its time does not count."""

CONTENDED_SHARE = 0.5
"""Above this share of interrupted samples the machine was not free, above this share of slow ones it was not fast."""

ENOUGH_SHARE = 0.1
"""Share of samples at the machine's full pace, from which on they alone count."""

LOOK_S = 5e-4
"""Seconds of samples between two looks at the machine's pace: neighbours come and go within milliseconds."""

STRETCH_S = 5e-3
"""Seconds at full pace that are waited for before what takes as long or longer is timed on a machine that was slow."""

Pace = Callable[[], bool]
"""Whether the machine runs as fast as it can at this moment (`profilers.pace`)."""


class Clock(Protocol):
    """What a timer reads; tests inject their own."""

    def wall(self) -> float:
        """Seconds of wall time."""
        ...

    def cpu(self) -> float:
        """Seconds of CPU time of this thread."""
        ...

    def switches(self) -> int:
        """Times this thread was descheduled against its will."""
        ...


class SystemClock:
    """The system's clocks. On Linux the switches are this thread's, elsewhere the process'."""

    def __init__(self) -> None:
        self.wall = time.perf_counter
        self.cpu = time.thread_time

    def switches(self) -> int:
        """0 where the system does not count them."""
        if os.name == "nt":
            return 0
        return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nivcsw


@dataclass(frozen=True)
class Timing:
    """A latency: median with p10 to p90, and the 95 % confidence interval of the median by order statistics (`lo_ms`, `hi_ms`).

    repeats: samples that count; rejected: share of samples that were interrupted or slow; contended: more than half were interrupted,
    and the statistics are of the calling thread's CPU time over all samples, an estimate of what a free machine takes; aa: ratio of
    the medians of even and odd rounds, larger over smaller (1.0 is a quiet machine); label: see `profilers.label`.
    """

    median_ms: Positive
    p10_ms: NonNegative
    p90_ms: NonNegative
    repeats: Count
    label: Label = "measured"
    lo_ms: float = math.nan
    hi_ms: float = math.nan
    rejected: float = 0.0
    aa: float = 1.0
    contended: bool = False

    @property
    def disturbed(self) -> bool:
        """Contended, or hardly any sample was taken at the machine's full pace: then the statistics are of what the slowed one took."""
        return self.contended or self.rejected > 1 - ENOUGH_SHARE


@dataclass(frozen=True)
class Sample:
    """One timed call, in seconds. interrupted: it lost the CPU to somebody for more than `LOST_SHARE` of its time; slow: the machine was
    not at its full pace before or after it.
    """

    turn: int
    wall: float
    cpu: float
    interrupted: bool
    slow: bool = False


@dataclass
class Samples:
    """What was timed of one candidate."""

    all: list[Sample] = field(default_factory=list)

    @property
    def rejected(self) -> float:
        """Share of the samples that were interrupted or slow."""
        return 1 - len(self._steady) / len(self.all)

    @property
    def contended(self) -> bool:
        """Whether most samples were interrupted."""
        return sum(sample.interrupted for sample in self.all) > CONTENDED_SHARE * len(self.all)

    @property
    def slowed(self) -> bool:
        """Whether the machine was below its full pace during most samples."""
        return sum(sample.slow for sample in self.all) > CONTENDED_SHARE * len(self.all)

    def seconds(self) -> list[tuple[int, float]]:
        """(round, seconds) of the samples that count: CPU time of all if most were interrupted, else wall time of those that were not;
        of those at full pace alone, where there are enough.
        """
        if self.contended:
            return [(sample.turn, sample.cpu) for sample in self.all]
        enough = self.rejected <= 1 - ENOUGH_SHARE
        counting = self._steady if enough else [sample for sample in self.all if not sample.interrupted]
        return [(sample.turn, sample.wall) for sample in counting]

    @property
    def _steady(self) -> list[Sample]:
        return [sample for sample in self.all if not (sample.interrupted or sample.slow)]

    def timing(self, label: Label = "measured") -> Timing:
        """Statistics of the samples that count."""
        if not self.all:
            raise ValueError("timing: no samples were taken")
        values = sorted(second for _, second in self.seconds())
        low, high = median_interval(values)
        return Timing(
            median_ms=1e3 * quantile(values, 0.5),
            p10_ms=1e3 * quantile(values, 0.1),
            p90_ms=1e3 * quantile(values, 0.9),
            repeats=len(values),
            label=label,
            lo_ms=1e3 * low,
            hi_ms=1e3 * high,
            rejected=self.rejected,
            aa=self.halves_ratio(),
            contended=self.contended,
        )

    def halves_ratio(self) -> float:
        """Medians of even rounds against odd rounds, larger over smaller: what two measurements of one thing differ by."""
        halves = [sorted(second for turn, second in self.seconds() if turn % 2 == parity) for parity in (0, 1)]
        if not all(halves):
            return 1.0
        a, b = (quantile(half, 0.5) for half in halves)
        return max(a, b) / min(a, b)


def take(call: Call, turn: int, clock: Clock) -> Sample:
    """Times one call."""
    cpu, switches = clock.cpu(), clock.switches()
    begin = clock.wall()
    call()
    end = clock.wall()
    switched = clock.switches() != switches
    used = clock.cpu() - cpu
    wall = end - begin
    return Sample(turn, wall, min(used, wall), switched and wall - used > LOST_SHARE * wall)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics of an ascending sequence."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def median_interval(ordered: Sequence[float], q: float = 0.5) -> tuple[float, float]:
    """95 % confidence interval of the median (or another quantile) of an ascending sequence.

    Order statistics, normal approximation of their ranks; where a rank lies outside, the least or greatest value.
    """
    n = len(ordered)
    half = 1.96 * math.sqrt(n * q * (1 - q))
    low, high = math.floor(n * q - half), math.ceil(n * q + half)
    return ordered[max(0, low)], ordered[min(n - 1, high)]


def interleave(
    candidates: Mapping[str, Sequence[Call]],
    *,
    rounds: int = 12,
    min_rounds: int = 4,
    budget_s: float = math.inf,
    burst_s: float = 0.05,
    clock: Clock | None = None,
    pace: Pace | None = None,
    patience_s: float = 0.0,
) -> dict[str, Samples]:
    """Times candidates in turns, so that drift and neighbours meet all of them alike.

    candidates: name -> calls that do the same work on different copies of the data; a turn runs each copy once, or as many as fit
    `burst_s` (the next turn goes on from there). One call of each is made before and not counted. Stops after `rounds` turns, or
    after `min_rounds` once `budget_s` is used up. Where `pace` tells when the machine is slow, what was timed meanwhile is timed
    again, up to `patience_s` besides the budget.
    """
    clock = clock or SystemClock()
    watch = Watch(pace, clock, patience_s)
    samples = {name: Samples() for name in candidates}
    position = dict.fromkeys(candidates, 0)
    for calls in candidates.values():
        calls[0]()
    start = clock.wall()
    for turn in range(rounds):
        if turn >= min_rounds and clock.wall() - start - watch.waited_s > budget_s:
            break
        for name, calls in candidates.items():
            position[name] = _burst(calls, position[name], samples[name], turn, burst_s, clock, watch)
    return samples


class Watch:
    """Looks at the machine's pace between samples. waited_s: how long it was slow, up to `patience_s`, which is spent on better ones."""

    def __init__(self, pace: Pace | None, clock: Clock, patience_s: float) -> None:
        self._pace = pace
        self._clock = clock
        self._patience_s = patience_s
        self._full = True
        self.waited_s = 0.0

    @property
    def patient(self) -> bool:
        """Whether there is patience left."""
        return self.waited_s < self._patience_s

    def wait(self, length_s: float = 0.0) -> float:
        """Waits until the machine is at its full pace, or patience ends; returns the time then.

        After it was slow, its pace has to last as long as what is to be timed takes, `length_s`, of which `STRETCH_S` at most: looks
        before and after a long sample do not see all that comes in between.
        """
        begin = slowed = self._clock.wall()
        waiting = not self._full
        while waiting:
            full = self._look()
            before, begin = begin, self._clock.wall()
            self.waited_s += begin - before
            slowed = slowed if full else begin
            waiting = self.patient and (not full or begin - slowed < min(length_s, STRETCH_S))
        return begin

    def slow(self, since: float) -> bool:
        """Whether the machine was slow at the last look, or is now; what ran in between, since a time, does not count then."""
        before = self._full
        if self._look() and before:
            return False
        if self.patient:
            self.waited_s += self._clock.wall() - since
        return True

    def _look(self) -> bool:
        self._full = self._pace is None or self._pace()
        return self._full


def _burst(
    calls: Sequence[Call], position: int, samples: Samples, turn: int, burst_s: float, clock: Clock, watch: Watch
) -> int:
    done, spent = 0, 0.0
    while done < len(calls) and spent <= burst_s:
        since = watch.wait(samples.all[-1].wall if samples.all else 0.0)
        taken: list[Sample] = []
        while done + len(taken) < len(calls) and clock.wall() - since < LOOK_S and spent + _wall(taken) <= burst_s:
            taken.append(take(calls[position], turn, clock))
            position = (position + 1) % len(calls)
        slow = watch.slow(since)
        samples.all += [replace(sample, slow=slow) for sample in taken]
        if not (slow and watch.patient):
            done += len(taken)
            spent += _wall(taken)
    return position


def _wall(samples: Sequence[Sample]) -> float:
    return sum(sample.wall for sample in samples)


@contextmanager
def exclusive(folder: Path, waiting: Callable[[str], None] | None = None, poll_s: float = 0.5) -> Iterator[None]:
    """Holds the machine's timing lock, `folder/timing.lock`; whoever else times waits, and `waiting` is told so once.

    Not reentrant. The system frees the lock of a process that ends in any way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "timing.lock"
    with path.open("a+") as file:
        if not try_lock(file.fileno()):
            if waiting:
                waiting(f"another run is timing on this machine (lock {path}); waiting for it")
            while not try_lock(file.fileno()):
                time.sleep(poll_s)
        try:
            yield
        finally:
            unlock(file.fileno())
