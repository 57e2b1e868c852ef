"""Timing with clocks that the tests turn by hand."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest

from profilers.timer import Sample, Samples, Watch, exclusive, interleave, median_interval, quantile, take


class FakeClock:
    """Work adds to it; `steal` is time that somebody else had the CPU."""

    def __init__(self) -> None:
        self.now = self.used = 0.0
        self.switched = 0

    def wall(self) -> float:
        return self.now

    def cpu(self) -> float:
        return self.used

    def switches(self) -> int:
        return self.switched

    def work(self, seconds: float, steal: float = 0.0, switch: bool = False) -> None:
        self.now += seconds + steal
        self.used += seconds
        self.switched += switch or steal > 0


def test_a_sample_is_rejected_only_if_it_lost_time() -> None:
    clock = FakeClock()
    quiet = take(lambda: clock.work(1.0), 0, clock)
    touched = take(lambda: clock.work(1.0, steal=0.01), 0, clock)
    robbed = take(lambda: clock.work(1.0, steal=0.5), 0, clock)
    assert [sample.interrupted for sample in (quiet, touched, robbed)] == [False, False, True]
    assert (robbed.wall, robbed.cpu) == (pytest.approx(1.5), pytest.approx(1.0))


def test_statistics_are_of_the_accepted_samples() -> None:
    clock = FakeClock()
    calls = iter([1.0, 2.0, 3.0, 4.0, 5.0, 100.0])
    samples = Samples(
        [take(lambda: clock.work(v := next(calls), steal=50.0 if v == 100 else 0), turn, clock) for turn in range(6)]
    )
    timing = samples.timing()
    assert (timing.median_ms, timing.repeats, timing.contended) == (pytest.approx(3000), 5, False)
    assert (timing.p10_ms, timing.p90_ms) == (pytest.approx(1400), pytest.approx(4600))
    assert timing.rejected == pytest.approx(1 / 6)


def test_on_a_contended_machine_cpu_time_counts_and_it_says_so() -> None:
    samples = Samples([Sample(turn, wall=3.0 + turn, cpu=1.0, interrupted=turn > 0) for turn in range(4)])
    timing = samples.timing()
    assert timing.contended and timing.rejected == 0.75
    assert timing.median_ms == pytest.approx(1000)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Samples().timing()


def test_halves_ratio_compares_even_and_odd_rounds() -> None:
    samples = Samples([Sample(turn, wall=2.0 if turn % 2 else 1.0, cpu=1.0, interrupted=False) for turn in range(6)])
    assert samples.halves_ratio() == pytest.approx(2.0)


def test_candidates_take_turns_over_their_copies() -> None:
    clock = FakeClock()
    order: list[str] = []

    def call(name: str, copy: int):
        def run() -> None:
            order.append(f"{name}{copy}")
            clock.work(0.001)

        return run

    samples = interleave(
        {"a": [call("a", i) for i in range(3)], "b": [call("b", i) for i in range(2)]}, rounds=2, min_rounds=1, clock=clock
    )
    assert order == ["a0", "b0", *["a0", "a1", "a2", "b0", "b1"] * 2]
    assert (len(samples["a"].all), len(samples["b"].all)) == (6, 4)


def test_a_long_call_ends_its_turn_and_the_next_turn_goes_on() -> None:
    clock = FakeClock()
    order: list[int] = []

    def call(copy: int):
        def run() -> None:
            order.append(copy)
            clock.work(1.0)

        return run

    interleave({"slow": [call(i) for i in range(3)]}, rounds=4, burst_s=0.5, clock=clock)
    assert order == [0, 0, 1, 2, 0]


def test_the_budget_ends_the_rounds_but_not_before_the_minimum() -> None:
    clock = FakeClock()
    samples = interleave({"a": [lambda: clock.work(1.0)]}, rounds=100, min_rounds=3, budget_s=1.5, clock=clock)
    assert len(samples["a"].all) == 3


class Shared:
    """A machine on which calls take twice as long while `slow(now)`, which a look at its pace (a tenth of a call) tells."""

    def __init__(self, slow) -> None:
        self.clock, self._slow = FakeClock(), slow

    def call(self) -> None:
        self.clock.work(0.2 if self._slow(self.clock.now) else 0.1)

    def pace(self) -> bool:
        self.clock.work(0.01)
        return not self._slow(self.clock.now)

    def timed(self, **options) -> Samples:
        return interleave({"a": [self.call]}, clock=self.clock, pace=self.pace, **options)["a"]


def test_what_a_slow_machine_took_is_taken_again() -> None:
    found = Shared(lambda now: 1.05 < now < 4.0).timed(rounds=20, patience_s=10.0)
    timing = found.timing()
    assert sum(not sample.slow for sample in found.all) == 20 == timing.repeats
    assert timing.p90_ms == pytest.approx(100) and timing.rejected > 0 and not timing.disturbed
    assert any(sample.slow for sample in found.all)
    assert all(sample.slow for sample in found.all if sample.wall > 0.11)


def test_waiting_is_no_part_of_the_budget_and_ends_with_patience() -> None:
    stretch = Shared(lambda now: 0.3 < now < 5.0)
    assert 15 <= stretch.timed(rounds=50, min_rounds=1, budget_s=2.0, patience_s=30.0).timing().repeats <= 20
    assert 6.5 < stretch.clock.now < 7.5
    always = Shared(lambda now: True)
    timing = always.timed(rounds=30, min_rounds=2, budget_s=2.0, patience_s=3.0).timing()
    assert 5.0 < always.clock.now < 7.0
    assert timing.disturbed and not timing.contended and timing.median_ms == pytest.approx(200)


def test_before_something_long_the_pace_has_to_last() -> None:
    """Full at every other look from 1 s on, and for good from 2 s: what is short takes the moments, what is long waits."""
    taken = {}
    for length_s in (0.0, 0.004):
        clock, looks = FakeClock(), iter(range(10_000))

        def pace(clock=clock, looks=looks) -> bool:
            clock.work(0.001)
            return clock.now > 2.0 or (clock.now > 1.0 and next(looks) % 2 == 0)

        watch = Watch(pace, clock, 10.0)
        assert watch.slow(clock.wall())
        taken[length_s] = watch.wait(length_s)
    assert taken[0.0] == pytest.approx(1.001, abs=2e-3) and taken[0.004] == pytest.approx(2.005, abs=2e-3)


def test_samples_at_full_pace_count_alone_where_a_tenth_is() -> None:
    def timing(n_fast: int):
        return Samples([Sample(turn, 2.0 - (turn < n_fast), 1.0, False, turn >= n_fast) for turn in range(20)]).timing()

    assert (timing(2).median_ms, timing(2).repeats, timing(2).disturbed) == (pytest.approx(1000), 2, False)
    assert (timing(1).median_ms, timing(1).repeats, timing(1).disturbed) == (pytest.approx(2000), 20, True)
    assert timing(2).rejected == pytest.approx(0.9)


def test_quantiles_and_interval_by_hand() -> None:
    values = [float(i) for i in range(101)]
    assert quantile(values, 0.25) == 25.0
    assert quantile([1.0, 2.0], 0.5) == 1.5
    low, high = median_interval(values)
    assert low == math.floor(50.5 - 0.98 * math.sqrt(101)) and high == math.ceil(50.5 + 0.98 * math.sqrt(101))
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)


def _hold(folder: str, held, release) -> None:
    with exclusive(Path(folder)):
        held.set()
        release.wait(30)


def test_the_lock_excludes_another_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), held, release))
    process.start()
    assert held.wait(30)
    said: list[str] = []

    def waiting(text: str) -> None:
        said.append(text)
        release.set()

    with exclusive(tmp_path, waiting, poll_s=0.01):
        pass
    process.join(30)
    assert len(said) == 1 and "timing.lock" in said[0]
