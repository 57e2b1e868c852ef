"""Whole models: what a decode step or a prefill takes, all candidates in turns in one process."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from profilers.kv_cache import new_cache
from profilers.sweep import load_average, torch_threads
from profilers.target import Target
from profilers.timer import Clock, Samples, SystemClock, Timing, exclusive, median_interval, quantile, take
from profilers.workload import Workload

LEAD = 2
"""Decode steps of a turn that only warm the caches."""

BURST = 3
"""Decode steps of a turn that are timed."""


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one model's time over another's in the same round, with its 95 % interval."""

    mid: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Measurement:
    """One model's timing in an interleaved run.

    samples: a few consecutive steps a round, numbered through; load: 1-minute load average afterwards.
    """

    timing: Timing
    samples: Samples
    load: float

    @property
    def contended(self) -> bool:
        """Most samples were interrupted; the latency is an estimate from CPU time and proves no objective met."""
        return self.timing.contended

    @property
    def median_ms(self) -> float:
        """p50 wall time."""
        return self.timing.median_ms

    @property
    def lo_ms(self) -> float:
        """Lower end of the median's 95 % interval."""
        return self.timing.lo_ms

    @property
    def hi_ms(self) -> float:
        """Upper end of the median's 95 % interval."""
        return self.timing.hi_ms

    def tail(self, q: float) -> tuple[float, float, float]:
        """A quantile of the wall time of all samples with its 95 % interval, ms: who waits for a step waits for its interruptions."""
        walls = sorted(sample.wall for sample in self.samples.all)
        low, high = median_interval(walls, q)
        return 1e3 * quantile(walls, q), 1e3 * low, 1e3 * high

    def ratio_to(self, reference: Measurement) -> Ratio:
        """This model's time over another's of the same run, paired by round, so that what slowed both cancels.

        Where one of them was contended or too few rounds are left, CPU time is compared.
        """
        ours, theirs = dict(self.samples.seconds()), dict(reference.samples.seconds())
        both = ours.keys() & theirs.keys()
        if self.contended or reference.contended or len(both) < len(self.samples.all) / 4:
            ours, theirs = ({sample.turn: sample.cpu for sample in found.samples.all} for found in (self, reference))
            both = ours.keys() & theirs.keys()
        ratios = sorted(ours[turn] / theirs[turn] for turn in both)
        return Ratio(quantile(ratios, 0.5), *median_interval(ratios))


class Step:
    """One step of a workload on a model, repeatable: after a decode step the cache is as it was before."""

    def __init__(self, model: Any, workload: Workload, seed: int = 0, make_cache: Callable[[Any], Any] = new_cache) -> None:
        """make_cache: the model -> its empty cache."""
        self.model = model
        self.workload = workload
        self._make_cache = make_cache
        generator = torch.Generator().manual_seed(seed)
        n_vocab = int(model.config.vocab_size)
        length = workload.context if workload.phase == "decode" else workload.prompt
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        self._prompt = torch.randint(0, n_vocab, (workload.batch, length), generator=generator)
        self._token = torch.randint(0, n_vocab, (workload.batch, 1), generator=generator)
        self._cache: Any = None
        self._before: list[dict[str, Any]] = []
        self.prepare()

    def prepare(self) -> None:
        """Fills the cache with the context (decode); the cache that `generate` uses, sliding windows included."""
        if self.workload.phase == "prefill":
            return
        self._cache = self._make_cache(self.model)
        self.model(input_ids=self._prompt, past_key_values=self._cache, use_cache=True, **self._options)
        self._before = [dict(vars(layer)) for layer in self._cache.layers]

    def __call__(self) -> Tensor:
        """The next token of each sequence (batch,): forward and argmax."""
        if self.workload.phase == "decode":
            ids, cache = self._token, self._cache
        else:
            ids, cache = self._prompt, self._make_cache(self.model)
        logits: Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._options).logits
        return logits[:, -1].argmax(-1)

    def reset(self) -> None:
        """Drops what the step added to the cache: layers never overwrite what they held, so their old state is still whole."""
        for layer, before in zip(self._cache.layers if self._cache else (), self._before, strict=True):
            vars(layer).update(before)


def measure(
    models: Mapping[str, nn.Module],
    workload: Workload,
    target: Target,
    *,
    make_caches: Mapping[str, Callable[[Any], Any]] | None = None,
    rounds: int = 30,
    budget_s: float = math.inf,
    min_rounds: int = 8,
    cache: Path | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, Measurement]:
    """Times every model on a workload in turns, so that drift and neighbours meet all alike.

    A decoding model's turn is a few consecutive steps, the first of them not timed: it runs alone where it is deployed, and a step that
    follows another model's finds the caches full of that one's weights. A prefill is one step a turn.
    make_caches: by name, how a model's key/value cache is made where it is not the dense one (`profilers.kv_cache.new_cache`).
    Stops after `rounds`, or after `min_rounds` once `budget_s` of wall time is used. cache: folder of the machine's timing lock, which
    is held meanwhile (None: the caller holds it); notify: told when another run has it. Models may share weights.
    """
    with nullcontext() if cache is None else exclusive(cache / "tables", notify):
        return _measure(
            models, workload, target, make_caches or {}, rounds, min_rounds, budget_s, progress, clock or SystemClock()
        )


def _measure(
    models: Mapping[str, nn.Module],
    workload: Workload,
    target: Target,
    make_caches: Mapping[str, Callable[[Any], Any]],
    rounds: int,
    min_rounds: int,
    budget_s: float,
    progress: Callable[[int, int], None] | None,
    clock: Clock,
) -> dict[str, Measurement]:
    samples = {name: Samples() for name in models}
    lead, burst = (LEAD, BURST) if workload.phase == "decode" else (0, 1)
    with torch_threads(target.threads), torch.inference_mode():
        steps = {name: Step(model, workload, make_cache=make_caches.get(name, new_cache)) for name, model in models.items()}
        for step in steps.values():
            step()
            step.reset()
        start = clock.wall()
        for turn in range(rounds):
            if turn >= min_rounds and clock.wall() - start > budget_s:
                break
            if progress:
                progress(turn, rounds)
            for name in random.Random(turn).sample(sorted(steps), len(steps)):
                for _ in range(lead):
                    steps[name]()
                    steps[name].reset()
                for place in range(burst):
                    samples[name].all.append(take(steps[name], turn * burst + place, clock))
                    steps[name].reset()
    return {name: Measurement(found.timing(), found, load_average()) for name, found in samples.items()}
