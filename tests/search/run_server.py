"""Runs that a test can kill: a server imports everything once and forks a process for each `search` command, on fixed prices.

A fork costs milliseconds where a new interpreter takes seconds to import, so that a kill meets the run and not its imports. Everything
in the process is the real thing but the stopwatch: what a kernel or a model "took" is computed from its bytes, so that two runs of a
command see the same prices and must give the same answer.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MS_PER_BYTE = 1e-5


class Run:
    """One command in a process of its own; log: its stdout and stderr."""

    def __init__(self, server: subprocess.Popen[str], pid: int, log: Path) -> None:
        self._server, self.pid, self.log = server, pid, log

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        assert self._server.stdout is not None
        return bool(select.select([self._server.stdout], [], [], seconds)[0])

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit status; negative where a signal ended it."""
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


class Server:
    """Starts runs one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, arguments: Sequence[object], log: Path, fault: tuple[str, int] | None = None) -> Run:
        """The command `search ARGUMENTS` in a new process; fault: a name of `FAULTS` and its number."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"arguments": [str(a) for a in arguments], "log": str(log), "fault": fault}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Run(self._process, int(self._process.stdout.readline()), log)

    def run(self, arguments: Sequence[object], log: Path, fault: tuple[str, int] | None = None) -> int:
        """A command to its end."""
        return self.start(arguments, log, fault).wait()


@contextmanager
def server(model: Path) -> Iterator[Server]:
    """A server, on one core: two threads on a core that others use too would wait for each other. model: what is imported to load it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), str(model)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        yield Server(process)
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def priced(call: Any, turn: int, clock: Any) -> Any:
    """In place of `profilers.timer.take`: a sample as long as the weights that the call reads have bytes."""
    from profilers.steps import Step
    from profilers.timer import Sample

    size = _step_bytes(call.model) + 2000 if isinstance(call, Step) else call.func.size_bytes() + 100
    seconds = 1e-3 * MS_PER_BYTE * size * (1 + 0.001 * (turn % 5))
    return Sample(turn, seconds, seconds, False)


def _step_bytes(model: Any) -> int:
    from torch import nn

    from profilers.runtime import KernelLinear

    sites = {id(m.site): m.site.few.size_bytes() for m in model.modules() if isinstance(m, KernelLinear)}
    return sum(sites.values()) + sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def _full_disk(n: int) -> None:
    """The disk is full when the n-th file is written."""
    real, calls = os.fsync, itertools.count(1)

    def fsync(descriptor: int) -> None:
        if next(calls) >= n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync


def _file_limit(n: int) -> None:
    """No file may grow beyond n bytes: writes fail in their middle, those of libraries and of the database too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))


def _no_memory(n: int) -> None:
    """From the n-th on, one policy cannot be evaluated: it asks for more memory than there is. With 0, none can."""
    import torch

    from search.evaluate import Evaluator

    real, refused, calls = Evaluator.evaluate, set(), itertools.count(1)

    def evaluate(self: Any, policy: Any, *rest: Any, **named: Any) -> Any:
        if n == 0 or next(calls) == n:
            refused.add(policy.key())
        if policy.key() in refused:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(self, policy, *rest, **named)

    Evaluator.evaluate = evaluate  # type: ignore[method-assign]


def _slow_machine(_: int) -> None:
    """Something else slows the core down from before the first whole-model run to after the last."""
    import profilers.end_to_end
    from profilers.pace import Pace

    class Slowed(Pace):
        def full(self) -> bool:
            return False

    profilers.end_to_end.pace_of = lambda target: Slowed(lambda: 1.0, first_s=0.0)


FAULTS = {"full disk": _full_disk, "file limit": _file_limit, "no memory": _no_memory, "slow machine": _slow_machine}
"""What may go wrong in a run."""


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one core, as it was afterwards."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def fixed_prices() -> Iterator[None]:
    """The stopwatch replaced by `priced`, on a machine that is never slow, and nothing warmed up or cooled down for it."""
    import profilers.end_to_end
    import profilers.pace
    import profilers.sweep
    import profilers.timer

    places: list[tuple[Any, str, Any]] = [(profilers.timer, "take", priced), (profilers.end_to_end, "take", priced)]
    places += [(profilers.pace.Pace, "full", lambda _: True)]
    places += [(profilers.end_to_end, "LEAD", 0), (profilers.sweep, "_MOST_COPIES", 4)]
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _serve() -> None:
    with one_core(), fixed_prices():
        _answer()


def _answer() -> None:
    import alembic.command
    import lightgbm
    import matplotlib.backends.backend_agg
    import optuna
    import torch

    import search.explore
    import search.finalists
    import search.report.page
    import search.results
    import search.run
    from methods.model.load import load
    from profilers.kernels.build import library

    assert alembic and lightgbm and matplotlib and optuna and search  # imported for the processes to come
    torch.set_num_threads(1)
    library()
    load(sys.argv[1], Path(os.devnull))
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(asked["arguments"], asked["log"], asked["fault"])
        _say(pid)
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _child(arguments: list[str], log: str, fault: tuple[str, int] | None) -> None:
    import torch

    from search.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # makes torch's threads anew, which two threads that load weights could otherwise both try
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 99
    try:
        if fault:
            FAULTS[fault[0]](fault[1])
        code = main(arguments)
    except BaseException:  # noqa: BLE001 (a traceback is what the test has to see)
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
