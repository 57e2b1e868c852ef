"""Progress on stderr: what is being done, how far it is, how long it will take."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

_EVERY_S = 0.2
_QUIET_EVERY_S = 15.0
_SHORT_S = 2.0
"""What takes no longer leaves no line."""


class Update(Protocol):
    """Says how far something is."""

    def __call__(self, done: int, total: int, kept: int = 0) -> None:
        """kept: of those done, what an earlier process did: it took no time in this one, and says nothing of the time left."""


class Progress:
    """Writes steps and a line that counts, with time left. On a terminal the line is redrawn, elsewhere repeated now and then.

    best: the best that the search has found so far, in words; stands in every line that counts.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._start = time.monotonic()
        self._live = self._stream.isatty()
        self._drawn = False
        self._plan: Sequence[str] = ()
        self._at = ""
        self.best = ""

    def follow(self, plan: Sequence[str]) -> None:
        """The steps that lie ahead, by name and in order, for `step`."""
        self._plan, self._at = plan, ""

    def step(self, name: str) -> None:
        """One of the plan's steps begins: a line with its place and what still follows; none where it had begun."""
        if name not in self._plan or name == self._at:
            return
        self._at, place = name, self._plan.index(name)
        rest = self._plan[place + 1 :]
        self.say(f"step {place + 1} of {len(self._plan)}: {name}" + (f"; then {', '.join(rest)}" if rest else ""))

    def say(self, text: str) -> None:
        """One line, with the time since the start; none where there is nothing to say."""
        if self._quiet or not text:
            return
        self._clear()
        elapsed = time.monotonic() - self._start
        self._stream.write(f"[{_clock(elapsed)}] {text}\n")
        self._stream.flush()

    @contextmanager
    def bar(self, name: str) -> Iterator[Update]:
        """A function (done, total, kept) that shows how far `name` is; a closing line says how long it took."""
        begun = time.monotonic()
        last = [begun]

        def update(done: int, total: int, kept: int = 0) -> None:
            now = time.monotonic()
            if self._quiet or now - last[0] < (_EVERY_S if self._live else _QUIET_EVERY_S):
                return
            last[0] = now
            new = done - kept
            left = f", {_clock((now - begun) / new * (total - done))} left" if new > 0 else ""
            best = f"; {self.best}" if self.best else ""
            self._draw(f"  {name}: {done}/{total}{left}{best}")

        with self._closed(name, begun):
            yield update

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """What cannot be counted: says how long it has taken, now and then and when it is done."""
        begun, done = time.monotonic(), threading.Event()

        def show() -> None:
            while not done.wait(1 if self._live else _QUIET_EVERY_S):
                if time.monotonic() - begun > _SHORT_S:
                    self._draw(f"  {name}: {_clock(time.monotonic() - begun)} so far")

        thread = threading.Thread(target=show, daemon=True)
        if not self._quiet:
            thread.start()
        with self._closed(name, begun):
            try:
                yield
            finally:
                done.set()
                if not self._quiet:
                    thread.join()

    @contextmanager
    def _closed(self, name: str, begun: float) -> Iterator[None]:
        """Afterwards the line that counted is gone; what took long leaves one that says so, where it did not fail."""
        try:
            yield
        finally:
            self._clear()
        if time.monotonic() - begun > _SHORT_S:
            self.say(f"{name}: {_clock(time.monotonic() - begun)}")

    def _draw(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and only its end could be cleared
            self._stream.write(f"\r\x1b[K{text[:width]}")
            self._drawn = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._drawn = False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
