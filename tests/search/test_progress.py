"""Progress on a terminal and off it: time left, what is best so far, and no line that says nothing."""

import io
import re
import threading

import pytest

from search import progress as module
from search.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_file_gets_a_line_now_and_then(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(out)
    with progress.bar("evaluations") as update:
        for done in range(1, 61):
            clock.now += 1
            progress.best = "best so far: solver, KL 0.01, 20 ms modelled" if done > 20 else ""
            update(done, 60)
    lines = out.getvalue().splitlines()
    assert lines[:2] == [
        "  evaluations: 15/60, 0:45 left",
        "  evaluations: 30/60, 0:30 left; best so far: solver, KL 0.01, 20 ms modelled",
    ]
    assert lines[-1] == "[1:00] evaluations: 1:00" and len(lines) == 5
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_what_an_earlier_process_did_says_nothing_of_the_time_left(clock: Clock) -> None:
    """Twenty blocks were kept, each of the other ten takes a minute."""
    out = io.StringIO()
    with Progress(out).bar("calibration") as update:
        clock.now += 20
        update(20, 30, 20)
        for done in range(21, 31):
            clock.now += 60
            update(done, 30, 20)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["  calibration: 20/30", "  calibration: 21/30, 12:00 left"]
    assert lines[5] == "  calibration: 25/30, 5:20 left"


def test_a_step_says_its_place_and_what_follows(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(out)
    progress.step("map")
    progress.follow(("table", "map", "search"))
    for name in ("table", "map", "map", "something else", "search"):
        progress.step(name)
    assert out.getvalue().splitlines() == [
        "[0:00] step 1 of 3: table; then map, search",
        "[0:00] step 2 of 3: map; then search",
        "[0:00] step 3 of 3: search",
    ]


def test_a_terminal_gets_one_line_that_is_redrawn_and_fits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    progress = Progress(out)
    progress.best = "best so far: " + "x" * 80
    with progress.bar("evaluations") as update:
        clock.now += 1
        update(1, 2)
        progress.say("something else")
        clock.now += 1
        update(2, 2)
    drawn = re.findall(r"\r\x1b\[K([^\r]+)", out.getvalue())
    assert drawn[0].startswith("  evaluations: 1/2, 0:01 left") and len(drawn[0]) == 39
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\r\x1b[K")


def test_what_is_short_leaves_no_line_and_what_fails_none_either(clock: Clock) -> None:
    out, before = io.StringIO(), threading.active_count()
    progress = Progress(out)
    with progress.bar("quick") as update:
        update(1, 1)
    with progress.busy("quick too"):
        clock.now += 1
    with pytest.raises(ValueError, match="broken"), progress.busy("long and broken"):
        clock.now += 100
        raise ValueError("broken")
    assert out.getvalue() == ""
    assert threading.active_count() == before


def test_what_cannot_be_counted_says_how_long_it_took(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUIET_EVERY_S", 0.01)
    out, drawn = io.StringIO(), threading.Event()
    write = out.write
    monkeypatch.setattr(out, "write", lambda text: (write(text), drawn.set())[0])
    with Progress(out).busy("exporting"):
        clock.now += 65
        assert drawn.wait(30)
    lines = out.getvalue().splitlines()
    assert lines[0] == "  exporting: 1:05 so far" and lines[-1] == "[1:05] exporting: 1:05"


def test_quiet_is_quiet(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(out, quiet=True)
    progress.say("something")
    with progress.bar("bar") as update, progress.busy("busy"):
        clock.now += 100
        update(1, 2)
    assert out.getvalue() == ""
