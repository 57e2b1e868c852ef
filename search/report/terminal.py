"""The measured policies of a study as a terminal shows them: at most `WIDTH` columns, everything against the dense model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from search.frontier import Candidate
from search.report.content import TOP1, Entry, ReportData

WIDTH = 100
_LEAST = 12
"""Columns that a policy's name gets, however much is asked for."""


def measured_text(data: ReportData) -> str:
    """The table, the fastest first, with a line under it that says what its signs mean; `#` is what `--candidate` takes."""
    entries = sorted(data.measured, key=lambda entry: (entry.candidate.latency_ms, entry.candidate.kl))
    columns = _columns(entries, data.dense)
    names = [entry.candidate.name + (" °" if entry.rescaled else "") for entry in entries]
    left = WIDTH - sum(2 + max(map(len, column)) for column in columns)
    width = min(max(map(len, [*names, "policy"])), max(left, _LEAST))
    shown = ["", "policy", *(_cut(name, width) for name in names)]
    heads = [columns[0], [cell.ljust(width) for cell in shown], *columns[1:]]
    lines = ["  ".join(cells).rstrip() for cells in zip(*(_padded(column) for column in heads), strict=True)]
    lines.insert(2, "─" * max(map(len, lines)))
    return "\n".join([*lines, *_legend(data, entries)])


def _columns(entries: Sequence[Entry], dense: Candidate) -> list[list[str]]:
    """Two lines of heading and a cell an entry, of every column but the name."""
    found = [["", "#", *(f"{place}{'*' if entry.group == 'chosen' else ' '}" for place, entry in enumerate(entries, 1))]]
    every = [entry.candidate for entry in entries]
    found.append(["latency", "ms ±", *(_spread(c.latency_ms, (c.latency_hi - c.latency_lo) / 2) for c in every)])
    found.append(["of", "dense", *(f"{c.latency_ms / dense.latency_ms:.2f}x" for c in every)])
    found.append(["KL", "nats/token ±", *(_spread(c.kl, c.kl_stderr) for c in every)])
    if any(TOP1 in c.scores for c in every):
        found.append(["same", "top-1", *(_share(c.scores.get(TOP1)) for c in every)])
    base = dense.scores.get("perplexity")
    if base is not None:
        found.append(["perplexity", f"{base:.2f}", *(_change(c.scores.get("perplexity"), base) for c in every)])
    found.append(["size", "MiB", *(f"{c.size_bytes / 2**20:.4g}" for c in every)])
    names = list(dict.fromkeys(name for entry in entries for name, _ in entry.met))
    for name in names:
        kind, equals, value = name.partition("=")
        found.append([kind if equals else "meets", value or name, *(_met(dict(entry.met).get(name)) for entry in entries)])
    return found


def _padded(column: list[str]) -> list[str]:
    width = max(map(len, column))
    return [cell.rjust(width) for cell in column]


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _spread(value: float, half: float) -> str:
    """Three digits, and the error as a share: `0.656 ±3%`."""
    if not value:
        return "0    "
    text = f"{value:#.3g}".rstrip(".")
    share = half / value
    return f"{f'{value:.2e}' if 'e' in text else text} ±{f'{share:.1%}' if share < 0.00995 else f'{share:.0%}':<3}"


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def _change(value: float | None, base: float) -> str:
    return "–" if value is None else "" if value == base else f"{value / base - 1:+.1%}"


def _met(met: bool | None) -> str:
    return "–" if met is None else "yes" if met else "no"


def _legend(data: ReportData, entries: Sequence[Entry]) -> list[str]:
    kinds = data.dense
    lines = [
        f"latency {kinds.latency_label}, ± half its 95 % interval; KL {kinds.fidelity.value} on the {kinds.role or 'search'} text, ± its "
        "standard error"
    ]
    marks = ["* the answer"] if any(entry.group == "chosen" for entry in entries) else []
    marks += ["° of another run of this study, by its ratio to dense"] if any(entry.rescaled for entry in entries) else []
    return [*lines, *(["; ".join(marks)] if marks else [])]


def wrapped(sentences: Sequence[str]) -> str:
    """Sentences in lines of at most `WIDTH` columns, all but the first line of each a little to the right."""
    options: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(sentence, WIDTH, **options) for sentence in sentences)
