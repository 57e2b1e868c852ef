"""What the benchmark runs: methods and formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from methods import catalogue
from methods.catalogue import METHODS
from methods.formats.format import parse_format
from methods.method import Stage
from methods.model.structure import Site
from methods.policy import Decision
from search.method_list import REPRESENTATIVES
from spaces.space import with_format

FIRST = (
    *(
        "w4a16-g64",
        "w4a16-g64-asym",
        "w4a8-token",
        "w8a8-token",
        "w8a8-tensor",
        "lut4a16",
        "bcq3a16-g64",
        "mxfp4a16",
        "fp8-token",
    ),
    *(name for names in REPRESENTATIVES.values() for name in names),
)
"""The first of these that a method takes is its row, but for `OWN`."""

OWN = {
    **dict.fromkeys(("smoothquant", "zeroquant", "llm-int8", "outlier-suppression"), ("w8a8-token", "w8a8-tensor")),
    **dict.fromkeys(("outlier-suppression-plus", "fptq", "smooth-gptq"), ("w4a8-token",)),
    **dict.fromkeys(("rptq", "peg"), ("w4a8-tensor",)),
    "qllm": ("w4a8-token",),
    "zeroquant-fp": ("e2m1ae4m3-token-g64",),
    "llm-fp4": ("e2m1ae2m1-tensor",),
    "four-six": ("nvfp4a4",),
    "block-hadamard": ("mxfp4a4",),
    "quip": ("w2a16",),
    "imatrix": ("q4_0",),
}
"""Formats that methods were made for; the first that is allowed."""

BASELINE = (
    *("w3a16-g64", "w2a16-g64-asym", "w8a16", "w8a8-token", "w4a8-token", "w4a8-g64", "fp8-tensor", "fp8-token", "fp8-block"),
    *("mxfp8a8", "mxfp4a16", "mxfp4a4", "nvfp4a16", "nvfp4a4", "nf4", "q8_0", "q4_0", "q4_1", "q3_k", "tern2a16-g64"),
)
"""What `rtn` is run in besides, as in every other format of the table, and `gptq` in the first two."""

SLOW = ("obq",)
"""Only run when asked for by name, as what learns is: d_in**3 a row."""


@dataclass(frozen=True)
class Row:
    """A method, written as on the command line, with a format."""

    method: str
    format: str

    @property
    def decision(self) -> Decision:
        return with_format(self.method, parse_format(self.format))

    @property
    def recipe(self) -> str:
        """The method's name without its knobs."""
        return self.decision.method

    @property
    def plain(self) -> Decision:
        """What stands at the sites that the method refuses: its rounding without the rest."""
        feeds_back = "feedback" in METHODS[self.recipe].rounder
        return Decision.of("gptq" if feeds_back else "rtn", format=self.format)

    def at(self, site: Site) -> Decision | None:
        """The decision at a site: the method's, or its plain rounding, or None where the format itself cannot stand."""
        return next((d for d in (self.decision, self.plain) if _takes(site, d)), None)


def _takes(site: Site, decision: Decision) -> bool:
    return catalogue.refuses(site, decision) is None


def chosen_rows(methods: Sequence[str], formats: Sequence[str]) -> list[Row]:
    """The rows asked for; without methods the catalogue but `SLOW` and what learns, without formats the representative ones of each."""
    names = methods or [
        recipe.name
        for recipe in METHODS.values()
        if recipe.stage is Stage.QUANTIZE and not recipe.learner and recipe.name not in SLOW
    ]
    rows = [Row(name, fmt) for name in names for fmt in formats or _representative(name)]
    if not formats and not methods:
        rows += [Row("rtn", row.format) for row in rows]
    rows = [row for row in dict.fromkeys(rows) if METHODS[row.recipe].formats(parse_format(row.format)) is None]
    idle = [name for name in names if name not in {row.method for row in rows}]
    if idle:
        raise SystemExit(
            f"{', '.join(idle)}: none of {', '.join(formats) or 'the formats tried here'}; name others with --formats"
        )
    return rows


def _representative(method: str) -> list[str]:
    recipe = METHODS[Row(method, FIRST[0]).recipe]
    tried = (*OWN.get(recipe.name, ()), *FIRST)
    own = [fmt for fmt in tried if recipe.formats(parse_format(fmt)) is None][:1]
    return [*own, *{"rtn": BASELINE, "gptq": BASELINE[:2]}.get(method, ())]
