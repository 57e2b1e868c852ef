"""The picture of how far predictions held: latency and loss, predicted against measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BAND = 0.05
"""Relative error that the grey band of the latency panel spans."""


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


def draw_pairs(latency: Sequence[Pair], loss: Sequence[Pair]) -> bytes:
    """A PNG with a panel for each that has pairs; latencies relative to the dense model, losses in nats per token, on log axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (pairs, title, log)
        for pairs, title, log in (
            (latency, "latency of finalists, of the dense model's", False),
            (loss, "KL of policies unseen in fitting, nats per token", True),
        )
        if pairs
    ]
    figure = Figure(figsize=(4.2 * len(panels), 4.0), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for place, (pairs, title, log) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), place + 1), pairs, title, log=log)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, pairs: Sequence[Pair], title: str, *, log: bool) -> None:
    values = [v for pair in pairs for v in (pair.predicted, pair.measured)]
    low, high = min(values), max(values)
    low, high = (low / 1.5, high * 1.5) if log else (low * 0.93, high * 1.07)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
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
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel("measured", fontsize=9)
    axes.set_ylabel("predicted", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
