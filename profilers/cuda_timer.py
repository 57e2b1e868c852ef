"""Timing on a CUDA device: graphs that rotate over cold weights for decode, events around every call for prefill, steps of whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import torch

from profilers import clocks
from profilers.clocks import Clocks
from profilers.kernels.device import failures
from profilers.target import Target
from profilers.timer import Call, Sample, Samples

ROUNDS = 24
"""Replays of every graph; the median is of these."""

CACHES = 3
"""Last-level caches' worth of weights that pass between two uses of one."""

MOST_COPIES = 2048
"""Calls of a graph: more of a small weight than this, and building it takes longer than timing it."""

_WARM_UP = 3

How = Literal["graph", "events"]
"""What a step was timed as: replays of a captured graph, or calls with events around them, launches included."""

Turns = Callable[[], Iterable[int]]
"""The turns of a block of timings, counted from 0; asked for again where a block is repeated."""


class Device(Protocol):
    """What timing asks of a device; tests bring their own."""

    def captured(self, calls: Sequence[Call]) -> Call:
        """One call that does all of `calls` one after the other, without their launches: a graph."""
        ...

    def seconds(self, call: Call) -> float:
        """What a call takes on the device, by its own clock."""
        ...

    def clocks(self) -> Clocks:
        """Those it runs at now."""
        ...


class CudaDevice:
    """torch's current CUDA device."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def captured(self, calls: Sequence[Call]) -> Call:
        """A CUDA graph. Every call has run before: what a first call compiles or allocates cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # The outer context gives the stream back after a capture that failed, which torch's own does not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            kept = [call() for call in calls]
        # The outputs lie in the graph's own memory, which is free again with the last reference to them.
        return _Replay(graph, kept)

    def seconds(self, call: Call) -> float:
        """Between two events on the current stream."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def clocks(self) -> Clocks:
        """See `profilers.clocks`."""
        return clocks.read(self._target)


class _Replay:
    """A captured graph, callable, that keeps what it writes to alive."""

    def __init__(self, graph: torch.cuda.CUDAGraph, kept: Sequence[object]) -> None:
        self._graph, self._kept = graph, kept

    def __call__(self) -> None:
        self._graph.replay()


def copies(target: Target, weight_bytes: int) -> int:
    """Copies of a weight that a graph rotates over, so that none is in the cache when its turn comes; at most `MOST_COPIES`."""
    within_memory = int(target.memory_bytes // 4 // max(1, weight_bytes))
    wanted = math.ceil(CACHES * target.cache_bytes / max(1, weight_bytes)) + 1
    return max(4, min(MOST_COPIES, wanted, within_memory))


def is_cold(target: Target, weight_bytes: int, n_copies: int) -> bool:
    """Whether so many copies really do not fit into the cache."""
    return n_copies * weight_bytes >= CACHES * target.cache_bytes


def decode(candidates: Mapping[str, Sequence[Call]], device: Device, rounds: int = ROUNDS) -> dict[str, Samples]:
    """Candidates in turns, each a graph over all of its copies; a sample is a replay divided by them."""

    def graph(calls: Sequence[Call]) -> Call:
        for call in calls:
            call()
        return device.captured(calls)

    graphs = {name: graph(calls) for name, calls in candidates.items()}
    return _in_turns(graphs, {name: len(calls) for name, calls in candidates.items()}, device, lambda: range(rounds))


def prefill(candidates: Mapping[str, Sequence[Call]], device: Device, rounds: int = ROUNDS) -> dict[str, Samples]:
    """Candidates in turns, events around a call of each; above a millisecond it makes no difference where a weight lies."""

    def once(calls: Sequence[Call]) -> Call:
        turn = iter(range(10**9))
        return lambda: calls[next(turn) % len(calls)]()

    calls = {name: once(each) for name, each in candidates.items()}
    return _in_turns(calls, dict.fromkeys(candidates, 1), device, lambda: range(rounds))


def steps(candidates: Mapping[str, Call], device: Device, turns: Turns, lead: int = 0, burst: int = 1) -> dict[str, Samples]:
    """Steps of whole models: in a turn `lead` calls of a candidate that are not timed, then `burst` that are, numbered through."""
    return _in_turns(candidates, dict.fromkeys(candidates, 1), device, turns, lead, burst)


def captured(call: Call, device: Device) -> tuple[Call, How, str]:
    """A call as a graph, how it is to be timed, and why it could not be captured: then it is the call as it was.

    Routing to experts, for one, waits for the device in the middle of a step, which a graph cannot hold. Raises what a call raises
    that does not run at all, and torch's OutOfMemoryError.
    """
    call()
    try:
        return device.captured([call]), "graph", ""
    except torch.OutOfMemoryError:
        raise
    except failures() as error:
        return call, "events", str(error).strip().splitlines()[0]


def _in_turns(
    calls: Mapping[str, Call], n_calls: Mapping[str, int], device: Device, turns: Turns, lead: int = 0, burst: int = 1
) -> dict[str, Samples]:
    """Timed twice at most: where the clock moved or was held back during the first block, that one is dropped.

    Where it was again, all samples count as interrupted: the timing says that it is of a contended device.
    """
    for call in calls.values():
        for _ in range(_WARM_UP):
            device.seconds(call)
    samples, steady = _block(calls, n_calls, device, turns(), lead, burst)
    if not steady:
        samples, steady = _block(calls, n_calls, device, turns(), lead, burst)
    if not steady:
        for found in samples.values():
            found.all[:] = [Sample(sample.turn, sample.wall, sample.cpu, True) for sample in found.all]
    return samples


def _block(
    calls: Mapping[str, Call], n_calls: Mapping[str, int], device: Device, turns: Iterable[int], lead: int, burst: int
) -> tuple[dict[str, Samples], bool]:
    samples = {name: Samples() for name in calls}
    before = device.clocks()
    for turn in turns:
        for name, call in calls.items():
            for _ in range(lead):
                call()
            for place in range(burst):
                seconds = device.seconds(call) / n_calls[name]
                samples[name].all.append(Sample(turn * burst + place, seconds, seconds, False))
    return samples, before.steady(device.clocks())
