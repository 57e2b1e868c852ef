"""The picture of how far predictions held: latency and loss, predicted against measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

DRAWN: Any = {"svg.hashsalt": "isolatency", "text.parse_math": False}
"""Equal pictures are equal files, and names from outside are no mathematics."""

BAND = 0.05
"""Relative error that the grey band of a latency panel spans."""


@dataclass(frozen=True)
class Pair:
    """A prediction with its interval, and what was measured; of something that the prediction had not seen."""

    predicted: float
    lo: float
    hi: float
    measured: float

    @property
    def held(self) -> bool:
        """Whether the measurement lies in the interval."""
        return self.lo <= self.measured <= self.hi


@dataclass(frozen=True)
class Panel:
    """Pairs of one kind; known: what their first values are called; log: on log axes, and without the band."""

    title: str
    pairs: Sequence[Pair]
    known: str
    log: bool = False


def latency_panel(workload: str, pairs: Sequence[Pair]) -> Panel:
    """Latencies of a workload, relative to the dense model's."""
    return Panel(f"{workload},\nof the dense model's latency", pairs, "modelled")


def loss_panel(pairs: Sequence[Pair]) -> Panel:
    """Losses in nats per token."""
    return Panel("KL of policies unseen in fitting,\nnats per token", pairs, "predicted", log=True)


def draw_pairs(panels: Sequence[Panel], format: Literal["png", "svg"] = "png") -> bytes:
    """A picture with the panels that have pairs beside each other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if panel.pairs]
    with rc_context(DRAWN):
        figure = Figure(figsize=(4.2 * len(shown), 4.0), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for place, panel in enumerate(shown):
            _draw(figure.add_subplot(1, len(shown), place + 1), panel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else {"Software": None})
    return buffer.getvalue()


def shown(value: float, _: object = None) -> str:
    """A number at a tick: `0.0001`, `1e-5`; matplotlib's own formatter of powers writes mathematics, which is not parsed here."""
    return f"{value:g}".replace("e-0", "e-")


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Numbers at powers of ten, and between them where there are fewer than two powers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(shown)
    axis.set_minor_formatter(NullFormatter())


def _draw(axes: Any, panel: Panel) -> None:
    pairs = panel.pairs
    values = [v for pair in pairs for v in (pair.predicted, pair.measured)]
    low, high = min(values), max(values)
    low, high = (low / 1.5, high * 1.5) if panel.log else (low * 0.93, high * 1.07)
    if panel.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_ticks(axis, low, high)
    else:
        axes.fill_between(
            [low, high], [low * (1 - BAND), high * (1 - BAND)], [low * (1 + BAND), high * (1 + BAND)], color="#EEF0F3"
        )
    axes.plot([low, high], [low, high], color="#8A8F98", linewidth=1)
    for held, colour, marker, label in ((True, "#0072B2", "o", "inside its interval"), (False, "#D55E00", "s", "outside")):
        own = [pair for pair in pairs if pair.held is held]
        if own:
            spread = [[pair.predicted - pair.lo for pair in own], [pair.hi - pair.predicted for pair in own]]
            axes.errorbar(
                [pair.measured for pair in own],
                [pair.predicted for pair in own],
                yerr=spread,
                fmt=marker,
                color=colour,
                markersize=4.5,
                elinewidth=0.8,
                label=f"{label} ({len(own)})",
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_title(panel.title, fontsize=9.5, loc="left")
    axes.set_xlabel("measured", fontsize=9)
    axes.set_ylabel(panel.known, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
