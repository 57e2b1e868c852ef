"""Several studies side by side: what was measured in each, relative to its own dense model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from methods.atomic import write_bytes
from predictors.intervals import Interval
from search.frontier import frontier
from search.report.content import ReportData
from search.report.table import Column, Table

# Okabe and Ito's palette, told apart by all common kinds of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_GROUPS = {"dense": "dense model", "chosen": "the answer", "baseline": "simple", "search": "search"}


def compare(studies: Mapping[str, ReportData], *, frontier_only: bool = True) -> Table:
    """Every measured policy of every study, or those that no other of the same study beats in latency and loss.

    Latency is given in ms and as a part of the study's own dense model. Raises ValueError for fewer than two studies.
    """
    if len(studies) < 2:
        raise ValueError(f"compare: {len(studies)} studies; give two or more folders")
    scores = sorted({name for data in studies.values() for entry in data.measured for name in entry.candidate.scores})
    columns = (
        Column("study", "study"),
        Column("name", "policy"),
        Column("group", "what"),
        Column("latency_ms", "latency, measured", "ms"),
        Column("ratio", "of dense", "", 3),
        Column("kl_nats", "KL, measured", "nats/token", 3),
        Column("kl_stderr", "± standard error", "", 1),
        *(Column(name, name) for name in scores),
        Column("size_bytes", "size", "MiB", divisor=2**20),
    )
    rows = []
    for name, data in studies.items():
        kept = {c.name for c in frontier([entry.candidate for entry in data.measured])}
        for entry in sorted(data.measured, key=lambda entry: entry.candidate.latency_ms):
            c = entry.candidate
            if frontier_only and c.name not in kept and entry.group == "search":
                continue
            rows.append(
                {
                    "study": name,
                    "name": c.name,
                    "group": _GROUPS[entry.group],
                    "latency_ms": Interval(c.latency_ms, c.latency_lo, c.latency_hi),
                    "ratio": c.latency_ms / data.dense.latency_ms,
                    "kl_nats": c.kl,
                    "kl_stderr": c.kl_stderr,
                    **{score: c.scores.get(score) for score in scores},
                    "size_bytes": c.size_bytes,
                }
            )
    return Table(columns, tuple(rows))


def cautions(studies: Mapping[str, ReportData]) -> list[str]:
    """What keeps the studies' numbers from being compared, in words: another model, another machine, another text, another workload."""
    first_name, first = next(iter(studies.items()))
    found = []
    for name, data in list(studies.items())[1:]:
        pairs = (
            ("model", _model(first), _model(data), "losses are against different dense models"),
            ("target", first.target, data.target, "milliseconds are of different machines; compare the parts of dense"),
            ("workload", first.objective.workload, data.objective.workload, "latencies are of different workloads"),
            ("report text", _text(first), _text(data), "losses are on different texts"),
        )
        found += [f"{first_name} and {name}: {what} differs, {why}" for what, one, other, why in pairs if one != other]
    return found


def _model(data: ReportData) -> str:
    return dict(data.provenance).get("model digest", data.model)


def _text(data: ReportData) -> str:
    return next((use.digest for use in data.data if use.role == "report"), "none")


def write_comparison(studies: Mapping[str, ReportData], path: Path) -> None:
    """The frontiers in one picture, latency as a part of each study's dense model; `.png` or `.svg`, otherwise ValueError."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"picture: {path.name}; use a name that ends in .png or .svg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, data) in enumerate(studies.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        best = frontier([entry.candidate for entry in data.measured])
        dense = data.dense.latency_ms
        x, y = [c.latency_ms / dense for c in best], [c.kl for c in best]
        spread = [[(c.latency_ms - c.latency_lo) / dense for c in best], [(c.latency_hi - c.latency_ms) / dense for c in best]]
        axes.step(x, y, where="post", color=colour, linewidth=1.6, alpha=0.75)
        errors = [c.kl_stderr for c in best]
        axes.errorbar(x, y, xerr=spread, yerr=errors, fmt=marker, color=colour, capsize=2, label=f"{name}, measured")
    values = [v for v in _positive(list(studies.values())) if v > 0]
    if values and max(values) > 30 * min(values):
        axes.set_yscale("symlog", linthresh=min(values), linscale=0.4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("latency, part of the study's dense model")
    axes.set_ylabel("KL divergence from the dense model (nats per token)")
    axes.grid(True, color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(framealpha=0.92, edgecolor="none", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:])
    write_bytes(path, buffer.getvalue())


def _positive(studies: Sequence[ReportData]) -> list[float]:
    return [entry.candidate.kl for data in studies for entry in data.measured]
