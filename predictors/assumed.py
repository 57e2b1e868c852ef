"""The whole-model latency of a device that no model was run on: what its tables and datasheet add up to, and no promise of coverage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from methods.typed import Finite, NonNegative, read
from predictors.intervals import Interval
from predictors.latency import Run

_VERSION = 1
KIND = "assumed"


@dataclass(frozen=True)
class AssumedMap:
    """`T = b0 + sum_ms`: kernels count as they are in the table, and what lies outside of the sites is a constant.

    b0, b0_lo, b0_hi: that constant with its bounds, ms; low, high: the bounds of a kernel sum as shares of it. Bounds are those of
    the parts, added up: they are assumptions about an absent device and cover no stated share of measurements.
    """

    b0: Finite
    b0_lo: Finite
    b0_hi: Finite
    low: NonNegative
    high: NonNegative

    def __post_init__(self) -> None:
        if not (self.b0_lo <= self.b0 <= self.b0_hi and self.low <= 1 <= self.high):
            raise ValueError(f"assumed latency: {self}; needs b0_lo <= b0 <= b0_hi and low <= 1 <= high")

    @property
    def b1(self) -> float:
        """A millisecond of kernels is one of the model."""
        return 1.0

    @property
    def runs(self) -> tuple[Run, ...]:
        """None was made."""
        return ()

    @property
    def formula(self) -> str:
        """The map in words."""
        return f"{self.b0:.3g} ms + kernels"

    def predict(self, sum_ms: float, features: Mapping[str, float] | None = None) -> Interval:
        """The latency of a model with this kernel sum; features are for maps that were fitted with them."""
        return Interval(self.b0 + sum_ms, self.b0_lo + self.low * sum_ms, self.b0_hi + self.high * sum_ms)

    def budget(self, target_ms: float, features: Mapping[str, float] | None = None) -> float:
        """The kernel sum whose *expected* latency is the target: the bounds of an absent device are too wide to search under.

        Raises ValueError where the constant alone exceeds it.
        """
        if target_ms <= self.b0:
            raise ValueError(f"latency model: {target_ms:g} ms cannot be met, {self.b0:g} ms pass without any of the kernels")
        return target_ms - self.b0

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `from_dict` reads it back."""
        return {"version": _VERSION, "kind": KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AssumedMap:
        """Inverse of `to_dict`; raises ValueError on another version."""
        if data.get("version") != _VERSION or data.get("kind") != KIND:
            raise ValueError(
                f"latency model: version {data.get('version')!r}, this program reads {_VERSION}; prepare the study again"
            )
        numbers = {name: value for name, value in data.items() if name not in ("version", "kind")}
        return read(cls, numbers, "latency model", "prepare the study again")
