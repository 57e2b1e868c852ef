"""`ModelMethod`: what can be decided for a model as a whole, before anything at its sites. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from methods.formats.format import parse_format
from methods.method import Source
from methods.policy import Knob
from methods.recipes.recipe import KnobSpec


@dataclass(frozen=True)
class ModelMethod:
    """A named rewriting of the whole model; `methods.rotate.model.transform_model` does it, and says which models allow it.

    format: the default of its knob `format`, "" where it has none; rotates: it turns weights, which `methods.rotate` does.
    """

    name: str
    summary: str
    source: Source
    knobs: Mapping[str, KnobSpec] = field(default_factory=dict)
    format: str = ""
    rotates: bool = False

    def resolve(self, knobs: Mapping[str, Knob]) -> dict[str, Knob]:
        """The knobs with defaults filled in; raises ValueError naming what is allowed for an unknown knob, value or format."""
        defaults: dict[str, Knob] = {"format": self.format} if self.format else {}
        defaults |= {name: spec.default for name, spec in self.knobs.items()}
        for name, value in knobs.items():
            if name not in defaults:
                raise ValueError(f"{self.name}: unknown knob {name!r}; allowed are {', '.join(defaults)}")
            if name == "format":
                parse_format(str(value))
            elif not self.knobs[name].allows(value):
                raise ValueError(f"{self.name}: {name}={value!r} is not allowed; use {self.knobs[name].text}")
        return {**defaults, **knobs}
