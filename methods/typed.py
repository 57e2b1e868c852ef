"""The one reader of outside files: plain values of JSON, TOML or YAML as the annotated values that the program works with.

A kind is a frozen dataclass, a TypedDict (whose further names stay), `Mapping[str, …]`, `tuple[…, ...]` or one of fixed length, `list`,
`frozenset`, a `Literal`, a union, `bool`, `int`, `float`, `str`, `None` or `Any`; `Annotated[float, Range(…)]` bounds a number. A float
that is not so bounded may be NaN or infinite, an int has at most 63 bits. What is not of its kind raises `WrongValue`, which names the
file, the place in it (`sites[3].options[0].ms`), what is expected there, what was found, and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from methods.errors import InputError

Value = TypeVar("Value")


class WrongValue(InputError):
    """A value of an outside file that is not of the kind that belongs there; place: where it stands in the file, `sites[3].ms`."""

    def __init__(self, file: Path | str, place: str, what: str, way_out: str = "") -> None:
        self.place = place
        super().__init__(": ".join(filter(None, (str(file), place, what))) + (f"; {way_out}" if way_out else ""))


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, both included; above: `low` itself is not."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, int | float) and -math.inf < value < math.inf
        return number and self.low <= value <= self.high and not (self.above and value == self.low)  # type: ignore[operator]

    @property
    def words(self) -> str:
        """` from 1 to 8`, ` above 0`, or that it is finite."""
        begin = "" if self.low == -math.inf else f" above {self.low:.16g}" if self.above else f" from {self.low:.16g}"
        end = "" if self.high == math.inf else f"{' to' if begin else ' up to'} {self.high:.16g}"
        return begin + end or " that is finite"


Finite = Annotated[float, Range()]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0)]
AtLeastOne = Annotated[int, Range(1)]

Parsers = Mapping[Any, Callable[[str], Any]]
"""Kinds that stand as text in the file, with what reads the text (raising ValueError)."""

_INT = Range(-(2.0**63), 2.0**63)
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
_LONGEST = 60
_MISSING = object()


def read(
    kind: type[Value],
    value: object,
    file: Path | str,
    way_out: str = "",
    parsers: Parsers | None = None,
    *,
    strict: bool = True,
) -> Value:
    """The plain value as one of `kind`; raises WrongValue.

    way_out: what the error says last; strict: whether a name that a dataclass has not is an error, or passed over.
    """
    found: Value = _Reading(str(file), way_out, parsers or {}, strict).read(kind, value, "")
    return found


def read_json(
    kind: type[Value], path: Path, way_out: str = "", parsers: Parsers | None = None, *, strict: bool = True
) -> Value:
    """`read` of a JSON file; raises WrongValue, or OSError where there is no file."""
    return read(kind, json_of(path.read_bytes(), path, way_out), path, way_out, parsers, strict=strict)


def json_of(text: str | bytes, file: Path | str, way_out: str = "") -> Any:
    """The plain value of a JSON text; raises WrongValue, naming the file, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise WrongValue(file, "", f"not JSON ({reason})", way_out) from None


def shown(value: object) -> str:
    """A value of a file in few words."""
    if value is _MISSING:
        return "nothing"
    if isinstance(value, Mapping):
        return f"an object with {len(value)} names"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value not in _INT and not isinstance(value, bool):
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({type(value).__name__} of {len(text)} characters)"


@dataclass(frozen=True)
class _Reading:
    """One file that is read: its name, and what its errors say."""

    file: str
    way_out: str
    parsers: Parsers
    strict: bool

    def fail(self, place: str, expected: str, value: object) -> NoReturn:
        self.refuse(place, f"expected {expected}, found {shown(value)}")

    def refuse(self, place: str, what: str) -> NoReturn:
        raise WrongValue(self.file, place, what, self.way_out)

    def read(self, kind: Any, value: object, place: str) -> Any:
        if kind in (Any, object):
            return value
        if kind in self.parsers:
            return self.parsed(kind, value, place)
        if kind in _SCALARS:
            return self.scalar(kind, value, place)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self.bounded(kind, value, place)
        if origin in (Union, types.UnionType):
            return self.either(kind, value, place)
        if origin is Literal:
            return (
                value if any(value == a and type(value) is type(a) for a in arguments) else self.fail(place, words(kind), value)
            )
        if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)):
            return self.named(kind, value, place)
        return self.many(kind, origin or kind, arguments, value, place)

    def parsed(self, kind: Any, value: object, place: str) -> Any:
        text = self.scalar(str, value, place)
        try:
            return self.parsers[kind](text)
        except ValueError as error:
            self.refuse(place, str(error))

    def scalar(self, kind: Any, value: object, place: str) -> Any:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if isinstance(value, float) or value in _INT else self.fail(place, "a number", value)
        if kind is int and isinstance(value, float) and value in _INT and value.is_integer():
            return int(value)
        if kind is not float and type(value) is kind and (kind is not int or value in _INT):
            return value
        return self.fail(place, words(kind), value)

    def bounded(self, kind: Any, value: object, place: str) -> Any:
        plain, *ranges = get_args(kind)
        try:
            found = self.read(plain, value, place)
        except WrongValue as error:
            if error.place == place:
                self.fail(place, words(kind), value)
            raise
        if any(isinstance(allowed, Range) and found not in allowed for allowed in ranges):
            self.fail(place, words(kind), value)
        return found

    def either(self, kind: Any, value: object, place: str) -> Any:
        """The first kind of a union that fits; where none does, the error of the one that went deepest into the value."""
        deepest: WrongValue | None = None
        for one in get_args(kind):
            try:
                return self.read(one, value, place)
            except WrongValue as error:
                deepest = error if error.place != place else deepest
        if deepest is not None:
            raise deepest
        return self.fail(place, words(kind), value)

    def named(self, kind: Any, value: object, place: str) -> Any:
        if not isinstance(value, Mapping):
            self.fail(place, "an object", value)
        fields, required = _fields(kind)
        rest = {str(name): item for name, item in value.items() if name not in fields}
        if rest and self.strict and dataclasses.is_dataclass(kind):
            near = difflib.get_close_matches(next(iter(rest)), fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            self.refuse(place, f"unknown name {shown(next(iter(rest)))}; {hint}")
        for name in required:
            if name not in value:
                self.fail(_inside(place, name), words(fields[name]), _MISSING)
        found = {name: self.read(fields[name], value[name], _inside(place, name)) for name in fields if name in value}
        if not dataclasses.is_dataclass(kind):
            return {**rest, **found}
        make: Any = kind
        try:
            return make(**found)
        except WrongValue:
            raise
        except ValueError as error:
            self.refuse(place, str(error))

    def many(self, kind: Any, origin: Any, arguments: Sequence[Any], value: object, place: str) -> Any:
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self.mapping(arguments, value, place)
        if not isinstance(value, list | tuple):
            self.fail(place, words(kind), value)
        if origin is tuple and arguments and Ellipsis not in arguments:
            if len(value) != len(arguments):
                self.fail(place, words(kind), value)
            return tuple(self.read(k, item, f"{place}[{i}]") for i, (k, item) in enumerate(zip(arguments, value, strict=True)))
        of = arguments[0] if arguments else Any
        items = [self.read(of, item, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if origin is list else frozenset(items) if origin is frozenset else tuple(items)

    def mapping(self, arguments: Sequence[Any], value: object, place: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.fail(place, "an object", value)
        for name in value:
            if not isinstance(name, str):
                self.refuse(place, f"expected names that are text, found {shown(name)}")
        return {name: self.read(arguments[1] if arguments else Any, item, _inside(place, name)) for name, item in value.items()}


def words(kind: Any) -> str:
    """A kind as an error names it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Annotated:
        return words(arguments[0]) + "".join(a.words for a in arguments[1:] if isinstance(a, Range))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, arguments)))
    if origin is Literal:
        return ("" if len(arguments) == 1 else "one of ") + ", ".join(map(repr, arguments))
    if origin is tuple and arguments and Ellipsis not in arguments:
        return f"a list of {len(arguments)}"
    if origin in (tuple, list, frozenset, Sequence) or kind in (tuple, list, frozenset):
        return "a list"
    return "an object" if isinstance(origin or kind, type) else "a value"


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The kinds of a class' fields by name, and which of them have no default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if not dataclasses.is_dataclass(kind):
        plain = {name: get_args(hint)[0] if get_origin(hint) is typing.NotRequired else hint for name, hint in hints.items()}
        return plain, tuple(sorted(kind.__required_keys__))
    own = [item for item in dataclasses.fields(kind) if item.init]
    required = [item.name for item in own if item.default is item.default_factory is dataclasses.MISSING]
    return {item.name: hints[item.name] for item in own}, tuple(required)


def _inside(place: str, name: str) -> str:
    name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"
    return f"{place}.{name}" if place else name
