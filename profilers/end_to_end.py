"""Whole models: what a decode step or a prefill takes, all candidates in turns in one process."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from profilers import cuda_timer
from profilers.kv_cache import new_cache
from profilers.pace import pace_of
from profilers.steps import FixedStep, Repeatable, Step, once
from profilers.sweep import load_average, torch_threads
from profilers.target import Target
from profilers.timer import (
    STRETCH_S,
    Call,
    Clock,
    Pace,
    Sample,
    Samples,
    SystemClock,
    Timing,
    Watch,
    exclusive,
    median_interval,
    quantile,
    take,
)
from profilers.workload import Workload

LEAD = 2
"""Decode steps of a turn that only warm the caches."""

BURST = 3
"""Decode steps of a turn that are timed."""

How = Literal["clocks", "graph", "events"]
"""What a step was timed with: the CPU's clocks; on CUDA see `cuda_timer.How`."""


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one model's time over another's in the same round, with its 95 % interval."""

    mid: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Measurement:
    """One model's timing in an interleaved run.

    samples: a few consecutive steps a round, numbered through; load: 1-minute load average afterwards; why: a step on CUDA that
    could have been a graph is not.
    """

    timing: Timing
    samples: Samples
    load: float
    how: How = "clocks"
    why: str = ""

    @property
    def contended(self) -> bool:
        """Most samples were interrupted; the latency is an estimate from CPU time and proves no objective met."""
        return self.timing.contended

    @property
    def slowed(self) -> bool:
        """The machine was below its full pace during most steps, so that even those that count are longer than on a free one."""
        return self.samples.slowed

    @property
    def median_ms(self) -> float:
        """p50 wall time."""
        return self.timing.median_ms

    @property
    def lo_ms(self) -> float:
        """Lower end of the median's 95 % interval."""
        return self.timing.lo_ms

    @property
    def hi_ms(self) -> float:
        """Upper end of the median's 95 % interval."""
        return self.timing.hi_ms

    def tail(self, q: float) -> tuple[float, float, float]:
        """A quantile of the wall time of all samples with its 95 % interval, ms: who waits for a step waits for its interruptions."""
        walls = sorted(sample.wall for sample in self.samples.all)
        low, high = median_interval(walls, q)
        return 1e3 * quantile(walls, q), 1e3 * low, 1e3 * high

    def ratio_to(self, reference: Measurement) -> Ratio:
        """This model's time over another's of the same run, paired by round, so that what slowed both cancels.

        Where one of them was contended or too few rounds are left, CPU time is compared.
        """
        ratios = sorted(ours / theirs for ours, theirs in by_round((self, reference)))
        return Ratio(quantile(ratios, 0.5), *median_interval(ratios))

    def minus(self, reference: Measurement) -> tuple[float, float, float]:
        """By how many ms this model's step is longer than another's of the same run, with the 95 % interval; paired as a ratio is."""
        differences = sorted(1e3 * (ours - theirs) for ours, theirs in by_round((self, reference)))
        return quantile(differences, 0.5), *median_interval(differences)


def disturbance(runs: Collection[Measurement]) -> str:
    """How many of some runs were contended or slowed, in words; "" where none was."""
    found = sum(run.contended or run.slowed for run in runs)
    if not found:
        return ""
    return (
        f"something interrupted or slowed the machine during most steps of {found} of {len(runs)} whole-model runs, which took longer "
        "than on a free one (`search doctor` shows its pace)"
    )


def by_round(runs: Sequence[Measurement]) -> list[tuple[float, ...]]:
    """Seconds of all models in every round in which none was interrupted or slow; of one interleaved run.

    CPU time of all rounds where one of them was contended or too few rounds are left: two clocks are never mixed.
    """
    found = [dict(run.samples.seconds()) for run in runs]
    shared = set.intersection(*(set(own) for own in found))
    if any(run.contended for run in runs) or len(shared) < len(runs[0].samples.all) / 4:
        found = [{sample.turn: sample.cpu for sample in run.samples.all} for run in runs]
        shared = set.intersection(*(set(own) for own in found))
    return [tuple(own[turn] for own in found) for turn in sorted(shared)]


def measure(
    models: Mapping[str, nn.Module],
    workload: Workload,
    target: Target,
    *,
    make_caches: Mapping[str, Callable[[Any], Any]] | None = None,
    rounds: int = 30,
    budget_s: float = math.inf,
    min_rounds: int = 8,
    cache: Path | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock | None = None,
    device: cuda_timer.Device | None = None,
) -> dict[str, Measurement]:
    """Times every model on a workload in turns, so that drift and neighbours meet all alike.

    A decoding model's turn is a few consecutive steps, the first of them not timed: it runs alone where it is deployed, and a step that
    follows another model's finds the caches full of that one's weights. A prefill is one step a turn. On CUDA a decode step is one graph
    over a cache of fixed length; where it cannot be captured it is timed as it is, which the measurement says.
    make_caches: by name, how a model's key/value cache is made where it is not the dense one (`profilers.kv_cache.new_cache`).
    Stops after `rounds`, or after `min_rounds` once `budget_s` of wall time is used. cache: folder of the machine's timing lock, which
    is held meanwhile (None: the caller holds it); notify: told when another run has it, and of steps that are no graph. Models may share
    weights. device: what times where the target is a CUDA device, by default torch's current one.
    """
    made, fixed = make_caches or {}, target.device == "cuda" and workload.phase == "decode"

    def step(name: str) -> Repeatable:
        if fixed and name not in made:
            return FixedStep.of(models[name], workload)
        return Step(models[name], workload, make_cache=made.get(name, new_cache))

    held = nullcontext() if cache is None else exclusive(cache / "tables", notify)
    with held, torch_threads(target.threads), torch.inference_mode():
        steps = {name: step(name) for name in models}
        limits = Limits(rounds, min_rounds, budget_s)
        found = time_steps(steps, workload, target, limits, progress=progress, clock=clock, device=device)
    eager = [run.why for run in found.values() if run.why]
    if eager and notify:
        notify(f"{len(eager)} of {len(found)} models decode without a CUDA graph, timed with their launches ({eager[0]})")
    return found


STEADY = 0.03
"""Half-width of a ratio's interval, relative, from which more is measured."""

RETAKES = 2


def compare(
    reference: nn.Module, model: nn.Module, workload: Workload, target: Target, retakes: int = RETAKES, **options: Any
) -> tuple[Measurement, Measurement]:
    """Two models by `measure`, the reference first; options: its others.

    Neighbours disturb minutes at a time, so that the whole is measured again, at most `retakes` times, while the interval of the ratio
    is wide or most steps were disturbed. What was not disturbed counts together, whatever its ratios are; where all was, all does.
    """
    takes: list[tuple[Measurement, Measurement]] = []
    while True:
        found = measure({"reference": reference, "model": model}, workload, target, **options)
        takes.append((found["reference"], found["model"]))
        counting = [take for take in takes if not disturbance(take)]
        theirs, ours = (pooled(runs) for runs in zip(*(counting or takes), strict=True))
        ratio = ours.ratio_to(theirs)
        if (counting and ratio.hi - ratio.lo <= 2 * STEADY * ratio.mid) or len(takes) > retakes:
            return theirs, ours


def pooled(runs: Sequence[Measurement]) -> Measurement:
    """Several runs of one model as one, their rounds numbered through; those of another model have to be pooled alike."""
    samples: list[Sample] = []
    for run in runs:
        first = samples[-1].turn + 1 if samples else 0
        samples += [replace(sample, turn=first + sample.turn) for sample in run.samples.all]
    found = Samples(samples)
    return replace(runs[-1], timing=found.timing(), samples=found)


@dataclass(frozen=True)
class Limits:
    """Turns of a measurement: `rounds`, or from `min_rounds` on as many as `budget_s` of wall time allows."""

    rounds: int = 30
    min_rounds: int = 8
    budget_s: float = math.inf


def time_steps(
    steps: Mapping[str, Repeatable],
    workload: Workload,
    target: Target,
    limits: Limits,
    *,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock | None = None,
    device: cuda_timer.Device | None = None,
) -> dict[str, Measurement]:
    """What `measure` does with the steps of its models; the caller holds the timing lock, torch's threads and inference mode."""
    pace = pace_of(target).full if clock is None and target.device == "cpu" else None
    clock = clock or SystemClock()
    turns = partial(_turns, limits, progress, clock)
    if target.device == "cuda":
        return _on_cuda(steps, workload, turns, device or cuda_timer.CudaDevice(target))
    return _on_cpu(steps, workload, turns, clock, pace, limits.rounds)


def _turns(limits: Limits, progress: Callable[[int, int], None] | None, clock: Clock) -> Iterator[int]:
    start = clock.wall()
    for turn in range(limits.rounds):
        if turn >= limits.min_rounds and clock.wall() - start > limits.budget_s:
            return
        if progress:
            progress(turn, limits.rounds)
        yield turn


def _on_cpu(
    steps: Mapping[str, Repeatable],
    workload: Workload,
    turns: cuda_timer.Turns,
    clock: Clock,
    pace: Pace | None,
    rounds: int,
) -> dict[str, Measurement]:
    """Before each turn a machine below its full pace is waited for, in all about as long as measuring takes."""
    samples = {name: Samples() for name in steps}
    lead, burst = _burst(workload)
    begin = clock.wall()
    for step in steps.values():
        once(step)
    watch = Watch(pace, clock, patience_s=(clock.wall() - begin) * rounds * (lead + burst))
    for turn in turns():
        for name in random.Random(turn).sample(sorted(steps), len(steps)):
            watch.wait(STRETCH_S)
            for _ in range(lead):
                once(steps[name])
            for place in range(burst):
                since = clock.wall()
                sample = take(steps[name], turn * burst + place, clock)
                samples[name].all.append(replace(sample, slow=watch.slow(since)))
                steps[name].reset()
    return {name: Measurement(found.timing(), found, load_average()) for name, found in samples.items()}


def _on_cuda(
    steps: Mapping[str, Repeatable], workload: Workload, turns: cuda_timer.Turns, device: cuda_timer.Device
) -> dict[str, Measurement]:
    def taken(step: Repeatable) -> tuple[Call, How, str]:
        call = partial(once, step)
        return cuda_timer.captured(call, device) if workload.phase == "decode" else (call, "events", "")

    ready = {name: taken(step) for name, step in steps.items()}
    found = cuda_timer.steps({name: call for name, (call, _, _) in ready.items()}, device, turns, *_burst(workload))
    return {name: Measurement(samples.timing(), samples, load_average(), *ready[name][1:]) for name, samples in found.items()}


def steps_of_turn(workload: Workload) -> int:
    """Steps that a turn of one model runs, those that are not timed included."""
    return sum(_burst(workload))


def _burst(workload: Workload) -> tuple[int, int]:
    """Steps of a turn that are not timed, and that are."""
    return (LEAD, BURST) if workload.phase == "decode" else (0, 1)
