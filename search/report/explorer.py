"""The part of the report that moves: sliders along the measured frontier, any policy's map, and the difference of two policies.

The script is one file beside this module and is put into the page; without scripts the section stays hidden and nothing is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from search.frontier import Candidate, Fidelity
from search.report.content import LayerMap, ReportData
from search.report.limits import BUYS

Look = Callable[[str], tuple[str, str, str]]
"""A format's name -> background, ink, and the number of bits in words."""

_CONTROLS = """<div id="explorer" hidden>
<div class="controls">
<label>latency, at most <input id="max-latency" type="range"> <output id="latency-now"></output></label>
<label>size of decided weights, at most <input id="max-size" type="range"> <output id="size-now"></output></label>
<label>policy <select id="first"></select></label>
<label>compare with <select id="second"></select></label>
</div>
<p id="best" class="soft"></p><div id="plot"></div><p id="first-words"></p><p id="second-words"></p>
<div class="scroll" id="explored-map"></div>
</div>
<noscript><p class="soft">This section needs scripts; everything else on the page does without.</p></noscript>"""


def explorer(data: ReportData, look: Look) -> str:
    """The section's HTML, its data and its script; `look` says how formats are coloured."""
    text = json.dumps(study(data, look), separators=(",", ":"), allow_nan=False)
    # Inside a script element only these can end or change it; JSON's own escapes are kept by its parser.
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    script = files("search.report").joinpath("explorer.js").read_text(encoding="utf-8")
    return f'{_CONTROLS}\n<script type="application/json" id="study">{safe}</script>\n<script>{script}</script>'


def study(data: ReportData, look: Look) -> dict[str, Any]:
    """What the script reads: policies measured and predicted with the map of each, formats once."""
    groups: list[tuple[Candidate, str, str]] = [
        (entry.candidate, entry.group, "ratio of another run" if entry.rescaled else entry.candidate.role)
        for entry in sorted(data.measured, key=lambda entry: entry.candidate.latency_ms)
    ]
    groups += [(candidate, "predicted", "predicted") for candidate in data.predicted]
    maps = [data.map_of(candidate.policy) for candidate, _, _ in groups]
    names = sorted({name for own in maps for row in own.cells.values() for name in row.values()})
    index = {name: place for place, name in enumerate(names)}
    positive = sorted(c.kl for c, _, _ in groups if c.kl > 0)
    return {
        "unit": data.objective.unit,
        "limit": data.objective.limit_ms,
        "knee": positive[0] if positive else 1.0,
        "kinds": list(data.layer_map.kinds),
        "blocks": data.layer_map.n_blocks,
        "formats": [dict(zip(("colour", "ink", "bits"), look(name), strict=True)) | {"name": name} for name in names],
        "policies": [
            _policy(candidate, group, label) | {"cells": _cells(own, data.layer_map.kinds, index)}
            for (candidate, group, label), own in zip(groups, maps, strict=True)
        ],
    }


def _policy(candidate: Candidate, group: str, label: str) -> dict[str, Any]:
    evaluated = candidate.fidelity is not Fidelity.PREDICTED
    return {
        "name": candidate.name,
        "group": group,
        "known": "evaluated" if evaluated else "predicted",
        "label": f"{_known_by(candidate)}, {label}" if evaluated else label,
        "ms": candidate.latency_ms,
        "lo": candidate.latency_lo,
        "hi": candidate.latency_hi,
        "kl": candidate.kl,
        "stderr": candidate.kl_stderr if evaluated else None,
        "perplexity": candidate.scores.get("perplexity"),
        "size": candidate.size_bytes,
        "buys": candidate.scores.get(BUYS),
    }


def _known_by(candidate: Candidate) -> str:
    """How latency and loss are known; what was found for a machine elsewhere has a measured loss alone."""
    label = candidate.latency_label
    return "measured" if label == "measured" else f"latency {label} and loss measured"


def _cells(layers: LayerMap, kinds: Sequence[str], index: dict[str, int]) -> list[list[int | None]]:
    return [[index.get(layers.cells[kind].get(block, "")) for block in range(layers.n_blocks)] for kind in kinds]
