"""Globs over module names: patterns of a small dialect that match in time linear in the name, whatever the pattern.

    *        any characters but a dot: `model.layers.*.mlp.down_proj`
    **       any characters: `**.down_proj`
    ?        one character but a dot
    [0-9a]   one of these characters, [!0-9] one of the others
    {a,b}    one of these, which may hold patterns themselves
    {3..7}   a number from 3 to 7, {0..} any number; `{0..5,8,11}` too

All else stands for itself. A pattern becomes a nondeterministic automaton, of which all states are followed at once (Thompson 1968).
`from_regex` turns the regular expressions of earlier policy files into globs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from methods.errors import InputError
from methods.typed import shown

LONGEST = 2**20
"""Characters of a pattern."""

_MOST_STATES = 2**20
_MOST_NUMBERS = 10_000
_DEEPEST = 16
_KEPT_STEPS = 50_000
_DIGITS = frozenset(string.digits)
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{0,9})")


class GlobError(InputError):
    """A pattern that is none; says what is wrong with it."""


@dataclass(frozen=True)
class _Some:
    """One character: one of `of`, or where `other`, one that is not."""

    of: frozenset[str]
    other: bool = False

    def __contains__(self, character: object) -> bool:
        return (character in self.of) is not self.other


@dataclass(frozen=True)
class _Run:
    """Any number of characters of a kind."""

    of: _Some


@dataclass(frozen=True)
class _Either:
    """One of several sequences."""

    choices: tuple[_Sequence, ...]


_Sequence = tuple["_Some | _Run | _Either", ...]
_PART = _Some(frozenset("."), other=True)
_ANYTHING = _Some(frozenset(), other=True)
_DIGIT = _Some(_DIGITS)


class Glob:
    """A pattern that names are matched against as wholes; raises GlobError where it is none."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._tests: list[_Some | None] = []
        self._targets: list[int] = []
        self._silent: list[tuple[int, ...]] = []
        self._accept = self._state(None, 0, ())
        self._start = self._closed([self._built(_Parser(text).whole(), self._accept)])
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, name: str) -> bool:
        """Whether the whole name is of the pattern; time linear in its length."""
        states = self._start
        for character in name:
            if not states:
                return False
            states = self._after(states, character)
        return self._accept in states

    def _after(self, states: frozenset[int], character: str) -> frozenset[int]:
        """The states after one more character; kept, since names begin alike."""
        known = self._steps.get((states, character))
        if known is None:
            passed = (s for s in states if (test := self._tests[s]) is not None and character in test)
            known = self._closed([self._targets[s] for s in passed])
            if len(self._steps) >= _KEPT_STEPS:
                self._steps.clear()
            self._steps[states, character] = known
        return known

    def _closed(self, states: Sequence[int]) -> frozenset[int]:
        """These states and all that are reached from them without a character."""
        found, todo = set(states), list(states)
        while todo:
            for state in self._silent[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)

    def _state(self, test: _Some | None, target: int, silent: tuple[int, ...]) -> int:
        if len(self._tests) >= _MOST_STATES:
            raise GlobError(f"match {shown(self.text)}: too long; write several rules")
        self._tests.append(test)
        self._targets.append(target)
        self._silent.append(silent)
        return len(self._tests) - 1

    def _built(self, sequence: _Sequence, end: int) -> int:
        """The state from which a sequence leads to `end`."""
        for item in reversed(sequence):
            if isinstance(item, _Some):
                end = self._state(item, end, ())
            elif isinstance(item, _Run):
                end = self._state(item.of, len(self._tests), (end,))  # its target is itself
            else:
                end = self._state(None, 0, tuple(self._built(choice, end) for choice in item.choices))
        return end


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise GlobError(f"match {shown(text)}: longer than {LONGEST} characters; write several rules")
        self._text, self._at = text, 0

    def whole(self) -> _Sequence:
        return tuple(self._items("", 0))

    def _fail(self, what: str) -> NoReturn:
        raise GlobError(f"match {shown(self._text)}: {what}; see the dialect in search/reference.md")

    def _items(self, ends: str, depth: int) -> Iterator[_Some | _Run | _Either]:
        """The items up to one of the characters `ends`, or to the end of the text."""
        while self._at < len(self._text) and self._text[self._at] not in ends:
            character = self._text[self._at]
            self._at += 1
            if character == "*":
                both = self._text[self._at : self._at + 1] == "*"
                self._at += both
                yield _Run(_ANYTHING if both else _PART)
            elif character == "?":
                yield _PART
            elif character == "[":
                yield self._characters()
            elif character == "{":
                yield self._choices(depth + 1)
            elif character in "]}":
                self._fail(f"{character} closes nothing")
            else:
                yield _Some(frozenset(character))

    def _characters(self) -> _Some:
        end = self._text.find("]", self._at + 1 + self._text.startswith("!", self._at))
        if end < 0:
            self._fail("[ is not closed")
        inside, self._at = self._text[self._at : end], end + 1
        other, found, index = inside.startswith("!"), set(), 0
        inside = inside[other:]
        while index < len(inside):
            first, last = (
                inside[index],
                inside[index + 2] if inside[index + 1 : index + 2] == "-" and inside[index + 2 :] else "",
            )
            if last and (last < first or ord(last) > 127):
                self._fail(f"{first}-{last} is no range of characters")
            found |= {chr(code) for code in range(ord(first), ord(last) + 1)} if last else {first}
            index += 3 if last else 1
        return _Some(frozenset(found), other)

    def _choices(self, depth: int) -> _Either:
        if depth > _DEEPEST:
            self._fail(f"braces are nested more than {_DEEPEST} deep")
        choices: list[_Sequence] = []
        while True:
            choices += self._numbers() or [tuple(self._items(",}", depth))]
            closing = self._text[self._at : self._at + 1]
            if not closing:
                self._fail("{ is not closed")
            self._at += 1
            if closing == "}":
                return _Either(tuple(choices))

    def _numbers(self) -> list[_Sequence]:
        """The numbers of a range such as `3..7` that is a whole choice; none where there is no range here."""
        match = _RANGE.match(self._text, self._at)
        if match is None or self._text[match.end() : match.end() + 1] not in (",", "}"):
            return []
        self._at = match.end()
        low, high = int(match[1]), int(match[2] or -1)
        if high < 0 and low == 0:
            return [(_DIGIT, _Run(_DIGIT))]
        if high < 0 or not low <= high < low + _MOST_NUMBERS:
            self._fail(f"{match[0]} is no range of at most {_MOST_NUMBERS} numbers, nor 0.., which is any number")
        return [tuple(_Some(frozenset(digit)) for digit in str(number)) for number in range(low, high + 1)]


def numbers(found: Sequence[int]) -> str:
    """Ascending numbers as a glob: `5`, `{3..7,9}`."""
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [part for run in runs for part in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(str, run))]
    return parts[0] if len(found) == 1 else f"{{{','.join(parts)}}}"


def either(globs: Sequence[str]) -> str:
    """One of several globs."""
    return globs[0] if len(globs) == 1 else f"{{{','.join(globs)}}}"


def is_regex(text: str) -> bool:
    """Whether a pattern is a regular expression as earlier policy files hold: no module name and no glob has these characters."""
    return bool(set(text) & set("\\(|)+^$")) or text.startswith(".")


_PIECE = re.compile(
    r"(?P<number>(?:\\d|\[0-9\])\+)|(?P<digit>\\d)(?![*+?{])|(?P<anything>\.\*)|(?P<part>\[\^(?:\\?\.)\]\*)|(?P<open>\((?:\?:)?)"
    r"|(?P<close>\))(?![*+?{])|(?P<or>\|)|(?P<dot>\\?\.)(?![*+?{])|(?P<set>\[[A-Za-z0-9_-]+\])(?![*+?{])"
    r"|(?:\\(?P<escaped>[^A-Za-z0-9*?\[\]{},])|(?P<plain>[A-Za-z0-9_-]))(?![*+?{])"
)
_AS_GLOB = {
    "number": "{0..}",
    "digit": "[0-9]",
    "anything": "**",
    "part": "*",
    "open": "{",
    "close": "}",
    "or": ",",
    "dot": ".",
}


def from_regex(text: str) -> str:
    """The glob that says the same as a regular expression of the kind that policy files used to hold; raises GlobError for others.

    Read are characters, escaped ones, `\\d`, `\\d+`, `.*`, `[^.]*`, sets without a repetition, and groups of alternatives without one. A
    bare dot stands for a dot.
    """
    whole = text.removeprefix("^").removesuffix("$")
    found, at, depth = [], 0, 0
    while at < len(whole):
        match = _PIECE.match(whole, at)
        kind = match.lastgroup if match else None
        depth += {"open": 1, "close": -1}.get(kind or "", 0)
        if match is None or kind is None or depth < 0 or (kind == "or" and depth == 0):
            raise GlobError(
                f"match {shown(text)} is a regular expression with more than names, \\d+, .* and (a|b) (at {shown(whole[at:])}); "
                "write a glob instead, such as 'model.layers.*.mlp.{up,down}_proj', or '**' for whatever it is"
            )
        found.append(_AS_GLOB.get(kind, match[0].removeprefix("\\")))
        at = match.end()
    if depth:
        raise GlobError(
            f"match {shown(text)}: a group is not closed; write a glob such as 'model.layers.*.mlp.{{up,down}}_proj'"
        )
    return "".join(found)
