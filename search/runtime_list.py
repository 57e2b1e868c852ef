"""`search runtimes`: what each runtime loads and computes on the stored codes, and why not. Imports no torch.

Everything comes from `spaces.runtimes`, which is what `--runtime` restricts a search to.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from methods.formats.format import Format, parse_format
from methods.model.structure import LayerSpec, Site
from search.method_list import REPRESENTATIVES, WIDTH, has_kernel
from spaces.runtimes import DEFAULT_FORMATS, RUNTIMES, Blocks, Loads, Runtime

_SITE = Site("linears of 512 inputs", "qkv", 0, tuple(LayerSpec(f"{kind}_proj", kind, 0, 512, 512) for kind in "qkv"))
"""Large and round enough that no shape stands in a format's way."""

_OWN = "every kernel is compared with the format's reference numerics before it is timed"


def formats() -> dict[str, tuple[str, ...]]:
    """The formats of the matrix by family: those that stand for it in `search methods`, and the ones that runtimes try by default."""
    found = {family: list(names) for family, names in REPRESENTATIVES.items()}
    known = {name for names in found.values() for name in names}
    found["int"] += dict.fromkeys(name for names in DEFAULT_FORMATS.values() for name in names if name not in known)
    return {family: tuple(names) for family, names in found.items()}


def rows() -> list[dict[str, Any]]:
    """A row for every runtime and format, as plain values.

    loads: whether it runs what is stored; fused: whether on the stored codes (false for decoded weights, which save memory at most);
    evidence: `load-tested`, `by reference`, or "" where it does not load; exports: the export formats that carry it there; reason: why
    it does not load, or "".
    """
    return [
        {"runtime": runtime.name, "family": family, **_cell(runtime, parse_format(name))}
        for runtime in RUNTIMES.values()
        for family, names in formats().items()
        for name in names
    ]


def _cell(runtime: Runtime, fmt: Format) -> dict[str, Any]:
    reason = _refusal(runtime, fmt)
    cell = {"format": fmt.name, "loads": reason is None, "fused": False, "evidence": "", "exports": [], "reason": reason or ""}
    if reason is not None:
        return cell
    family = runtime.family(fmt, _SITE)
    if family is None:
        return {**cell, "fused": not fmt.dense, "evidence": "load-tested", "exports": [runtime.export]}
    return {**cell, "fused": family.fused, "evidence": family.evidence, "exports": list(family.exports)}


def _refusal(runtime: Runtime, fmt: Format) -> str | None:
    if runtime.loads is None and not has_kernel(fmt):
        return f"{runtime.name}: no kernel computes {fmt.name}; it runs decoded, without a latency of its own"
    return runtime.supports(fmt, _SITE)


def listing() -> str:
    """The matrix for people: by runtime what it loads, through which exports, and what it refuses with examples."""
    lines = []
    for runtime in RUNTIMES.values():
        lines += ["", runtime.name, *(line for text in _loads(runtime) for line in _field("loads", text))]
        lines += _field("refuses", "; ".join(_refused(runtime)))
    lines += ["", *textwrap.wrap(_LEGEND, WIDTH)]
    return "\n".join(lines[1:])


def _loads(runtime: Runtime) -> list[str]:
    if runtime.loads is None:
        return [_OWN]
    return [f"{_grids(own)}; {_words(own)}" for own in runtime.loads]


def _grids(family: Loads | Blocks) -> str:
    if isinstance(family, Blocks):
        names = (name for names in formats().values() for name in names)
        held = [name for name in names if not parse_format(name).dense and family.refuses(parse_format(name), _SITE) is None]
        return f"what its block types hold bit for bit, such as {', '.join(held)}"
    groups = ", ".join("channel" if group == -1 else str(group) for group in family.groups)
    inputs = {"16": "left alone", "8-token": "int8 by token", "8-group": "int8 by group"}[family.act]
    return f"integers of {', '.join(map(str, family.bits))} bits, a scale for each {groups}, inputs {inputs}"


def _words(family: Loads | Blocks) -> str:
    where = "on the stored codes" if family.fused else "decoded"
    return f"computed {where}; {family.evidence}; export {', '.join(family.exports)}"


def _refused(runtime: Runtime) -> list[str]:
    """Families of which nothing loads, and for the others an example of each reason, reasons that differ in numbers being one."""
    whole: list[str] = []
    found: dict[str, str] = {}
    for family, names in formats().items():
        reasons = {name: reason for name in names if (reason := _refusal(runtime, parse_format(name)))}
        if len(reasons) == len(names):
            whole.append(family)
            continue
        for name, reason in reasons.items():
            kind = re.sub(r"\d+(-token|-group)?", "…", reason.replace(name, ""))
            found.setdefault(kind, f"{name} ({reason.removeprefix(f'{runtime.name}: ')})")
    left = [] if runtime.experts else ["models with experts"]
    left += [] if runtime.transposed else ["weights that are stored transposed (Conv1D)"]
    left += [f"architectures but {', '.join(runtime.architectures)}"] if runtime.architectures else []
    return [*([f"all of {', '.join(whole)}"] if whole else []), *found.values(), *left]


def _field(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {title:<10}", subsequent_indent=" " * 12)


_LEGEND = (
    "Linears that runtimes fuse (q+k+v, gate+up) share one format everywhere. load-tested: this project's tests load such exports there "
    "and compare weights and losses; by reference: its sources and documents say so. A search with --runtime tries nothing else."
)
