"""What a search may spend on true evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from profilers.duration import parse_duration

if TYPE_CHECKING:
    from search.config import RunConfig


class Budget:
    """Evaluations, tokens and seconds of one search; the first that is used up ends it.

    What an earlier process of the same search evaluated counts as if it had been evaluated now, so that killing a run gives it no more.
    """

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = config.tokens or math.inf, parse_duration(config.budget) if config.budget else math.inf
        self._flags = f"--tokens {config.tokens}", f"--budget {config.budget}"
        self._clock, self._began = clock, clock()
        self._evaluated: dict[str, int] = {}
        self._remembered_s = 0.0

    def spend(self, policy_key: str, n_tokens: int, remembered_s: float = 0.0) -> None:
        """Counts a policy's evaluation on `n_tokens` in all, of which it may have had some before; remembered_s: what that took earlier."""
        self._evaluated[policy_key] = max(n_tokens, self._evaluated.get(policy_key, 0))
        self._remembered_s += remembered_s

    @property
    def n_tokens(self) -> int:
        """Tokens evaluated."""
        return sum(self._evaluated.values())

    def spent(self) -> str:
        """The flag whose limit is reached, `` if none is."""
        used = self.n_tokens, self._clock() - self._began + self._remembered_s
        return next((flag for flag, limit, amount in zip(self._flags, self._limits, used, strict=True) if amount >= limit), "")
