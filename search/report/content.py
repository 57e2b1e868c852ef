"""What a report is made of: plain values that a finished study fills in, and the answer in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from methods.policy import DENSE, Policy
from predictors.intervals import Interval
from predictors.loss import PredictorReport
from search.frontier import Candidate, Fidelity
from search.report.honesty import Pair
from search.report.limits import Limit, Share

TOP1 = "top-1 agreement"
"""The score of a candidate that says at which share of positions its likeliest token is the dense model's."""

Group = Literal["dense", "chosen", "baseline", "search"]
Verdict = Literal["met", "not met", "unvalidated"]


@dataclass(frozen=True)
class Entry:
    """A candidate and what it stands for in the report: the dense model, the answer, a simple policy, or another of the search.

    rescaled: it was timed in another run of the study; its latency is its ratio to the dense model there times the dense latency here.
    met: by everything that was asked for, whether it meets it, None where nobody measured that.
    """

    candidate: Candidate
    group: Group
    rescaled: bool = False
    met: tuple[tuple[str, bool | None], ...] = ()


@dataclass(frozen=True)
class Objective:
    """What was asked. text: as the user wrote it (`20ms`, `0.6x`); limit_ms: resolved; unit: `ms per output token`."""

    text: str
    limit_ms: float
    unit: str
    workload: str


@dataclass(frozen=True)
class Guard:
    """The comparison with the simple policies at the same latency.

    difference: KL of the search's policy minus that of the best simple one, `against`, paired over sequences; None where no simple
    policy met the objective. won: the search won beyond the noise; otherwise the simple policy is the answer.
    """

    won: bool
    against: str
    difference: Interval | None
    n_compared: int


@dataclass(frozen=True)
class LatencyFit:
    """The whole-model latency map of a workload and its own error: `formula` in words, relative errors of leave-one-out.

    checked: what repeated blocks say of it, in words.
    """

    workload: str
    formula: str
    n_runs: int
    mean_error: float
    max_error: float
    coverage: float
    checked: str = ""


@dataclass(frozen=True)
class DataUse:
    """One role's data: where it came from, how many tokens, its content hash."""

    role: Literal["calibrate", "search", "validate", "report"]
    source: str
    n_tokens: int
    digest: str


@dataclass(frozen=True)
class LayerMap:
    """What was decided where: `cells[kind][block]` is a format's name; kinds in the order of computation."""

    kinds: tuple[str, ...]
    n_blocks: int
    cells: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class ReportData:
    """Everything a report says.

    measured: entries of one kind of knowledge (normally MEASURED), the dense model and the chosen policy among them;
    predicted: the solver's curve, all PREDICTED; sites: (name, kind, block) in the order of computation; dense_format: of what is not
    decided; also: what else was asked for and what became of it;
    perplexity_note: why no perplexity is reported, "" where it is (as the score
    `perplexity` of the entries); shadow_price: nats per token for one more ms; cost, provenance: (what, how much) in words;
    notes: what a reader must know before believing a number (contended machine, stored table, fallbacks); limits, shares: where the
    answer's predicted loss and latency sit; latency_pairs: of the finalists by workload, relative to the dense model.
    """

    study: str
    model: str
    target: str
    objective: Objective
    verdict: Verdict
    measured: tuple[Entry, ...]
    predicted: tuple[Candidate, ...]
    sites: tuple[tuple[str, str, int], ...]
    dense_format: str
    guard: Guard | None
    latency_fits: tuple[LatencyFit, ...]
    predictor: PredictorReport | None
    shadow_price: float | None
    data: tuple[DataUse, ...]
    cost: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    also: tuple[str, ...] = ()
    perplexity_note: str = ""
    notes: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    shares: tuple[Share, ...] = ()
    latency_pairs: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = [entry.group for entry in self.measured]
        if groups.count("chosen") > 1 or groups.count("dense") != 1:
            raise ValueError(f"report: needs one dense entry and at most one chosen one, got {groups}")
        if groups.count("chosen") == 0 and self.verdict == "met":
            raise ValueError("report: an objective that is met needs a chosen entry")
        wrong = [c.name for c in self.predicted if c.fidelity is not Fidelity.PREDICTED]
        wrong += [e.candidate.name for e in self.measured if e.candidate.fidelity is Fidelity.PREDICTED]
        if wrong:
            raise ValueError(f"report: {wrong} stand among values of another kind; measured and predicted are never mixed")

    @property
    def chosen(self) -> Candidate | None:
        """The answer, which may be a simple policy or the dense model's; None where nothing meets the objective."""
        return next((entry.candidate for entry in self.measured if entry.group == "chosen"), None)

    @property
    def layer_map(self) -> LayerMap:
        """What the answer decides where; all dense where there is none."""
        return self.map_of(self.chosen.policy if self.chosen else Policy())

    def map_of(self, policy: Policy) -> LayerMap:
        """What a policy decides where."""
        return layer_map(policy, self.sites, self.dense_format)

    @property
    def loss_pairs(self) -> tuple[Pair, ...]:
        """Predicted and true KL of policies that the predictor had not seen."""
        return () if self.predictor is None else tuple(Pair(*pair) for pair in self.predictor.pairs)

    @property
    def dense(self) -> Candidate:
        """The uncompressed model in the same measurements."""
        return next(entry.candidate for entry in self.measured if entry.group == "dense")


def layer_map(policy: Policy, sites: Sequence[tuple[str, str, int]], dense_format: str) -> LayerMap:
    """The map of a policy; sites: (name, kind, block) in the order of computation; dense_format: the name of what is not decided."""
    cells: dict[str, dict[int, str]] = {}
    for name, kind, block in sites:
        decisions = policy.at(name)
        names = [dense_format if d == DENSE else str(d.knob("format", d.method)) for d in decisions]
        cells.setdefault(kind, {})[block] = "+".join(names)
    return LayerMap(tuple(cells), 1 + max(block for _, _, block in sites), cells)


def answer(data: ReportData) -> list[str]:
    """The result in a few plain sentences."""
    asked = f"Asked: at most {data.objective.limit_ms:.4g} {data.objective.unit}"
    if data.objective.text.endswith("x"):
        asked += f" ({data.objective.text} the dense model)"
    sentences = [f"{asked}, {data.objective.workload}, on {data.target}."]
    chosen = data.chosen
    if chosen is None:
        fastest = min((entry.candidate for entry in data.measured), key=lambda c: c.latency_ms)
        sentences.append(
            f"Not met: no policy's upper bound is within it; the fastest, {fastest.name}, takes {_latency(fastest)}."
        )
        return sentences
    verdict = {"met": "Met", "not met": "Not met", "unvalidated": "Not validated on the target"}[data.verdict]
    sentences.append(f"{verdict}: {chosen.name} takes {_latency(chosen)}, the dense model {_latency(data.dense)}.")
    sentences.append(_quality(data, chosen))
    if chosen.size_bytes and data.dense.size_bytes:
        share = chosen.size_bytes / data.dense.size_bytes
        sentences.append(f"Its decided weights take {mebibytes(chosen.size_bytes)}, {share:.0%} of the dense model's.")
    if data.guard is not None:
        sentences.append(guard_words(data.guard))
    sentences += [f"Also asked, {words}" for words in data.also]
    if data.shadow_price:
        sentences.append(f"One more millisecond would buy about {data.shadow_price:.2g} nats per token (predicted).")
    return sentences


def _quality(data: ReportData, chosen: Candidate) -> str:
    cost = (
        f"It costs {chosen.kl:.3g} nats per token of KL divergence (standard error {chosen.kl_stderr:.1g}, {chosen.role} data)"
    )
    same = chosen.scores.get(TOP1)
    if same is not None:
        cost += f"; its likeliest next token is the dense model's at {same:.1%} of positions"
    before, after = data.dense.scores.get("perplexity"), chosen.scores.get("perplexity")
    if before is not None and after is not None:
        return f"{cost}; perplexity goes from {before:.2f} to {after:.2f} ({after / before - 1:+.1%})."
    return f"{cost}; perplexity is not reported: {data.perplexity_note or 'it was not computed'}."


def guard_words(guard: Guard) -> str:
    """What the comparison with simple policies says, in a sentence."""
    if guard.difference is None:
        return "No simple policy meets the objective, so there is none to compare with."
    d = guard.difference
    numbers = f"KL {d.mean:+.3g} nats [{d.lo:+.3g}, {d.hi:+.3g}] against {guard.against}, the best of {guard.n_compared} simple policies"
    if guard.won:
        return f"The search wins beyond the noise: {numbers} at the same latency."
    return f"The search does not win beyond the noise ({numbers}), so the simple policy is the answer."


def mebibytes(size_bytes: float) -> str:
    """`123.4 MiB`."""
    return f"{size_bytes / 2**20:.1f} MiB"


def _latency(candidate: Candidate) -> str:
    label = "" if candidate.latency_label == "measured" else f", {candidate.latency_label}"
    return f"{candidate.latency_ms:.4g} ms [{candidate.latency_lo:.4g}, {candidate.latency_hi:.4g}{label}]"
