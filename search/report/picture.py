"""The picture of a frontier: what was measured, the simple policies, the objective, and the solver's prediction set apart."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from methods.atomic import write_bytes
from search.frontier import Candidate, frontier
from search.report.content import Entry, Group, ReportData
from search.report.honesty import DRAWN, shown

# Okabe and Ito's palette: told apart by all common kinds of colour vision; shapes differ as well.
_STYLE: dict[Group, tuple[str, str, float, str]] = {
    "search": ("#0072B2", "o", 6.0, "search"),
    "baseline": ("#D55E00", "s", 6.0, "simple policies"),
    "dense": ("#222222", "D", 6.5, "dense model"),
    "chosen": ("#009E73", "*", 15.0, "the answer"),
}
_PREDICTED = "#8A8F98"
_INK = "#333333"
_LOG_FROM = 30.0  # ratio of the greatest to the least KL above which a linear axis would hide the small ones
_DPI = 200


def draw(data: ReportData, format: Literal["png", "svg"] = "png", narrow: bool = False) -> bytes:
    """The picture as a PNG (2x) or SVG file. The predicted curve is open, grey and dotted, and says so.

    narrow: for the width of a telephone, with letters of the same size, the legend below and no title.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(DRAWN):
        figure = Figure(figsize=(4.1, 5.6) if narrow else (8.4, 5.2), dpi=_DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _axes(axes, data, narrow)
        _predicted(axes, data.predicted)
        _measured(axes, data.measured)
        _objective(axes, data)
        _legend(figure, axes, narrow)
        _labels(figure, axes, data)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else {"Software": None})
    return buffer.getvalue()


def write_picture(data: ReportData, path: Path) -> None:
    """Writes the picture in one step, as the suffix says (`.png` or `.svg`); raises ValueError on another."""
    if path.suffix == ".png":
        write_bytes(path, draw(data, "png"))
    elif path.suffix == ".svg":
        write_bytes(path, draw(data, "svg"))
    else:
        raise ValueError(f"picture: {path.name}; use a name that ends in .png or .svg")


def _axes(axes: Any, data: ReportData, narrow: bool) -> None:
    values = [c.kl for c in _all(data) if c.kl > 0]
    if values and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("symlog", linthresh=min(values), linscale=0.4)
        # Zero and the powers of ten above what is linear: the one below would stand on the zero.
        powers = range(math.ceil(math.log10(min(values))), math.floor(math.log10(max(values))) + 1)
        axes.set_yticks([0.0, *(10.0**power for power in powers)])
        axes.yaxis.set_major_formatter(shown)
    latencies = [v for e in data.measured for v in (e.candidate.latency_lo, e.candidate.latency_hi)]
    latencies += [c.latency_ms for c in data.predicted] + [data.objective.limit_ms]
    margin = 0.06 * (max(latencies) - min(latencies) or max(latencies))
    axes.set_xlim(max(min(latencies) - margin, 0), max(latencies) + margin)
    top = max([*values, *(c.kl + c.kl_stderr for c in _all(data))], default=1.0) or 1.0
    axes.set_ylim(0 if axes.get_yscale() != "linear" else -0.03 * top, top * (1.6 if axes.get_yscale() != "linear" else 1.08))
    label = data.dense.latency_label
    axes.set_xlabel(f"latency ({data.objective.unit}){'' if label == 'measured' else f', {label}, not measured'}", color=_INK)
    axes.set_ylabel("KL divergence from the dense model (nats per token)", color=_INK)
    if not narrow:
        axes.set_title(f"{data.model}\n{data.target} · {data.objective.workload}", loc="left", fontsize=10.5, color=_INK)
    axes.grid(True, which="major", color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9AA0A6")
    axes.tick_params(colors=_INK, labelsize=9)


def _all(data: ReportData) -> list[Candidate]:
    return [entry.candidate for entry in data.measured] + list(data.predicted)


def _predicted(axes: Any, candidates: Sequence[Candidate]) -> None:
    if not candidates:
        return
    curve = frontier(candidates)
    x, y = [c.latency_ms for c in curve], [c.kl for c in curve]
    label = "solver's curve: KL predicted, latency modelled"
    axes.plot(
        x, y, ":", color=_PREDICTED, marker="o", markersize=4, markerfacecolor="white", linewidth=1.4, label=label, zorder=2
    )


def _measured(axes: Any, entries: Sequence[Entry]) -> None:
    best = frontier([entry.candidate for entry in entries])
    kind = entries[0].candidate.fidelity.value
    x, y = [c.latency_ms for c in best], [c.kl for c in best]
    axes.step(x, y, where="post", color=_STYLE["search"][0], linewidth=1.6, alpha=0.75, label=f"frontier, {kind}", zorder=3)
    for group, (colour, marker, size, label) in _STYLE.items():
        own = [entry.candidate for entry in entries if entry.group == group]
        if not own:
            continue
        axes.errorbar(
            [c.latency_ms for c in own],
            [c.kl for c in own],
            xerr=[[c.latency_ms - c.latency_lo for c in own], [c.latency_hi - c.latency_ms for c in own]],
            yerr=[c.kl_stderr for c in own],
            fmt=marker,
            color=colour,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.1,
            capsize=2,
            label=f"{label}, {kind}",
            zorder=6 if group == "chosen" else 5,
            clip_on=False,
        )


def _objective(axes: Any, data: ReportData) -> None:
    limit = data.objective.limit_ms
    right = axes.get_xlim()[1]
    axes.axvspan(limit, right, color="#CC79A7", alpha=0.07, linewidth=0, zorder=0)
    axes.axvline(limit, color="#CC79A7", linewidth=1.5, linestyle="--", label=f"objective, {limit:.4g} ms", zorder=1)


def _legend(figure: Any, axes: Any, narrow: bool) -> None:
    """The answer first, what was not measured last; in a narrow picture below the plot, where it covers nothing."""
    first = ["the answer", "frontier", "search", "simple", "dense", "objective", "solver"]
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda k: [labels[k].startswith(name) for name in first].index(True))
    own: Any = figure if narrow else axes
    own.legend(
        [handles[k] for k in order],
        [labels[k] for k in order],
        loc="outside lower left" if narrow else "upper right",
        framealpha=0.92,
        edgecolor="none",
        fontsize=9,
        labelcolor=_INK,
    )


def _labels(figure: Any, axes: Any, data: ReportData) -> None:
    """Names the answer, the dense model and the simple policies, where there is room."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    legend = axes.get_legend()
    taken = [*([] if legend is None else [legend.get_window_extent(renderer)]), *_marker_boxes(axes, _all(data))]
    order = {"chosen": 0, "dense": 1, "baseline": 2, "search": 3}
    for entry in sorted(data.measured, key=lambda e: (order[e.group], e.candidate.kl)):
        if entry.group != "search":
            _place(axes, entry, taken)


def _marker_boxes(axes: Any, candidates: Iterable[Candidate]) -> Iterable[Any]:
    from matplotlib.transforms import Bbox

    half = 5 * _DPI / 100
    for c in candidates:
        x, y = axes.transData.transform((c.latency_ms, c.kl))
        yield Bbox([[x - half, y - half], [x + half, y + half]])


def _place(axes: Any, entry: Entry, taken: list[Any]) -> None:
    """Writes a name beside its point, at the first place where it covers nothing; leaves it out where none is free."""
    from matplotlib.patheffects import withStroke

    c = entry.candidate
    frame = axes.get_window_extent()
    for dx, dy in [(7, 5), (7, -11), (7, 12), (-7, 5), (-7, -11), (0, 10), (0, -16)]:
        text = axes.annotate(
            c.name,
            (c.latency_ms, c.kl),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            fontsize=8,
            color=_STYLE[entry.group][0],
            fontweight="bold" if entry.group == "chosen" else "normal",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=7,
        )
        box = text.get_window_extent()
        inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
        if inside and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return
        text.remove()
