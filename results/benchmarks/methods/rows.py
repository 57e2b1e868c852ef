"""What the benchmark runs: methods and formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from methods import catalogue
from methods.catalogue import METHODS, MODEL_METHODS
from methods.formats.format import parse_format
from methods.formats.twins import has_twin
from methods.method import Stage
from methods.model.structure import Site
from methods.policy import Decision
from methods.recipes.recipe import Recipe
from results.benchmarks.kv_cache import FORMATS as CACHES
from search.method_list import REPRESENTATIVES
from spaces.space import parsed_method, with_format

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

CHUNK = 8
"""Tokens that a call reads into a cache; they see each other as they are."""

SLOW = ("obq",)
"""Only run when asked for by name, as what learns is: d_in**3 a row."""


Kind = Literal["sites", "mofq", "rotated", "cache"]
"""What a row decides on: every site alone; the format of every site by its weights; the model before its sites; the cache."""

ROTATED = ("w4a8-token", "w4a4-token")
"""Formats after a rotation of the whole model, which is for rounded inputs."""

WHOLE = ("quarot+rtn", "quarot+gptq", "mofq", "kv-cache")
"""Run by default besides what is decided at sites; `spinquant`, which learns, when asked for by name."""


@dataclass(frozen=True)
class Row:
    """A method, written as on the command line, with a format; `ROTATION+METHOD` where the whole model is rotated before."""

    method: str
    format: str

    @property
    def kind(self) -> Kind:
        """What is decided."""
        if self.whole is not None:
            return "rotated" if MODEL_METHODS[self.whole.method].rotates else "cache"
        return "mofq" if self.method == "mofq" else "sites"

    @property
    def whole(self) -> Decision | None:
        """What is done to the model as a whole; learned for the row's format where it is learned for one."""
        decision = parsed_method(self.method.partition("+")[0])
        if decision.method not in MODEL_METHODS:
            return None
        learned = {"format": self.format} if MODEL_METHODS[decision.method].format else {}
        return Decision.of(decision.method, **{**learned, **dict(decision.knobs)})

    @property
    def decision(self) -> Decision:
        """What is decided at sites, where it can stand."""
        own = self.method.partition("+")[2] if self.whole else self.method
        return with_format("rtn" if self.kind == "mofq" else own or "rtn", parse_format(self.format))

    @property
    def family(self) -> str:
        """Of the method, or what it is decided for."""
        if self.kind == "sites":
            return METHODS[self.recipe].family
        return "cache" if self.kind == "cache" else "whole model"

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
    """The rows asked for; without methods the catalogue but `SLOW` and what learns, without formats the representative ones of each.

    A rotation alone is one with `rtn` after it. Raises SystemExit for a method that takes none of the formats.
    """
    named = [f"{name}+rtn" if _rotates(name) else name for name in methods]
    everything = (
        recipe.name
        for recipe in METHODS.values()
        if recipe.stage is Stage.QUANTIZE and not recipe.learner and recipe.name not in SLOW
    )
    names = named or [*everything, *WHOLE]
    rows = [Row(name, fmt) for name in names for fmt in _formats(name, formats)]
    if not formats and not methods:
        rows += [Row("rtn", row.format) for row in rows if row.kind in ("sites", "rotated")]
    rows = list(dict.fromkeys(rows))
    idle = [name for name in names if name not in {row.method for row in rows}]
    if idle:
        raise SystemExit(
            f"{', '.join(idle)}: none of {', '.join(formats) or 'the formats tried here'}; name others with --formats"
        )
    return rows


def _rotates(name: str) -> bool:
    own = MODEL_METHODS.get(parsed_method(name).method)
    return own is not None and own.rotates and "+" not in name


def _formats(name: str, asked: Sequence[str]) -> list[str]:
    """Of the formats asked for, or of those that stand for all, what a method takes."""
    kind = Row(name, "").kind
    if kind == "cache":
        return [fmt for fmt in asked or CACHES if fmt.startswith("kv-")]
    numbers = [fmt for fmt in asked if not fmt.startswith("kv-")]
    if asked and not numbers:
        return []
    if kind == "mofq":
        pairs = {fmt: parse_format(fmt) for fmt in numbers or ("w4a16-g64",)}
        return [name for name, fmt in pairs.items() if fmt.act_bits == 16 and has_twin(fmt)]
    recipe = METHODS[Row(name, FIRST[0]).recipe]
    if kind == "rotated":
        return [fmt for fmt in numbers or ROTATED if recipe.formats(parse_format(fmt)) is None]
    return [fmt for fmt in numbers or _representative(recipe) if recipe.formats(parse_format(fmt)) is None]


def _representative(recipe: Recipe) -> list[str]:
    tried = (*OWN.get(recipe.name, ()), *FIRST)
    first = [fmt for fmt in tried if recipe.formats(parse_format(fmt)) is None][:1]
    return [*filter(None, [recipe.format]), *first, *{"rtn": BASELINE, "gptq": BASELINE[:2]}.get(recipe.name, ())]
