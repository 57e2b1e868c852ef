"""The contract of a search strategy: it proposes policies and is told what they turned out to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from methods.policy import Policy


@dataclass(frozen=True)
class Evaluated:
    """What is known of a policy: divergence from the dense model in nats per token on `n_tokens`, and latency.

    kl_stderr: standard error of `kl` over sequences.
    """

    policy: Policy
    kl: float
    kl_stderr: float
    n_tokens: int
    latency_ms: float


Rank = Callable[[Sequence[Policy]], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Mean and standard deviation of the predicted log KL of each policy: (n,), (n,)."""


class Strategy(Protocol):
    """Proposes policies; knows no model, device or clock. Deterministic in its seed and in what it is told."""

    def ask(self, n: int) -> list[Policy]:
        """Up to `n` policies never proposed before; fewer where the strategy has run out."""
        ...

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        """What policies turned out to be, those that others proposed included."""
        ...
