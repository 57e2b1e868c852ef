"""The check of a whole-model map by repeated blocks: what its slope says that compressing some blocks saves, and what it really does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from methods.formats.format import parse_format
from methods.policy import DENSE
from predictors.latency import LatencyModel
from profilers import end_to_end
from profilers.runtime import Runtime
from profilers.shortened import saving, shortened
from profilers.workload import Workload
from search.prepared import SiteOptions
from search.session import Session

ROUNDS = 10

DISAGREES = 0.15
"""Relative difference, beyond the measurement's own interval, from which the report warns of the map."""


@dataclass(frozen=True)
class Differenced:
    """The later half of a model's blocks, dense and in their fastest choices, ms of a step.

    blocks: how many; saved_ms, lo, hi: what compressing them saves, measured by taking them away; predicted_ms: by the map.
    """

    blocks: int
    saved_ms: float
    lo: float
    hi: float
    predicted_ms: float

    @property
    def disagrees(self) -> bool:
        """Whether the map is off by more than `DISAGREES` beyond the measurement's interval."""
        low, high = self.predicted_ms * (1 - DISAGREES), self.predicted_ms * (1 + DISAGREES)
        return self.hi < low or self.lo > high

    @property
    def words(self) -> str:
        """What was found, in a sentence."""
        last = "the last block" if self.blocks == 1 else f"the last {self.blocks} blocks"
        return (
            f"repeated-block differencing: compressing {last} saves {self.saved_ms:.3g} ms "
            f"[{self.lo:.3g}, {self.hi:.3g}] by measurement, {self.predicted_ms:.3g} ms by the map"
        )


def difference(
    session: Session,
    engine: Runtime,
    sites: Sequence[SiteOptions],
    workload: Workload,
    dense: nn.Module,
    fitted: LatencyModel,
    scales: Mapping[str, float],
) -> Differenced | None:
    """Four models in turns: dense and in the fastest choice of every site, with all blocks and with the first half. None for one block.

    dense: the model as stored, of whose kernels the options' times are.
    """
    structure = session.loaded.structure
    n_kept = len(structure.blocks) // 2
    if not n_kept:
        return None
    fastest = {site.name: min(site.options, key=lambda option: option.ms) for site in sites}
    whole = engine.stand_in({name: parse_format(o.format) for name, o in fastest.items() if o.label != DENSE.label})
    models = {"dense": dense, "policy": whole}
    models |= {f"{name}, shorter": shortened(model, structure, n_kept) for name, model in models.items()}
    with session.progress.bar("repeated blocks") as update:
        runs = end_to_end.measure(
            models,
            workload,
            session.target,
            rounds=ROUNDS,
            cache=session.config.cache_folder,
            notify=session.progress.say,
            progress=update,
        )
    session.progress.say(end_to_end.disturbance(runs.values()))
    found = saving(runs["dense"], runs["dense, shorter"], runs["policy"], runs["policy, shorter"])
    later = [site for site in sites if site.block >= n_kept]
    kernels = sum(
        site.options[0].ms * scales.get(site.options[0].kernel, 1.0)
        - fastest[site.name].ms * scales.get(fastest[site.name].kernel, 1.0)
        for site in later
    )
    return Differenced(len(structure.blocks) - n_kept, found.ms, found.lo, found.hi, fitted.b1 * kernels)
