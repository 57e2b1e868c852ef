"""How a command ends: exit codes, flags that are wrong, signals, errors in one line."""

from __future__ import annotations

import argparse
import dis
import errno
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from methods.errors import InputError
from search.memory import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from search.results import Answer

_LONG = re.compile(r"\S{400,}")
"""A value of a file in an error's text that nobody wants to read whole."""

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = tuple(_ROOT / name for name in ("methods", "profilers", "spaces", "predictors", "search"))

EXIT_CODES: Mapping[int, str] = MappingProxyType(
    {
        0: "success; of a run, that the objective is met",
        1: "the objective is not met; of `search cache --verify` and `search doctor`, that something is wrong",
        2: "bad input",
        3: "an internal error",
        4: "the objective is met, but an export that was asked for is missing",
        130: "Ctrl-C",
        143: "SIGTERM",
    }
)
"""How a command ends, by what it returns to the shell."""


def status(answer: Answer) -> int:
    """The exit code that an answer means."""
    if answer.verdict not in ("met", "unvalidated"):
        return 1
    return 4 if any(export.asked for export in answer.missing) else 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage stands in --help."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"search: {message}; see `{self.prog} --help`\n")


class Version(argparse.Action):
    """Prints the version and ends the program: found out only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Ends the program with status 0."""
        from search.environment import version

        sys.stdout.write(f"{version()}\n")
        parser.exit()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextmanager
def stopped_by_term() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; afterwards it does what it did before."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # the others may not say what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


GOING_ON = ("run", "profile", "materialize")
"""The commands that keep what they finished, and go on from there when they are given again."""


def interrupted(command: str) -> str:
    """What is said of a command that a signal ended."""
    kept = "; everything finished so far is kept, the same command goes on from there" if command in GOING_ON else ""
    return f"interrupted{kept}\n"


def ended_by(error: Exception, debug: bool) -> int:
    """Says on stderr what ended a command; 2 where it was asked for something that cannot be done, 3 where this program is at fault.

    debug: the traceback goes before it.
    """
    if debug:
        traceback.print_exception(error)
    if expected(error):
        sys.stderr.write(f"search: {one_line(error)}\n")
        return 2
    way_out = "see the traceback" if debug else "run again with --debug for the traceback"
    sys.stderr.write(f"search: internal error: {one_line(error)} ({type(error).__name__} in {_place(error)}); {way_out}\n")
    return 3


def expected(error: Exception) -> bool:
    """Whether an error's own text is meant for whoever gave the command: what the system says of a file, and what this program raises.

    Of a ValueError, KeyError or RuntimeError that is any `raise` of this program; one that comes from a library, or from a look-up of
    ours that nobody expected to fail, says nothing to anybody who does not know the code.
    """
    if isinstance(error, InputError) or out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.strerror:
        return True
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0] not in {folder.name for folder in _PACKAGES}
    steps = _steps(error)
    return (
        isinstance(error, ValueError | KeyError | RuntimeError | OSError | ImportError) and bool(steps) and _raised(steps[-1])
    )


def _raised(step: TracebackType) -> bool:
    """Whether a step of a traceback is a `raise` statement of this program."""
    return _own(step) and step.tb_frame.f_code.co_code[step.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _own(step: TracebackType) -> bool:
    path = Path(step.tb_frame.f_code.co_filename)
    return any(path.is_relative_to(folder) for folder in _PACKAGES)


def _steps(error: BaseException) -> list[TracebackType]:
    """The traceback from `main` to where the error was raised."""
    steps, step = [], error.__traceback__
    while step is not None:
        steps.append(step)
        step = step.tb_next
    return steps


def _place(error: BaseException) -> str:
    """`search/cli.py:12`: where this program was last, or where the error was raised if it was never in it."""
    steps = _steps(error)
    step = next((step for step in reversed(steps) if _own(step)), steps[-1] if steps else None)
    if step is None:
        return "an unknown place"
    path = Path(step.tb_frame.f_code.co_filename)
    return f"{path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name}:{step.tb_lineno}"


def one_line(error: BaseException) -> str:
    """What an error says at the command line, with the way out where it does not say so itself."""
    if out_of_memory(error):
        return "out of memory; use fewer --calibration-tokens or a shorter --sequence, what is finished is kept"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'disk'}: {error.strerror}; make room, the same command goes on from what is finished"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the Python package {error.name.partition('.')[0]} is not installed; install it with pip and repeat the command"
    text = _said(error)
    return " ".join(_LONG.sub(lambda found: f"{found[0][:120]}…{found[0][-80:]}", text).split()) or type(error).__name__


def _said(error: BaseException) -> str:
    """What an error says of itself; of a KeyError not the repr of it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
