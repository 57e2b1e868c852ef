"""The typed reader: what fits is read as annotated, what does not is one line with file, place, kind, value and way out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from methods.errors import InputError
from methods.policy import DENSE, Policy
from methods.typed import AtLeastOne, Finite, Positive, Range, Share, WrongValue, json_of, read, read_json


@dataclass(frozen=True)
class Part:
    """Something inside of something."""

    name: str
    ms: Positive
    share: Share = 1.0


class Facts(TypedDict):
    """A mapping of which two names are known."""

    label: str
    threads: NotRequired[int]


@dataclass(frozen=True)
class Whole:
    """Every kind there is."""

    parts: tuple[Part, ...]
    pair: tuple[int, str]
    kind: Literal["a", "b"] = "a"
    facts: Facts = field(default_factory=lambda: Facts(label=""))
    scores: Mapping[str, float] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    best: Part | None = None
    size: int | list[int] = 0
    layers: Annotated[int, Range(1, 8)] = 1
    tail: float = math.nan
    rest: Any = None

    def __post_init__(self) -> None:
        if self.kind == "b" and not self.parts:
            raise ValueError("b needs parts")


GOOD: dict[str, Any] = {
    "parts": [{"name": "x", "ms": 1}, {"name": "y", "ms": 2.5, "share": 0.5}],
    "pair": [3, "z"],
    "kind": "b",
    "facts": {"label": "l", "threads": 2, "of a later version": True},
    "scores": {"s": 1, "t": math.inf},
    "names": ["n", "m"],
    "best": {"name": "x", "ms": 1},
    "size": [1, 2],
    "layers": 8.0,
    "rest": {"any": [None]},
}


def test_every_kind_is_read_as_annotated() -> None:
    found = read(Whole, GOOD, "f.json")
    assert found.parts == (Part("x", 1.0), Part("y", 2.5, 0.5)) and isinstance(found.parts[0].ms, float)
    assert (found.pair, found.kind, found.facts) == ((3, "z"), "b", GOOD["facts"])
    assert (found.scores, found.names, found.best) == ({"s": 1.0, "t": math.inf}, {"n", "m"}, Part("x", 1.0))
    assert found.size == [1, 2] and found.layers == 8 and type(found.layers) is int
    assert math.isnan(found.tail) and found.rest == {"any": [None]}
    assert read(Whole, {"parts": [], "pair": [1, ""], "size": 4}, "f").size == 4  # what is absent takes its default


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        ({"parts": None}, "parts", "expected a list, found null"),
        ({"parts": [{"name": "x", "ms": 1}, 5]}, "parts[1]", "expected an object, found 5"),
        ({"parts": [{"name": "x", "ms": "fast"}]}, "parts[0].ms", "expected a number above 0, found 'fast'"),
        ({"parts": [{"name": "x", "ms": 0}]}, "parts[0].ms", "expected a number above 0, found 0"),
        ({"parts": [{"name": "x", "ms": math.nan}]}, "parts[0].ms", "expected a number above 0, found nan"),
        ({"parts": [{"name": "x", "ms": 1, "share": 1.5}]}, "parts[0].share", "expected a number from 0 to 1, found 1.5"),
        ({"parts": [{"ms": 1}]}, "parts[0].name", "expected text, found nothing"),
        ({"parts": [{"name": True, "ms": 1}]}, "parts[0].name", "expected text, found true"),
        ({"parts": [{"name": "x", "ms": True}]}, "parts[0].ms", "expected a number above 0, found true"),
        ({"parts": [{"name": "x", "ms": 1, "shar": 1}]}, "parts[0]", "unknown name 'shar'; did you mean 'share'?"),
        ({"pair": [1]}, "pair", "expected a list of 2, found a list of 1"),
        ({"pair": ["1", "z"]}, "pair[0]", "expected a whole number, found '1'"),
        ({"pair": [1.5, "z"]}, "pair[0]", "expected a whole number, found 1.5"),
        ({"pair": [10**5000, "z"]}, "pair[0]", "found a whole number of 16610 bits"),
        ({"kind": "c"}, "kind", "expected one of 'a', 'b', found 'c'"),
        ({"kind": ["a"]}, "kind", "expected one of 'a', 'b', found a list of 1"),
        ({"facts": {"threads": 1}}, "facts.label", "expected text, found nothing"),
        ({"facts": {"label": "l", "threads": []}}, "facts.threads", "expected a whole number, found a list of 0"),
        ({"scores": {"s": {}}}, "scores.s", "expected a number, found an object with 0 names"),
        ({"scores": {"s": 10**5000}}, "scores.s", "expected a number, found a whole number of 16610 bits"),
        ({"scores": {3: 1.0}}, "scores", "expected names that are text, found 3"),
        ({"names": "nm"}, "names", "expected a list, found 'nm'"),
        ({"best": {"name": "x", "ms": -1}}, "best.ms", "expected a number above 0, found -1"),
        ({"best": 3}, "best", "expected an object or null, found 3"),
        ({"size": [1, "2"]}, "size[1]", "expected a whole number, found '2'"),
        ({"size": "2"}, "size", "expected a whole number or a list, found '2'"),
        ({"layers": 9}, "layers", "expected a whole number from 1 to 8, found 9"),
        ({"parts": []}, "", "b needs parts"),
        ({"x" * 500: 1}, "", "unknown name 'xxx"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(WrongValue) as raised:
        read(Whole, {**GOOD, **change}, "folder/f.json", "write it again")
    message = str(raised.value)
    assert raised.value.place == place
    assert message.startswith("folder/f.json: " + (f"{place}: " if place else "")) and message.endswith("; write it again")
    assert said in message and len(message) < 300 and "\n" not in message


def test_it_is_an_input_error_and_a_value_error() -> None:
    assert issubclass(WrongValue, InputError) and issubclass(InputError, ValueError)


def test_names_of_other_programs_are_passed_over_where_they_may_be() -> None:
    assert read(Part, {"name": "x", "ms": 1, "theirs": []}, "f", strict=False) == Part("x", 1.0)


def test_text_is_parsed_by_what_belongs_to_its_kind() -> None:
    policy = Policy.uniform(["a"], DENSE)
    parsers = {Policy: Policy.from_canonical}
    assert read(tuple[Policy, ...], [policy.canonical()], "f", "", parsers)[0].key() == policy.key()
    with pytest.raises(WrongValue, match=r"^f: \[0\]: .*Expecting value"):
        read(tuple[Policy, ...], ["nothing"], "f", "", parsers)
    with pytest.raises(WrongValue, match=r"^f: \[0\]: expected text, found 5"):
        read(tuple[Policy, ...], [5], "f", "", parsers)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"1" * 5000, b'"\xed\xa0\x80"', b"nul"]
)
def test_what_is_no_json_is_one_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(text)
    with pytest.raises(WrongValue, match=r"f\.json: .*; write it again$") as raised:
        read_json(Part, path, "write it again")
    assert "\n" not in str(raised.value)


def test_ranges_say_what_they_hold() -> None:
    assert 8 in Range(1, 8) and 0 not in Range(0, above=True) and math.inf not in Range() and "8" not in Range(1, 8)
    with pytest.raises(WrongValue, match="expected a number that is finite, found inf"):
        read(Finite, math.inf, "f")
    with pytest.raises(WrongValue, match="expected a whole number from 1, found 0"):
        read(AtLeastOne, 0, "f")
    with pytest.raises(WrongValue, match="up to 4, found 5"):
        read(Annotated[int, Range(high=4)], 5, "f")
    assert json_of("[1]", "f") == [1]
