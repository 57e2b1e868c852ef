"""`search/reference.md`, written from the code: `python -m search.reference > search/reference.md`. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

from methods import globs, policy_file
from methods.formats.codecs import CODECS
from methods.formats.elements import BITS
from methods.formats.format import GRAMMAR, NAMED, Format
from profilers.datasheets import DATASHEETS, Datasheet
from search import cli, runtime_list
from search.config import RunConfig
from search.endings import EXIT_CODES
from search.export.registry import EXPORTERS
from search.method_list import has_kernel, rows
from search.report.table import markdown
from spaces.runtimes import DEFAULT_FORMATS, PREFILL_FORMATS

_HEAD = """# Reference

Written from the code by `python -m search.reference`; do not edit. How things fit together: [README](../README.md),
[tutorial](tutorial.md)."""
_CONFIGURATION = """Each is a flag of `search run` and a key of the TOML file that `--config` names; flags win. The resolved values are
saved as `config.toml` in the study. Times take `us`, `ms`, `s` or `x` (of the dense model), sizes `MB`, `MiB`, `GiB` and the like."""
_FORMATS = f"""`{GRAMMAR}`

Stored bits are those of a large weight, scales included. A format without a kernel of this project has a quality and no latency."""
_POLICIES = """Written by `search run` into a study's `policies`, or by hand, and read by `search materialize`. Files of earlier
versions hold regular expressions in `match`; those that this program wrote are read as the globs that say the same."""
_METHODS = """`--methods NAME:KNOB=VALUE:…,…`; those of the whole model with `--transform` or in a policy file. More of one:
`search methods NAME`."""


def text() -> str:
    """The whole page."""
    known = {item.name for item in dataclasses.fields(RunConfig)}
    sheets = (_sheet(sheet) for sheet in DATASHEETS.values())
    elements = ((f"`{name}`", ", ".join(map(str, bits))) for name, bits in BITS.items())
    codecs = ((f"`{name}`", str(codec.width), codec.second or "none") for name, codec in CODECS.items())
    parts = [
        _HEAD,
        "## Commands\n\nEverywhere: `--json` (results as JSON) and `--debug` (tracebacks). `search --version` names the version. "
        "How they end:",
        markdown("exit code | meaning", ((str(code), meaning) for code, meaning in EXIT_CODES.items())),
        *(_command(name, parser, known if name == "run" else set()) for name, parser in _parsers().items()),
        f"## Configuration\n\n{_CONFIGURATION}",
        markdown("key | type | default | meaning", map(_field, dataclasses.fields(RunConfig))),
        f"## Policy files\n\n{_POLICIES}",
        f"```text\n{_indented(policy_file.__doc__)}\n```",
        (policy_file.__doc__ or "").strip().rpartition("\n\n")[2],
        f"`match` holds a glob over the names of modules:\n\n```text\n{_indented(globs.__doc__)}\n```",
        "## Targets\n\n`cpu` and `cuda` are what is here; a stored table makes any other name a target. Datasheets:",
        markdown("name | device | capability | GB/s | 10^12 operations a second | GiB | source", sheets),
        f"## Number formats\n\n{_FORMATS}",
        markdown("element | bits", elements),
        markdown("codec of scales | bits a scale | scale of scales", codecs),
        markdown("format | stored bits | inputs | kernel", (_format(name, fmt) for name, fmt in NAMED.items())),
        "## Runtimes\n\nTried where `--formats` is not given, by `--runtime`:",
        markdown(
            "runtime | formats | besides, for prefill",
            ((f"`{name}`", ", ".join(own), ", ".join(PREFILL_FORMATS.get(name, ()))) for name, own in DEFAULT_FORMATS.items()),
        ),
        f"What each loads, as `search runtimes` says it:\n\n```text\n{runtime_list.listing()}\n```",
        "## Export formats",
        markdown("format | what it writes", ((f"`{name}`", _summary(module)) for name, module in EXPORTERS.items())),
        f"## Methods\n\n{_METHODS}",
        markdown("method | class | what it does | parts | formats | needs | knobs | runs | source", map(_method, rows())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _indented(text: str | None) -> str:
    """The indented block of a docstring."""
    return "\n".join(line[4:] for line in (text or "").splitlines() if line.startswith("    "))


def _parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    found = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found).choices)


def _command(name: str, parser: argparse.ArgumentParser, known: set[str]) -> str:
    """known: arguments that are described elsewhere."""
    shown = [action for action in parser._actions if action.dest not in ("help", "debug", "json", *known)]
    words = parser.description or ""
    also = "All of [Configuration](#configuration), each as a flag, and:" if known else ""
    parts = (
        f"### search {name}",
        f"{words[:1].upper()}{words[1:]}.",
        also,
        markdown("argument | meaning", map(_argument, shown)),
    )
    return "\n\n".join(part for part in parts if part)


def _argument(action: argparse.Action) -> tuple[str, str]:
    value = "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())
    name = action.option_strings[0] if action.option_strings else ""
    words = " ".join(filter(None, (name, value if action.nargs != 0 else "")))
    default = action.default if action.default not in (None, "", 0, argparse.SUPPRESS) else ""
    return f"`{words}`", f"{(action.help or '').replace('%%', '%')}{f' [{default}]' if default else ''}"


def _field(item: dataclasses.Field[Any]) -> tuple[str, ...]:
    value = getattr(RunConfig(), item.name)
    default = ",".join(value) if isinstance(value, tuple) else str(value)
    kind = (
        "list"
        if isinstance(value, tuple)
        else {"int": "whole number", "float": "number", "bool": "true or false"}.get(str(item.type), "text")
    )
    allowed = item.metadata["allowed"]
    kind += allowed.words if allowed else ""
    return f"`{item.name.replace('_', '-')}`", kind, f"`{default}`" if default else "", item.metadata["help"]


def _sheet(sheet: Datasheet) -> tuple[str, ...]:
    capability, peaks = (
        ".".join(map(str, sheet.capability)),
        ", ".join(f"{dtype} {peak:g}" for dtype, peak in sheet.peak.items()),
    )
    return f"`{sheet.name}`", sheet.title, capability, f"{sheet.bandwidth:g}", peaks, f"{sheet.memory:g}", sheet.source


def _format(name: str, fmt: Format) -> tuple[str, ...]:
    inputs = "left alone" if fmt.act_bits == 16 else f"{fmt.act_bits} bits"
    return f"`{name}`", f"{fmt.bits_per_weight(4096, 4096):.4g}", inputs, "yes" if has_kernel(fmt) else "no"


def _summary(module: str) -> str:
    """The first line of a module's docstring, read without importing what the module imports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"search.export.registry names {module}, which does not exist")
    return Path(spec.origin).read_text(encoding="utf-8").partition("\n")[0].strip('"')


def _method(row: dict[str, Any]) -> tuple[str, ...]:
    knobs = ", ".join(f"`{name}={spec['default']}` ({spec['allowed']})" for name, spec in row["knobs"].items())
    parts, needs = " + ".join(row["parts"].values()), ", ".join(row["needs"])
    return f"`{row['name']}`", row["class"], row["summary"], parts, row["bits"], needs, knobs, row["runs"], row["source"]


if __name__ == "__main__":
    sys.stdout.write(text())
