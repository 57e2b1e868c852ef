"""Whole-model latency of random mixed policies that nothing was fitted on, predicted and measured, in decode and prefill.

The maps are made as `search run` makes them: kernel cells from the machine's table, a few whole-model runs a workload, one fit. Then
every policy is predicted, and measured interleaved with the dense model: all of them one after the other, and all again some minutes
later, since a run of seconds also says how the machine was just then; the mean counts. What is measured is kept, so that the command
goes on where it was cut off.

    python -m results.benchmarks.latency.policies --out FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import nn

from methods.atomic import write_bytes, write_text
from methods.policy import DENSE, Decision, Policy
from predictors.intervals import spearman
from predictors.latency import LatencyModel
from profilers import end_to_end
from profilers.runtime import dense_candidates
from search.config import RunConfig, default_cache
from search.files import content_key
from search.prepared import SiteOptions, by_format
from search.pricing import price, priced_sites
from search.progress import Progress
from search.report.honesty import Pair, draw_pairs, latency_panel
from search.report.table import markdown
from search.session import Session
from search.whole_model import Fit, formats_of, whole_model

WORKLOADS = ("decode:batch=1,context=512", "prefill:batch=1,prompt=512")


@dataclass(frozen=True)
class Result:
    """A policy's latency in a workload, ms. level: of the dense model in the runs that the map was fitted on; dense: in the same run.

    turn: which measurement of this policy; lo, mean, hi: predicted; ratio: measured of the dense model's, paired by round; alone: the
    policy's own median; disturbed: most steps were, at the last of the attempts too.
    """

    workload: str
    policy: str
    turn: int
    lo: float
    mean: float
    hi: float
    level: float
    ratio: float
    alone: float
    dense: float
    disturbed: bool
    load: float

    @property
    def measured(self) -> float:
        """At the dense model's level in the fit, so that the machine's own drift since then does not count."""
        return self.ratio * self.level

    @property
    def held(self) -> bool:
        return self.lo <= self.measured <= self.hi


def random_policies(sites: Sequence[SiteOptions], count: int, seed: int) -> Iterator[Policy]:
    """Mixtures of every kind: each site for itself, by kind of site, by depth, all with random weights on the formats."""
    generator = np.random.default_rng(seed)
    labels = sorted({option.label for site in sites for option in site.options})
    blocks = max(site.block for site in sites) + 1
    for index in range(count):
        weights = generator.dirichlet(np.full(len(labels), (0.3, 1.0, 5.0)[index // 3 % 3]))
        if index % 3 == 0:
            wanted = {site.name: generator.choice(labels, p=weights) for site in sites}
        elif index % 3 == 1:
            of_kind = {kind: generator.choice(labels, p=weights) for kind in sorted({site.kind for site in sites})}
            wanted = {site.name: of_kind[site.kind] if generator.random() < 0.8 else generator.choice(labels) for site in sites}
        else:
            cuts = sorted(generator.integers(0, blocks, 3).tolist())
            of_depth = generator.choice(labels, 4, p=weights)
            wanted = {site.name: of_depth[sum(site.block >= cut for cut in cuts)] for site in sites}
        decisions = {}
        for site in sites:
            able = {option.label for option in site.options}
            label = str(wanted[site.name])
            if label in able and label != DENSE.label:
                decisions[site.name] = (Decision.parse(label),)
        yield Policy(decisions)


def summed(sites: Sequence[SiteOptions], scales: Mapping[str, float], policy: Policy) -> float:
    """Kernel times of a policy as they count in a whole model, ms."""
    options = {(site.name, option.label): option for site in sites for option in site.options}
    taken = [options[site.name, policy.at(site.name)[0].label] for site in sites]
    return sum(option.ms * scales.get(option.kernel, 1.0) for option in taken)


class Benchmark:
    """One session on this machine; what was measured lies in `out`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        config = RunConfig(
            model=options.model,
            target="cpu",
            workload=WORKLOADS,
            latency="0.7x",
            results=str(options.out),
            study="study",
            cache=str(options.cache),
            threads=options.threads,
        )
        self.session = Session(config, Progress())
        self.table = price(self.session)
        self.sites = priced_sites(self.session, self.table)
        self.path = options.out / "measured.jsonl"

    def fits(self) -> list[Fit]:
        """The maps of all workloads, made once."""
        key = content_key(self.session.target.fingerprint, [asdict(site) for own in self.sites for site in own])
        pairs = list(zip(self.sites, self.session.config.workloads, strict=True))
        return self.session.steps.made(
            "maps", key, lambda: [whole_model(self.session, self.table, own, workload) for own, workload in pairs]
        )

    def run(self) -> list[Result]:
        """Every policy in every workload, every turn for itself."""
        found = self._kept()
        done = {(result.workload, result.policy, result.turn) for result in found}
        fits = self.fits()
        for place, (workload, fit) in enumerate(zip(self.session.config.workloads, fits, strict=True)):
            fitted = {run.policy_key for run in LatencyModel.from_dict(fit["map"]).runs}
            engine = self.session.engine(self.table, workload)
            dense = dense_candidates(engine)
            policies = list(random_policies(self.sites[0], self.options.policies, self.options.seed))
            for turn, (number, policy) in itertools.product(range(self.options.turns), enumerate(policies)):
                if {policy.key(), by_format(policy).key()} & fitted or (workload.name, policy.key(), turn) in done:
                    continue
                model = engine.stand_in(formats_of(policy))
                result = self._result(place, turn, fit, policy, dense[fit["dense_name"]], model)
                found.append(result)
                self._keep(result)
                say(
                    f"{workload.phase}, turn {turn + 1}, {number + 1} of {len(policies)}: {result.measured:.2f} ms, predicted "
                    f"{result.mean:.2f} [{result.lo:.2f}, {result.hi:.2f}]"
                )
        return found

    def _result(self, place: int, turn: int, fit: Fit, policy: Policy, reference: nn.Module, model: nn.Module) -> Result:
        workload = self.session.config.workloads[place]
        bound = LatencyModel.from_dict(fit["map"]).predict(summed(self.sites[place], fit["scales"], policy))
        options = {"rounds": self.options.rounds, "cache": self.session.config.cache_folder}
        dense, own = end_to_end.compare(reference, model, workload, self.session.target, **options)
        return Result(
            workload=workload.name,
            policy=policy.key(),
            turn=turn,
            lo=bound.lo,
            mean=bound.mean,
            hi=bound.hi,
            level=fit["dense_ms"][0],
            ratio=own.ratio_to(dense).mid,
            alone=own.median_ms,
            dense=dense.median_ms,
            disturbed=bool(end_to_end.disturbance([dense, own])),
            load=own.load,
        )

    def _kept(self) -> list[Result]:
        if not self.path.exists():
            return []
        return [Result(**json.loads(line)) for line in self.path.read_text().splitlines()]

    def _keep(self, result: Result) -> None:
        kept = "".join(json.dumps(asdict(each)) + "\n" for each in [*self._kept(), result])
        write_text(self.path, kept)


def together(results: Sequence[Result]) -> list[Result]:
    """One result a policy and workload: the mean of its turns."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.workload, result.policy), []).append(result)
    return [
        replace(
            own[0],
            ratio=fmean(result.ratio for result in own),
            alone=fmean(result.alone for result in own),
            dense=fmean(result.dense for result in own),
            disturbed=any(result.disturbed for result in own),
            load=max(result.load for result in own),
        )
        for own in groups.values()
    ]


def between_turns(results: Sequence[Result]) -> float:
    """Standard deviation of one turn's ratio around the mean of a policy's, relative; nan where each has one turn."""
    means = {(result.workload, result.policy): result.ratio for result in together(results)}
    off = [result.ratio / means[result.workload, result.policy] - 1 for result in results]
    freedom = len(results) - len(means)
    return math.sqrt(math.fsum(each**2 for each in off) / freedom) if freedom else math.nan


def summary(results: Sequence[Result]) -> str:
    """A row a workload, of what `together` gives; the last column is of the single turns."""
    rows = []
    for workload in dict.fromkeys(result.workload for result in results):
        turns = [result for result in results if result.workload == workload]
        own = together(turns)
        errors = np.array([abs(result.mean / result.measured - 1) for result in own])
        raw = np.array([abs(result.mean / result.alone - 1) for result in own])
        ratios = [result.ratio for result in own]
        rank = spearman([result.mean for result in own], ratios)
        rows.append(
            (
                f"`{workload}`",
                str(len(own)),
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{errors.mean():.1%}",
                f"{errors.max():.1%}",
                f"{np.mean([result.held for result in own]):.0%}",
                f"{np.mean([(result.hi - result.lo) / 2 / result.mean for result in own]):.1%}",
                f"{raw.mean():.1%}",
                "" if rank is None else f"{rank:.3f}",
                f"{own[0].level:.2f}",
                f"{max(result.load for result in own):.1f}",
                f"{sum(result.disturbed for result in turns)} of {len(turns)}",
                f"{between_turns(turns):.1%}",
            )
        )
    return markdown(
        "workload | policies | of dense | mean error | worst | inside 90 % | half-width | mean error, raw ms | Spearman | dense, ms | "
        "load at most | disturbed | between turns",
        rows,
    )


def figure(results: Sequence[Result]) -> bytes:
    """Predicted against measured, a panel a workload."""
    panels = []
    for workload in dict.fromkeys(result.workload for result in results):
        own = together([result for result in results if result.workload == workload])
        pairs = [Pair(r.mean / r.level, r.lo / r.level, r.hi / r.level, r.ratio) for r in own]
        panels.append(latency_panel(workload, pairs))
    return draw_pairs(panels)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is measured, of the summary and of the figure")
    parser.add_argument("--model", default="default")
    parser.add_argument("--policies", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="of a turn, at least")
    parser.add_argument("--turns", type=int, default=2, help="how often every policy is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=40_000, help="of the policies; the maps' own are of seed 0")
    parser.add_argument("--cache", type=Path, default=default_cache())
    benchmark = Benchmark(parser.parse_args())
    results = benchmark.run()
    fits = benchmark.fits()
    maps = "\n".join(
        f"{workload.name}: {len(fit['map']['runs'])} runs, {LatencyModel.from_dict(fit['map']).formula}"
        for workload, fit in zip(benchmark.session.config.workloads, fits, strict=True)
    )
    text = f"{benchmark.session.target.description}\n\n{summary(results)}\n\n{maps}\n"
    write_text(benchmark.options.out / "policies.md", text)
    write_bytes(benchmark.options.out / "policies.png", figure(results))
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
