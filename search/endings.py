"""How a command ends that does not end well: flags that are wrong, signals, errors in one line."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from search.memory import out_of_memory


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


def one_line(error: BaseException) -> str:
    """What an error says at the command line, with the way out where it does not say so itself."""
    if out_of_memory(error):
        return "out of memory; use fewer --calibration-tokens or a shorter --sequence, what is finished is kept"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'disk'}: {error.strerror}; make room, the same command goes on from what is finished"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
