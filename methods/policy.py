"""Policies: what is decided at every site of a model, as hashable values. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import starmap

from methods.typed import json_of, read

Knob = bool | int | float | str
"""The value of a knob; JSON-serialisable."""


@dataclass(frozen=True, order=True)
class Decision:
    """A method's name and its knobs at one site; `knobs` are sorted pairs.

    A quantizing decision has the knob `format` (a name that `methods.formats.parse_format` reads).
    """

    method: str
    knobs: tuple[tuple[str, Knob], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "knobs", tuple(sorted(self.knobs)))

    @classmethod
    def of(cls, method: str, **knobs: Knob) -> Decision:
        """`Decision.of("gptq", format="w4a8-g64")`."""
        return cls(method, tuple(knobs.items()))

    def knob(self, name: str, default: Knob | None = None) -> Knob | None:
        """The value of one knob, or `default` where it is not set."""
        return dict(self.knobs).get(name, default)

    @property
    def label(self) -> str:
        """`gptq:format=w4a8-g64`: stable, readable and unique."""
        knobs = ",".join(f"{name}={_text(value)}" for name, value in self.knobs)
        return f"{self.method}:{knobs}" if knobs else self.method

    @classmethod
    def parse(cls, label: str) -> Decision:
        """Inverse of `label`; raises ValueError on anything else."""
        method, _, rest = label.partition(":")
        if not method:
            raise ValueError(f"decision {label!r}: no method name; write METHOD or METHOD:knob=value,…")
        pairs = []
        for item in filter(None, rest.split(",")):
            name, equals, text = item.partition("=")
            if not equals:
                raise ValueError(f"decision {label!r}: {item!r} is not knob=value")
            pairs.append((name, _value(text)))
        return cls(method, tuple(pairs))


def _text(value: Knob) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str) -> Knob:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


_Decisions = tuple[tuple[str, tuple[tuple[str, Knob], ...]], ...]


@dataclass(frozen=True)
class _Canonical:
    """The canonical JSON of a policy: methods with their knobs."""

    sites: Mapping[str, _Decisions]
    model: _Decisions


DENSE = Decision("none")
"""Leave the site as it is stored."""


@dataclass(frozen=True)
class Policy:
    """The decisions of all sites (those absent stay dense) and of the model as a whole."""

    sites: Mapping[str, tuple[Decision, ...]] = field(default_factory=dict)
    model: tuple[Decision, ...] = ()

    def canonical(self) -> str:
        """Canonical JSON: sorted, dense sites dropped, so that equal policies have equal text."""
        sites = {
            site: [[d.method, [list(pair) for pair in d.knobs]] for d in decisions]
            for site, decisions in sorted(self.sites.items())
            if decisions and decisions != (DENSE,)
        }
        model = [[d.method, [list(pair) for pair in d.knobs]] for d in self.model]
        return json.dumps({"sites": sites, "model": model}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_canonical(cls, text: str) -> Policy:
        """Inverse of `canonical`; raises ValueError where the text is not that of a policy."""
        data = read(_Canonical, json_of(text, "policy"), "policy")
        sites = {site: tuple(starmap(Decision, items)) for site, items in data.sites.items()}
        return cls(sites, tuple(starmap(Decision, data.model)))

    def key(self) -> str:
        """Content hash: 16 hex digits of the SHA-256 of `canonical()`."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def at(self, site: str) -> tuple[Decision, ...]:
        """The decisions of one site, `(DENSE,)` where none was taken."""
        return self.sites.get(site) or (DENSE,)

    @classmethod
    def uniform(cls, sites: Mapping[str, Decision] | list[str], decision: Decision | None = None) -> Policy:
        """The same decision everywhere, or a mapping of one decision a site."""
        if isinstance(sites, Mapping):
            return cls({site: (d,) for site, d in sites.items()})
        if decision is None:
            raise ValueError("Policy.uniform: a list of sites needs the decision that all of them take")
        return cls({site: (decision,) for site in sites})
