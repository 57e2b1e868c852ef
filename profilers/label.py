"""Where a latency comes from: the one list of labels, from the most to the least trustworthy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Label = Literal["measured", "interpolated", "transferred", "modelled"]
"""measured: timed on the device it is of; interpolated: between timings of that device; transferred: timings of a sister device, rescaled;
modelled: from datasheet numbers."""

LABELS: tuple[Label, ...] = ("measured", "interpolated", "transferred", "modelled")


def weakest(labels: Iterable[Label]) -> Label:
    """The label of a number that others were added up to: the least trustworthy of theirs; `measured` for none."""
    return max(labels, key=LABELS.index, default="measured")
