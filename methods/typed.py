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
_AS_IT_IS = (str, bool, float)
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
    found: Value = _Reading(str(file), way_out, parsers or {}, strict).read(kind, value, ())
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


def text_of(path: Path, way_out: str = "") -> str:
    """The text of a file in UTF-8; raises WrongValue, naming it, where it is none, OSError where there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WrongValue(path, "", f"not a text in UTF-8 (byte {error.start})", way_out) from None


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


_Place = tuple[str | int, ...]
_arguments = functools.cache(get_args)


@dataclass(frozen=True)
class _Reading:
    """One file that is read: its name, and what its errors say."""

    file: str
    way_out: str
    parsers: Parsers
    strict: bool

    def fail(self, place: _Place, expected: str, value: object) -> NoReturn:
        self.refuse(place, f"expected {expected}, found {shown(value)}")

    def refuse(self, place: _Place, what: str) -> NoReturn:
        raise WrongValue(self.file, _written(place), what, self.way_out)

    def read(self, kind: Any, value: object, place: _Place) -> Any:
        if type(value) is kind and kind in _AS_IT_IS:
            return value
        if kind in self.parsers:
            return self.parsed(kind, value, place)
        return getattr(self, _how(kind))(kind, value, place)

    def anything(self, kind: Any, value: object, place: _Place) -> Any:
        return value

    def literal(self, kind: Any, value: object, place: _Place) -> Any:
        if any(type(value) is type(one) and value == one for one in _arguments(kind)):
            return value
        return self.fail(place, words(kind), value)

    def parsed(self, kind: Any, value: object, place: _Place) -> Any:
        text = self.scalar(str, value, place)
        try:
            return self.parsers[kind](text)
        except ValueError as error:
            self.refuse(place, str(error))

    def scalar(self, kind: Any, value: object, place: _Place) -> Any:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if isinstance(value, float) or value in _INT else self.fail(place, "a number", value)
        if kind is int and isinstance(value, float) and value in _INT and value.is_integer():
            return int(value)
        if kind is not float and type(value) is kind and (kind is not int or value in _INT):
            return value
        return self.fail(place, words(kind), value)

    def bounded(self, kind: Any, value: object, place: _Place) -> Any:
        plain, *ranges = _arguments(kind)
        if type(value) is plain and all(value in allowed for allowed in ranges):
            return value
        try:
            found = self.read(plain, value, place)
        except WrongValue as error:
            if error.place == _written(place):
                self.fail(place, words(kind), value)
            raise
        if any(found not in allowed for allowed in ranges):
            self.fail(place, words(kind), value)
        return found

    def either(self, kind: Any, value: object, place: _Place) -> Any:
        """The kind of a union that is the value's own, or the first that fits; else the error of one that went into the value."""
        deepest: WrongValue | None = None
        for one in sorted(_arguments(kind), key=lambda one: type(value) is not one):
            try:
                return self.read(one, value, place)
            except WrongValue as error:
                deepest = error if error.place != _written(place) else deepest
        if deepest is not None:
            raise deepest
        return self.fail(place, words(kind), value)

    def named(self, kind: Any, value: object, place: _Place) -> Any:
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
                self.fail((*place, name), words(fields[name]), _MISSING)
        found = {name: self.read(fields[name], value[name], (*place, name)) for name in fields if name in value}
        if not dataclasses.is_dataclass(kind):
            return {**rest, **found}
        make: Any = kind
        try:
            return make(**found)
        except WrongValue:
            raise
        except ValueError as error:
            self.refuse(place, str(error))

    def fixed(self, kind: Any, value: object, place: _Place) -> Any:
        kinds = _arguments(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            self.fail(place, words(kind), value)
        return tuple(self.read(of, item, (*place, i)) for i, (of, item) in enumerate(zip(kinds, value, strict=True)))

    def many(self, kind: Any, value: object, place: _Place) -> Any:
        if not isinstance(value, list | tuple):
            self.fail(place, words(kind), value)
        of, whole = (_arguments(kind) or (Any,))[0], get_origin(kind) or kind
        items = [self.read(of, item, (*place, index)) for index, item in enumerate(value)]
        return items if whole is list else frozenset(items) if whole is frozenset else tuple(items)

    def mapping(self, kind: Any, value: object, place: _Place) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.fail(place, "an object", value)
        for name in value:
            if not isinstance(name, str):
                self.refuse(place, f"expected names that are text, found {shown(name)}")
        of = (_arguments(kind) or (str, Any))[1]
        return {name: self.read(of, item, (*place, name)) for name, item in value.items()}


@functools.cache
def _how(kind: Any) -> str:
    """The method of `_Reading` that reads a kind."""
    origin = get_origin(kind)
    if kind in (Any, object):
        return "anything"
    if kind in _SCALARS:
        return "scalar"
    if origin in (Union, types.UnionType):
        return "either"
    if origin in (Annotated, Literal):
        return "bounded" if origin is Annotated else "literal"
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return "named"
    whole = origin or kind
    if isinstance(whole, type) and issubclass(whole, Mapping):
        return "mapping"
    if whole not in (tuple, list, frozenset, Sequence):
        raise TypeError(f"{kind!r} is no kind that stands in a file")
    return "fixed" if whole is tuple and get_args(kind) and Ellipsis not in get_args(kind) else "many"


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
        optional = {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is typing.NotRequired}
        return {**hints, **optional}, tuple(name for name in hints if name not in optional)
    own = [item for item in dataclasses.fields(kind) if item.init]
    required = [item.name for item in own if item.default is item.default_factory is dataclasses.MISSING]
    return {item.name: hints[item.name] for item in own}, tuple(required)


def _written(place: _Place) -> str:
    """`sites[3].options[0].ms`."""
    text = ""
    for step in place:
        name = step if isinstance(step, int) or len(step) <= _LONGEST else f"{step[:_LONGEST]}…"
        text += f"[{name}]" if isinstance(step, int) else f".{name}" if text else str(name)
    return text
