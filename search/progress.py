"""Progress on stderr: what is being done, how far it is, how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_EVERY_S = 0.2
_QUIET_EVERY_S = 15.0


class Progress:
    """Writes steps and a line that counts, with time left. On a terminal the line is redrawn, elsewhere repeated now and then."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._start = time.monotonic()
        self._live = self._stream.isatty()
        self._drawn = False

    def say(self, text: str) -> None:
        """One line, with the time since the start."""
        if self._quiet:
            return
        self._clear()
        elapsed = time.monotonic() - self._start
        self._stream.write(f"[{_clock(elapsed)}] {text}\n")
        self._stream.flush()

    @contextmanager
    def bar(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A function (done, total) that shows how far `name` is; a closing line says how long it took."""
        begun = time.monotonic()
        last = [begun]

        def update(done: int, total: int) -> None:
            now = time.monotonic()
            if self._quiet or now - last[0] < (_EVERY_S if self._live else _QUIET_EVERY_S):
                return
            last[0] = now
            left = (now - begun) / max(done, 1) * (total - done)
            self._draw(f"  {name}: {done}/{total}, {_clock(left)} left")

        yield update
        if time.monotonic() - begun > 2:
            self.say(f"{name}: {_clock(time.monotonic() - begun)}")
        else:
            self._clear()

    def _draw(self, text: str) -> None:
        if self._live:
            self._stream.write(f"\r\x1b[K{text}")
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
