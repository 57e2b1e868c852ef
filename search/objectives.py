"""What is asked of a run: limits on times, each of one workload, and on bytes. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from methods.typed import shown
from profilers.workload import Workload, parse_workload

TimeKind = Literal["latency", "ttft", "tpot-p95", "throughput"]
ByteKind = Literal["memory", "size"]

TIMES: tuple[TimeKind, ...] = ("latency", "ttft", "tpot-p95", "throughput")
BYTES: tuple[ByteKind, ...] = ("memory", "size")

LONGEST_MS = 24 * 3600 * 1e3
LARGEST_RATIO = 1000.0
LARGEST_RATE = 1e9
LARGEST_BYTES = 2**60
"""Above these an objective is a slip of the pen: it asks for nothing."""

_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NUMBER = r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z/]*)\s*"
AUTO = "auto"
"""A latency that is chosen to bind on the machine: `search.limits.binding`."""

_EXAMPLES = {
    "latency": "30ms, 1.5s, 0.6x (of the dense model's latency) or auto",
    "ttft": "200ms or 0.6x (of the dense model's)",
    "tpot-p95": "40ms",
    "throughput": "50tok/s",
    "memory": "1.5GiB",
    "size": "100MB",
}


@dataclass(frozen=True)
class Objective:
    """A time to meet: at most `value` ms a step of `workload`, or that share of the dense model's measured in the same interleaved run.

    kind: `latency` and `ttft` are medians, `tpot-p95` the 95th percentile of the time per output token, `throughput` the median
    decode step that gives so many tokens a second over the whole batch. auto: the value is to be chosen once the machine was measured.
    """

    value: float
    relative: bool
    kind: TimeKind = "latency"
    workload: Workload = field(default_factory=Workload)
    auto: bool = False

    @property
    def text(self) -> str:
        """`30ms`, `0.6x`, `ttft=200ms`, `throughput=50tok/s`; `Objectives.parse` reads it back."""
        if self.auto:
            return AUTO
        if self.kind == "throughput":
            return f"throughput={1e3 * self.workload.batch / self.value:g}tok/s"
        amount = f"{self.value:g}x" if self.relative else f"{self.value:g}ms"
        return amount if self.kind == "latency" else f"{self.kind}={amount}"

    @property
    def flag(self) -> str:
        """As it is asked for: `--ttft 200ms`."""
        return f"--{self.kind} {self.text.rpartition('=')[2]}"

    @property
    def quantile(self) -> float:
        """Of the step's time."""
        return 0.95 if self.kind == "tpot-p95" else 0.5

    def resolve(self, dense_ms: float) -> float:
        """The objective in milliseconds, given the dense model's latency."""
        return self.value * dense_ms if self.relative else self.value


@dataclass(frozen=True)
class ByteLimit:
    """At most so many bytes: `size`, the stored model; `memory`, its weights and the key/value cache of the largest workload, counted."""

    value: int
    kind: ByteKind

    @property
    def text(self) -> str:
        """`size=100MB`, in the largest unit that shows it whole."""
        unit = max((u for u, factor in _BYTES.items() if self.value % factor == 0), key=lambda u: _BYTES[u])
        return f"{self.kind}={self.value // _BYTES[unit]}{unit}"

    @property
    def flag(self) -> str:
        """As it is asked for: `--size 100MB`."""
        return f"--{self.kind} {self.text.rpartition('=')[2]}"


@dataclass(frozen=True)
class Objectives:
    """Everything asked for at once. times: the first is the main one, whose prediction is solved for and whose latency is shown."""

    times: tuple[Objective, ...]
    sizes: tuple[ByteLimit, ...] = ()

    @property
    def main(self) -> Objective:
        """The first of the times."""
        return self.times[0]

    @property
    def text(self) -> str:
        """All of it, `0.6x,ttft=200ms,size=100MB`; one that holds for several workloads stands once."""
        return ",".join(dict.fromkeys([time.text for time in self.times] + [size.text for size in self.sizes]))

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Every workload that a time is asked of, that of the main one first."""
        return tuple(dict.fromkeys(time.workload for time in self.times))

    @classmethod
    def of(cls, given: Mapping[str, str], workloads: Sequence[Workload]) -> Objectives | None:
        """The objectives of flags (kind -> value, "" where not given) on the stated workloads; None where no flag was given.

        `latency` is asked of every stated workload, except that `ttft` takes the prefills where it is given; `tpot-p95` and
        `throughput` of every decode. Where none of the needed phase is stated, that of the first one's size is taken. Raises ValueError.
        """
        times: list[Objective] = []
        for kind in TIMES:
            if given.get(kind):
                wanted = parse_objective(given[kind], kind)
                times += [_on(wanted, workload) for workload in _workloads_of(kind, workloads, bool(given.get("ttft")))]
        sizes = tuple(ByteLimit(parse_bytes(given[kind], kind, _EXAMPLES[kind]), kind) for kind in BYTES if given.get(kind))
        if sizes and not times:
            raise ValueError(
                f"--{sizes[0].kind}: ask for a time as well; --latency 1x is met by whatever is no slower than dense"
            )
        return cls(tuple(times), sizes) if times else None

    @classmethod
    def parse(cls, text: str, workloads: Sequence[Workload]) -> Objectives:
        """Inverse of `text`, given the workloads that were stated."""
        given: dict[str, str] = {}
        for part in text.split(","):
            kind, equals, value = part.rpartition("=")
            given[kind if equals else "latency"] = value
        found = cls.of(given, workloads)
        if found is None or set(given) - {*TIMES, *BYTES}:
            raise ValueError(f"objective {text!r}: write 0.6x or kinds such as 0.6x,ttft=200ms,size=100MB")
        return found


def file_name(text: str) -> str:
    """An objective's text as part of a file name."""
    return text.replace("/", "-")


def parse_objective(text: str, kind: TimeKind = "latency") -> Objective:
    """`30ms`, `1.5s`, `800us`, `0.6x`, or tokens a second for `throughput` (then of a batch of one); raises ValueError without a unit."""
    if kind == "latency" and text.strip() == AUTO:
        return Objective(1.0, relative=True, auto=True)
    match = re.fullmatch(_NUMBER, text)
    write = _EXAMPLES[kind]
    if not match:
        raise ValueError(f"--{kind} {shown(text)}: not a {kind}; write {write}")
    if not match[2]:
        raise ValueError(f"--{kind} {shown(text)} has no unit; write {write}")
    value, unit = float(match[1]), match[2]
    if kind == "throughput":
        if unit != "tok/s":
            raise ValueError(f"--throughput {text!r}: {unit} is not tokens a second; write {write}")
        return Objective(1e3 / _within(value, LARGEST_RATE, unit, kind, text), relative=False, kind=kind)
    if unit == "x" and kind != "tpot-p95":
        return Objective(_within(value, LARGEST_RATIO, unit, kind, text), relative=True, kind=kind)
    if unit not in _MS:
        raise ValueError(f"--{kind} {text!r}: {unit} is no unit of it; write {write}")
    return Objective(_within(value * _MS[unit], LONGEST_MS, "ms", kind, text), relative=False, kind=kind)


def _within(value: float, largest: float, unit: str, flag: str, text: str) -> float:
    if not 0 < value <= largest:
        raise ValueError(f"--{flag} {shown(text)}: must be above zero and at most {largest:.10g}{unit}")
    return value


def parse_bytes(text: str, flag: str, example: str = "1.5GiB") -> int:
    """`1.5GiB`, `100MB`, `800kB` in bytes; raises ValueError without a unit."""
    match = re.fullmatch(_NUMBER, text)
    if not match or match[2] not in _BYTES:
        raise ValueError(f"--{flag} {shown(text)}: write a number with one of {', '.join(_BYTES)}, for example {example}")
    return max(1, round(_within(float(match[1]) * _BYTES[match[2]], LARGEST_BYTES, "B", flag, text)))


def parse_workloads(texts: Sequence[str]) -> tuple[Workload, ...]:
    """The stated workloads, each once; raises ValueError on none."""
    if not texts:
        raise ValueError("workload: state at least one, for example decode:batch=1,context=512")
    return tuple(dict.fromkeys(parse_workload(text) for text in texts))


def _workloads_of(kind: TimeKind, stated: Sequence[Workload], ttft: bool) -> list[Workload]:
    if kind == "latency":
        own = [workload for workload in stated if not (ttft and workload.phase == "prefill")]
        if not own:
            raise ValueError("--latency and --ttft: both are asked of a prefill; state a decode workload too, or leave one out")
        return own
    phase: Literal["decode", "prefill"] = "prefill" if kind == "ttft" else "decode"
    own = [workload for workload in stated if workload.phase == phase]
    first = stated[0]
    if own:
        return own
    length = first.context if first.phase == "decode" else first.prompt
    return [Workload(phase, first.batch, context=length) if phase == "decode" else Workload(phase, first.batch, prompt=length)]


def _on(objective: Objective, workload: Workload) -> Objective:
    value = objective.value * workload.batch if objective.kind == "throughput" else objective.value
    return replace(objective, value=value, workload=workload)
