"""Workloads: what a latency is the latency of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from methods.errors import InputError
from methods.typed import Range, shown

BATCHES = Range(1, 2**16)
LENGTHS = Range(1, 2**22)
"""Of a context or a prompt; how long a model can be is checked where the model is known."""


@dataclass(frozen=True)
class Workload:
    """One step of serving: a decode step (one token for each sequence of the batch) or a whole prefill.

    batch: sequences; context: tokens in the key/value cache before the step (decode); prompt: tokens a sequence (prefill).
    """

    phase: Literal["decode", "prefill"] = "decode"
    batch: int = 1
    context: int = 512
    prompt: int = 512

    def __post_init__(self) -> None:
        for name, allowed in (("batch", BATCHES), ("context", LENGTHS), ("prompt", LENGTHS)):
            value = getattr(self, name)
            if not isinstance(value, int) or value not in allowed:
                raise InputError(f"workload: {name}={value} is not possible; use a whole number{allowed.words}")

    @property
    def tokens_in_flight(self) -> int:
        """Rows of activations that a linear sees at once: M of its matrix product."""
        return self.batch if self.phase == "decode" else self.batch * self.prompt

    @property
    def name(self) -> str:
        """`decode:batch=1,context=512` or `prefill:batch=1,prompt=512`; `parse_workload` reads it back."""
        length = f"context={self.context}" if self.phase == "decode" else f"prompt={self.prompt}"
        return f"{self.phase}:batch={self.batch},{length}"

    @property
    def unit(self) -> str:
        """What the milliseconds count."""
        return "ms per output token" if self.phase == "decode" else "ms to first token"


def parse_workload(text: str) -> Workload:
    """`decode[:batch=B,context=C]` or `prefill[:batch=B,prompt=P]` (or `tokens=P`); raises ValueError with the grammar on anything else."""
    match = re.fullmatch(r"(decode|prefill)(?::(.*))?", text)
    allowed = {"decode": ("batch", "context"), "prefill": ("batch", "prompt")}
    grammar = "write decode:batch=1,context=512 or prefill:batch=1,prompt=512"
    if not match:
        raise ValueError(f"workload {shown(text)}: {grammar}")
    phase = match[1]
    values: dict[str, int] = {}
    for item in filter(None, (match[2] or "").split(",")):
        name, _, number = item.partition("=")
        name = "prompt" if name == "tokens" and phase == "prefill" else name
        if name not in allowed[phase] or not re.fullmatch(r"0*[1-9][0-9]{0,9}", number):
            raise ValueError(
                f"workload {shown(text)}: {shown(item)} is not one of {allowed[phase]} with a whole number; {grammar}"
            )
        values[name] = int(number)
    return Workload(phase=phase, **values)  # type: ignore[arg-type]
