"""Good plain values with one thing in them spoiled, in turn: what outside files hold when somebody or something changed them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from search.endings import expected, one_line

Place = tuple[str | int, ...]

MISSING = object()
WRONG = (
    None,
    "text",
    MISSING,
    [],
    math.nan,
    -1,
    {"a": {"b": [None]}},
    10**30,
    True,
    [[1]],
    math.inf,
    "",
    {},
    1.5,
    0,
    "x" * 3000,
)
"""Other types, nothing, and numbers that no file has a use for."""


@dataclass(frozen=True)
class Spoiled:
    """A value of which one place holds another value than it should, or none."""

    place: Place
    wrong: Any
    value: Any

    def __str__(self) -> str:
        return f"{self.place}: {'missing' if self.wrong is MISSING else repr(self.wrong)[:40]}"


def spoiled(value: Any, each: int = 3, most: int = 400) -> Iterator[Spoiled]:
    """The value with every place in it (the containers too) spoiled in `each` ways, which take turns; at most `most` of them, evenly."""
    found = [
        (place, WRONG[(index * each + turn) % len(WRONG)]) for index, place in enumerate(_places(value)) for turn in range(each)
    ]
    step = max(1, -(-len(found) // most))
    for place, wrong in found[::step]:
        yield Spoiled(place, wrong, _replaced(value, place, wrong))


def _places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every place of a value but the value itself; of long lists the first and the last."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(index, value[index]) for index in sorted({0, len(value) - 1}) if value]
    for name, item in items:
        yield (*at, name)
        yield from _places(item, (*at, name))


def _replaced(value: Any, place: Place, wrong: Any) -> Any:
    (first, *rest) = place
    inner = _replaced(value[first], tuple(rest), wrong) if rest else wrong
    if isinstance(value, dict):
        return {k: inner if k == first else item for k, item in value.items() if not (k == first and inner is MISSING)}
    return [inner if i == first else item for i, item in enumerate(value) if not (i == first and inner is MISSING)]


def outcome(read: Callable[[], object], named: str) -> str:
    """What reading a spoiled file came to: "" where it was read, else what is said; fails where that is no error for a user.

    named: what the error has to name.
    """
    try:
        read()
    except Exception as error:  # noqa: BLE001 (what it is has to be seen)
        assert expected(error), f"{type(error).__name__}: {error}"
        said = one_line(error)
        assert named in said and len(said) < 2000, said
        return said
    return ""
