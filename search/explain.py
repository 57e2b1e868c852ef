"""Which choices of an answer cost the quality and which save the time: each is swapped back to dense and measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from methods.policy import DENSE, Policy
from search.config import ConfigError
from search.evaluate import Evaluator, Quality, paired

if TYPE_CHECKING:
    from profilers.end_to_end import Measurement
    from search.prepared import Prepared, SiteOptions
    from search.results import Answer
    from search.session import Session

By = Literal["site", "block", "kind"]
MOST_TIMED = 8
"""With more groups than this, times are those of the sites' kernels in the table rather than of whole models."""


@dataclass(frozen=True)
class Share:
    """What one group of choices does, all others kept.

    kl: loss of the answer less its loss with the group dense again, measured on the search text, nats per token, with the standard
    error of the paired difference; predicted_kl: the sum of the additive scores. ms: time of the model with the group dense less the
    answer's, so what the group saves; ms_label: `measured` (whole models, interleaved) or `kernels` (the table's cells).
    """

    name: str
    n_sites: int
    formats: Mapping[str, int]
    kl: float
    kl_stderr: float
    predicted_kl: float
    ms: float
    ms_label: str

    @property
    def kl_per_ms(self) -> float:
        """Loss for each millisecond saved; infinite where none is."""
        return self.kl / self.ms if self.ms > 0 else float("inf")


@dataclass(frozen=True)
class Explanation:
    """The shares of an answer, the costliest first.

    kl: loss of the answer on the search text; residual: kl less the sum of the shares, what choices do only together, None where not
    every decided site belongs to a group; notes: what a reader must know.
    """

    answer: str
    kl: float
    shares: tuple[Share, ...]
    residual: float | None
    notes: tuple[str, ...] = ()


def groups(sites: Sequence[SiteOptions], policy: Policy, by: By, layer: str) -> dict[str, list[str]]:
    """Names of the decided sites by group, in the order of computation; `layer` keeps those whose name contains it.

    Raises ConfigError where none is left.
    """
    label: dict[str, Callable[[SiteOptions], str]] = {
        "site": lambda site: site.name,
        "block": lambda site: f"block {site.block}",
        "kind": lambda site: site.kind,
    }
    found: dict[str, list[str]] = {}
    for site in sites:
        if policy.at(site.name)[0] != DENSE and layer in site.name:
            found.setdefault(label[by](site), []).append(site.name)
    if not found:
        decided = [site.name for site in sites if policy.at(site.name)[0] != DENSE]
        raise ConfigError(f"--layer {layer!r} is in no name of a decided site; they look like {', '.join(decided[:3])}")
    return found


def _decided(policy: Policy) -> set[str]:
    return {site for site in policy.sites if policy.at(site)[0] != DENSE}


def without(policy: Policy, sites: Sequence[str]) -> Policy:
    """The policy with some sites dense again."""
    return Policy({name: own for name, own in policy.sites.items() if name not in set(sites)}, policy.model)


def explain(
    folder: Path, answer: Answer, session: Session, prepared: Prepared, by: By = "kind", layer: str = ""
) -> Explanation:
    """Swaps every group of the answer's choices back to dense, alone, and measures loss and time.

    Raises ConfigError where the answer compresses nothing or `layer` names none of its sites.
    """
    from search.session import all_threads

    if answer.best is None or not _decided(answer.best.policy):
        raise ConfigError(f"{folder}: the answer for {answer.objective} compresses nothing; there is nothing to explain")
    policy = answer.best.policy
    found = groups(prepared.sites, policy, by, layer)
    swapped = {name: without(policy, sites) for name, sites in found.items()}
    evaluator = Evaluator(session.switch, session.corpora["search"].tokens)
    with session.progress.bar("swapping choices back") as update, all_threads():
        whole = evaluator.evaluate(policy)
        qualities = {}
        for index, (name, other) in enumerate(swapped.items()):
            qualities[name] = evaluator.evaluate(other)
            update(index + 1, len(swapped))
    timed = _timed(session, policy, swapped) if len(swapped) <= MOST_TIMED else None
    shares = [
        _share(prepared, policy, name, found[name], whole, qualities[name], None if timed is None else timed[name])
        for name in found
    ]
    covered = {site for sites in found.values() for site in sites} == _decided(policy)
    notes = []
    if answer.best.recompressed:
        notes.append("the answer's weights were recompressed in order; these shares are of the weights before that")
    if timed is None:
        notes.append(f"more than {MOST_TIMED} groups: times are sums of the kernels' measured cells, not of whole models")
    return Explanation(
        answer=answer.objective,
        kl=whole.kl,
        shares=tuple(sorted(shares, key=lambda share: -share.kl)),
        residual=whole.kl - sum(share.kl for share in shares) if covered else None,
        notes=tuple(notes),
    )


def _share(
    prepared: Prepared, policy: Policy, name: str, sites: Sequence[str], whole: Quality, other: Quality, ms: float | None
) -> Share:
    kl, stderr = paired(whole.kl_each, other.kl_each)
    options = [prepared.option(site, policy.at(site)[0]) for site in sites]
    dense = [prepared.option(site, DENSE) for site in sites]
    formats: dict[str, int] = {}
    for option in options:
        formats[option.format] = formats.get(option.format, 0) + 1
    kernels = sum(own.model_ms - option.model_ms for own, option in zip(dense, options, strict=True))
    return Share(
        name=name,
        n_sites=len(sites),
        formats=formats,
        kl=kl,
        kl_stderr=stderr,
        predicted_kl=sum(option.loss for option in options),
        ms=kernels if ms is None else ms,
        ms_label="kernels" if ms is None else "measured",
    )


def _timed(session: Session, policy: Policy, swapped: Mapping[str, Policy]) -> dict[str, float]:
    """What every group saves, in ms: whole models on the real kernels, interleaved, paired by round with the answer."""
    from profilers import end_to_end
    from search.pricing import price

    engine = session.engine(price(session))
    models: dict[str, Any] = {"": engine.materialize(session.edits(policy))}
    models |= {name: engine.materialize(session.edits(other)) for name, other in swapped.items()}
    with session.progress.bar("end-to-end latency") as update:
        runs: dict[str, Measurement] = end_to_end.measure(
            models,
            session.config.load,
            session.target,
            cache=session.config.cache_folder,
            notify=session.progress.say,
            progress=update,
        )
    session.progress.say(end_to_end.disturbance(runs.values()))
    answer = runs[""]
    return {name: (runs[name].ratio_to(answer).mid - 1) * answer.median_ms for name in swapped}


def text(explanation: Explanation) -> str:
    """The shares as a table for the terminal, with the residual under it."""
    from search.report.table import Column, Table

    timing = explanation.shares[0].ms_label
    columns = (
        Column("name", "choices"),
        Column("formats", "formats"),
        Column("kl", "KL it costs, measured", "nats/token", 3),
        Column("stderr", "± standard error", "", 1),
        Column("share", "of all", "%", 2),
        Column("predicted", "KL, predicted", "nats/token", 3),
        Column("ms", f"time it saves, {timing}", "ms", 3),
        Column("rate", "KL per ms", "", 2),
    )
    rows = tuple(
        {
            "name": share.name,
            "formats": ", ".join(f"{n} {name}" for name, n in sorted(share.formats.items(), key=lambda item: -item[1])),
            "kl": share.kl,
            "stderr": share.kl_stderr,
            "share": 100 * share.kl / explanation.kl if explanation.kl > 0 else None,
            "predicted": share.predicted_kl,
            "ms": share.ms,
            "rate": share.kl_per_ms if share.ms > 0 else None,
        }
        for share in explanation.shares
    )
    lines = [f"The answer for {explanation.answer} costs {explanation.kl:.3g} nats per token on the search text.", ""]
    lines += [Table(columns, rows).text(), ""]
    if explanation.residual is not None:
        part = f" ({explanation.residual / explanation.kl:+.0%} of all)" if explanation.kl > 0 else ""
        lines.append(
            f"Interaction: {explanation.residual:+.3g} nats{part} appear in no single swap; the additive scores cannot see them."
        )
    return "\n".join([*lines, *(f"note: {note}" for note in explanation.notes)])
