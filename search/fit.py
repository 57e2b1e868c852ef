"""Whether a model can read what a run wants of it: checked when it is opened, not by the error that a step in it would raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from methods.model.positions import learned_positions, trained_positions
from search.config import ConfigError

if TYPE_CHECKING:
    from methods.model.load import LoadedModel
    from profilers.workload import Workload

SHORTEST = 2
"""Tokens of a sequence that has a loss: one to read and one to predict."""


def sequence_length(loaded: LoadedModel, wanted: int) -> int:
    """Tokens of a sequence of text: as wanted, at most as many as the model has positions; raises ConfigError for fewer than two."""
    held = [learned_positions(loaded.model), trained_positions(loaded.model.config)]
    length = min([wanted, *(positions for positions in held if positions)])
    if length < SHORTEST:
        raise ConfigError(
            f"--sequence {wanted}: {loaded.label} has {length} position(s), and a loss needs {SHORTEST} tokens; use another model"
        )
    return length


def sequence_notes(loaded: LoadedModel, wanted: int) -> list[str]:
    """What is to be said of sequences that are shorter than wanted."""
    length = sequence_length(loaded, wanted)
    return (
        []
        if length == wanted
        else [f"sequences are {length} tokens long, as many as the model has positions, not --sequence {wanted}"]
    )


def workload_notes(loaded: LoadedModel, workloads: Sequence[Workload]) -> list[str]:
    """What is to be said of workloads that go beyond the positions that the model was trained for.

    Raises ConfigError where it has a table of positions, and a workload goes beyond its end.
    """
    held, trained = learned_positions(loaded.model), trained_positions(loaded.model.config)
    notes = []
    for workload in workloads:
        decode = workload.phase == "decode"
        n_tokens = workload.context + 1 if decode else workload.prompt
        if held is not None and n_tokens > held:
            most = (
                f"decode:batch={workload.batch},context={held - 1}"
                if decode
                else f"prefill:batch={workload.batch},prompt={held}"
            )
            raise ConfigError(
                f"--workload {workload.name} reads {n_tokens} tokens of a sequence, and {loaded.label} has {held} positions; "
                f"give --workload {most} or less"
            )
        if held is None and trained is not None and n_tokens > trained:
            notes.append(
                f"{workload.name} reads {n_tokens} tokens of a sequence, and {loaded.label} is for {trained} positions: the latency is "
                "measured as it is, but what a model writes there may be worse than what was evaluated"
            )
    return notes


def continuation_notes(loaded: LoadedModel, n_prompt: int, n_tokens: int) -> list[str]:
    """What is to be said of a prompt's continuation by `n_tokens`; raises ConfigError where a table of positions ends before."""
    held, trained = learned_positions(loaded.model), trained_positions(loaded.model.config)
    n_read = n_prompt + n_tokens - 1  # the last token is written, not read
    if held is not None and n_read > held:
        most = held - n_prompt + 1
        way = f"ask for --tokens {most} or fewer" if most > 0 else "shorten it"
        raise ConfigError(
            f"--prompt of {n_prompt} tokens and --tokens {n_tokens} need {n_read} positions, and {loaded.label} has {held}; {way}"
        )
    if held is None and trained is not None and n_read > trained:
        return [f"the text takes {n_read} positions, and {loaded.label} is for {trained}: the end of it may be nonsense"]
    return []
