"""`search methods`: what the method library holds, in words computed from its entries. Imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from methods.catalogue import METHODS, MODEL_METHODS, method
from methods.formats.format import Format, parse_format
from methods.method import Source, Stage
from methods.model.structure import LayerSpec, Site
from methods.policy import Knob
from methods.recipes.cache import CacheMethod
from methods.recipes.model_method import ModelMethod
from methods.recipes.recipe import KnobSpec, Recipe

WIDTH = 100
_INT = [f"w{bits}{rest}" for bits in range(2, 9) for rest in ("a16", "a16-g64", "a8-token", "a8-g64", "a8-tensor")]
REPRESENTATIVES: Mapping[str, tuple[str, ...]] = {
    "int": (*_INT, *(f"{name}-asym" for name in _INT)),
    "fp8": ("fp8-tensor", "fp8-token", "fp8-block", "e4m3a16"),
    "fp6": ("e2m3a16-g64", "e3m2a16-g64"),
    "fp4": ("e2m1a16-g64", "e2m1a8-token-g64", "e2m1ae2m1-tensor"),
    "mx": ("mxfp4a16", "mxfp4a4", "mxfp4a8", "mxfp6e2m3a16", "mxfp6e3m2a6", "mxfp8a16", "mxfp8a8"),
    "nvfp4": ("nvfp4a16", "nvfp4a4"),
    "nf": ("nf4", "nf4-dq", "nf3a16-g64"),
    "gguf": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    "two-level scales": ("w4a16-g16-u4", "w4a8-token-g16-u6", "w3a16-g16-bi3-asym"),
    "ternary": ("tern2a16-g64",),
    "binary": ("bin1a16-g64",),
    "bcq": ("bcq2a16-g64", "bcq3a16-g64-asym"),
    "lut": ("lut3a16", "lut4a16", "lut3a16-whole", "lut4a16-whole"),
    "dense": ("bf16", "fp16", "fp32"),
}
"""Formats by family that stand for all of it, where a listing says which ones a method allows."""

CACHES = ("kv-bf16", "kv-fp8", "kv-int8", "kv-int4-g64", "kv-kivi2-g32", "kv-turbo3")
"""Formats that stand for those of key/value caches."""

WHOLE_MODEL = "whole model"

_LONE = Site("a site without a norm of its own", "o", 0, (LayerSpec("o", "o", 0, 768, 768),))
_NORMED = Site("a site behind a norm", "qkv", 0, (LayerSpec("q", "q", 0, 768, 768),), norm="norm")


def has_kernel(fmt: Format) -> bool:
    """Whether this project's kernels run the format, at shapes that they take."""
    return bool(fmt.dense) or fmt.plain or fmt.looked_up


def rows(names: Iterable[str] = (*METHODS, *MODEL_METHODS)) -> list[dict[str, Any]]:
    """Everything about the methods, as plain values; raises ValueError for an unknown name."""
    return [_row(MODEL_METHODS[name] if name in MODEL_METHODS else method(name)) for name in names]


def _row(entry: Recipe | ModelMethod) -> dict[str, Any]:
    return _site_row(entry) if isinstance(entry, Recipe) else _model_row(entry)


def _model_row(entry: ModelMethod) -> dict[str, Any]:
    cache = isinstance(entry, CacheMethod)
    simulated = entry.simulated({"format": CACHES[-1]}) if isinstance(entry, CacheMethod) else ""
    return {
        "name": entry.name,
        "summary": entry.summary,
        "class": WHOLE_MODEL,
        "stage": "cache" if cache else "before sites",
        "parts": {},
        "needs": ["text"] if entry.name == "spinquant" else [],
        "bits": ", ".join(CACHES) if cache else "what follows at the sites",
        "runs": "simulated" if simulated else "fused",
        "simulated": simulated,
        "knobs": _knobs(entry),
        "refuses": {},
        "limits": [],
        "source": _source(entry.source),
    }


def _site_row(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "class": recipe.family,
        "stage": recipe.stage.value,
        "parts": recipe.parts if recipe.stage is Stage.QUANTIZE else {},
        "needs": sorted(need.value for need in recipe.needs),
        "bits": bits(recipe),
        "runs": runs(recipe),
        "simulated": recipe.simulated,
        "knobs": _knobs(recipe),
        "refuses": refusals(recipe),
        "limits": [_limit(limit.knobs, limit.method, limit.with_knobs) for limit in recipe.limits],
        "source": _source(recipe.source),
    }


def _knobs(entry: Recipe | ModelMethod) -> dict[str, Any]:
    own = {"format": {"default": entry.format, "allowed": "a format"}} if entry.format else {}
    return {**own, **{name: _knob(spec) for name, spec in entry.knobs.items()}}


def _knob(spec: KnobSpec) -> dict[str, Any]:
    return {"default": spec.default, "allowed": spec.text}


def _limit(knobs: Mapping[str, Knob], other: str, with_knobs: Mapping[str, Knob]) -> str:
    return f"{_pairs(knobs) or 'its defaults'}: exactly {other}{f' with {_pairs(with_knobs)}' if with_knobs else ''}"


def _pairs(knobs: Mapping[str, Knob]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in knobs.items())


def _word(value: Knob) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _source(source: Source) -> str:
    where = f", {source.where}" if source.where else ""
    adapted = f"; adapted, the original was for {source.adapted}" if source.adapted else ""
    return f"{source.title} ({source.year}), {source.ref}{where}{adapted}"


def allowed(recipe: Recipe) -> dict[str, list[Format]]:
    """The representative formats that the recipe takes, by family; families of which it takes none are left out."""
    if recipe.stage is not Stage.QUANTIZE:
        return {}
    found = {}
    for family, names in REPRESENTATIVES.items():
        own = [fmt for fmt in map(parse_format, names) if recipe.formats(fmt) is None]
        if own:
            found[family] = own
    return found


def bits(recipe: Recipe) -> str:
    """Which formats the recipe takes: `int 2-8, fp8 (fp8-token), mx`; a family is whole unless formats follow in brackets."""
    found = allowed(recipe)
    whole = [family for family, formats in found.items() if len(formats) == len(REPRESENTATIVES[family])]
    grids = [family for family in REPRESENTATIVES if family != "dense"]
    if len(whole) > len(grids) / 2 and set(found) <= {*whole}:
        lacking = [family for family in grids if family not in whole]
        but = f" but {', '.join(lacking)}" if lacking else ""
        return f"every grid{but}{', dense dtypes' if 'dense' in whole else ''}"
    words = []
    for family, formats in found.items():
        if family == "int":
            words.append(_integers(formats))
        elif family in whole:
            words.append(family)
        else:
            words.append(f"{family} ({' '.join(fmt.name for fmt in formats)})")
    return ", ".join(words) or "the dtype as it is"


def _integers(formats: Sequence[Format]) -> str:
    restrictions = [
        text
        for text, excluded in (
            ("with offset", lambda fmt: fmt.symmetric),
            ("without offset", lambda fmt: not fmt.symmetric),
            ("inputs rounded", lambda fmt: fmt.act_bits == 16),
            ("inputs left alone", lambda fmt: fmt.act_bits != 16),
            ("one scale for all tokens", lambda fmt: fmt.act_rows == 1),
            ("in groups", lambda fmt: fmt.group == -1),
            ("a scale a channel", lambda fmt: fmt.group != -1),
        )
        if not any(excluded(fmt) for fmt in formats)
    ]
    widths, only = _ranges(sorted({fmt.bits for fmt in formats})), ", ".join(restrictions)
    return f"int {widths} ({only})" if only else f"int {widths}"


def _ranges(values: Sequence[int]) -> str:
    """`2-4, 8` as `2-4 8`."""
    runs_of: list[list[int]] = []
    for value in values:
        if runs_of and value == runs_of[-1][-1] + 1:
            runs_of[-1].append(value)
        else:
            runs_of.append([value])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs_of)


def runs(recipe: Recipe) -> str:
    """What executes the result: `int kernels`, `dense kernels`, or `simulated` where no kernel runs what it stores."""
    if recipe.simulated:
        return "simulated"
    if recipe.stage is Stage.NONE:
        return "dense kernels"
    formats = [fmt for own in allowed(recipe).values() for fmt in own if has_kernel(fmt)]
    return "int kernels" if any(not fmt.dense for fmt in formats) else "dense kernels" if formats else "simulated"


def refusals(recipe: Recipe) -> dict[str, str]:
    """Why formats and sites are refused, by what is: one format for each reason, and a site of either kind."""
    if recipe.stage is not Stage.QUANTIZE:
        return {}
    found: dict[str, str] = {}
    reasons: set[str] = set()
    for names in REPRESENTATIVES.values():
        for name in names:
            reason = recipe.formats(parse_format(name))
            if reason and (bare := reason.replace(name, "")) not in reasons:
                reasons.add(bare)
                found[name] = reason
    first = next((fmt for formats in allowed(recipe).values() for fmt in formats if fmt.divides(_LONE.d_in)), None)
    if first is not None:
        for site in (_LONE, _NORMED):
            reason = recipe.sites(site, recipe.resolve({"format": first.name}))
            if reason:
                found[site.name] = reason
    return found


_LEGEND = (
    "int kernels: integer grids of 2, 3, 4 or 8 bits and tables of at most 16 levels, inputs in 16 or 8 bits, run on kernels of their own; "
    "every other format, and what is simulated, runs decoded: its quality is true and it has no latency. `search methods NAME` shows one "
    "method."
)


def listing() -> str:
    """All methods by class: a line of parts, one of what it does and one of formats, at most `WIDTH` characters wide."""
    lines = []
    everything = rows()
    for family in dict.fromkeys(row["class"] for row in everything):
        lines += ["", family]
        for row in (row for row in everything if row["class"] == family):
            parts = " + ".join(row["parts"].values())
            head = f"  {row['name']:<25} {row['stage']:<12} {row['runs']:<13} "
            lines += textwrap.wrap(f"{head}{parts}", WIDTH, subsequent_indent=" " * len(head), drop_whitespace=True)
            needs = f"needs {', '.join(row['needs'])}" if row["needs"] else ""
            source = (MODEL_METHODS.get(row["name"]) or METHODS[row["name"]]).source
            published = f"{source.ref}, {source.year}" if source.year else ""
            for text in (row["summary"], "; ".join(filter(None, (row["bits"], needs, published)))):
                lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
    lines += ["", *textwrap.wrap(_LEGEND, WIDTH)]
    return "\n".join(lines[1:])


def details(name: str) -> str:
    """One method: what it is made of, its knobs with their ranges, what it refuses, its limits and its source."""
    (row,) = rows([name])
    fields = [
        ("class", row["class"]),
        ("stage", row["stage"]),
        ("parts", ", ".join(f"{slot} {part}" for slot, part in row["parts"].items())),
        ("needs", ", ".join(row["needs"]) or "no statistics"),
        ("formats", row["bits"]),
        ("runs", f"simulated: {row['simulated']}" if row["simulated"] else row["runs"]),
        ("source", row["source"]),
    ]
    lines = [f"{name}: {row['summary']}", ""]
    for title, text in fields:
        lines += _field(title, text) if text else []
    for title, pairs in (
        ("knobs", {f"{knob} = {_word(spec['default'])}": spec["allowed"] for knob, spec in row["knobs"].items()}),
        ("refuses", row["refuses"]),
    ):
        if pairs:
            lines += ["", title]
            for left, text in pairs.items():
                lines += _field(f"  {left}", text, 24)
    if row["limits"]:
        lines += ["", "limits", *(f"  {limit}" for limit in row["limits"])]
    return "\n".join(lines)


def _field(title: str, text: str, width: int = 10) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{title:<{width}}", subsequent_indent=" " * width)
