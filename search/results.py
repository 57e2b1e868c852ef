"""What a study leaves behind: policies as files, the frontier as CSV and picture, the report; and the answers of all objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from methods.atomic import set_aside, write_text
from methods.errors import InputError
from methods.sealed import sealed, unsealed
from methods.typed import Count, Positive, read
from predictors.intervals import normal_interval
from predictors.loss import PredictorReport
from profilers.workload import Workload
from search.config import ConfigError, RunConfig, read_toml
from search.curves import latency_fits, latency_pairs, predicted_curve
from search.finalists import DENSE_NAME, POLICIES, Finalist, Met
from search.frontier import Candidate, Fidelity, write_csv
from search.limits import under
from search.objectives import Objective, Objectives, file_name
from search.outcome import told_of
from search.prepared import WAY_OUT, Prepared
from search.report import content
from search.report.content import TOP1, DataUse, Entry, Guard, ReportData, Verdict
from search.report.limits import limits, shares
from search.report.page import write_page
from search.report.picture import write_picture
from search.report.table import candidate_table
from search.words import shortened


@dataclass(frozen=True)
class Export:
    """What became of one export of an answer. folder: in the study; problem: why it is not there, "" where it is.

    asked: by `--export`, or because the engine of `--runtime` reads nothing else.
    """

    format: str
    folder: str
    asked: bool
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """The outcome for one objective: every finalist, which of them is the answer, and how it was found.

    chosen: position in `finalists`, None where none meets the objective; verdict: `met`, `not met` (also on a machine too contended
    to tell), or `unvalidated` where the target is not here;
    simple: position of the best simple policy that meets it; difference: KL of the best searched policy minus that of the
    simple one, paired on the validation text, with its standard error; written: into the study, in ISO 8601, UTC, "" where not yet.
    """

    objective: str
    limit_ms: Positive
    verdict: Verdict
    finalists: tuple[Finalist, ...]
    chosen: Count | None
    simple: Count | None
    difference: tuple[float, float] | None
    shadow_price: float
    predicted: Mapping[str, float]
    predictor: PredictorReport | None
    cost: Mapping[str, float]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
    exports: tuple[Export, ...] = field(default=())
    written: str = ""

    def __post_init__(self) -> None:
        if any(place is not None and place >= len(self.finalists) for place in (0, self.chosen, self.simple)):
            raise ValueError(f"finalist {self.chosen} or {self.simple} is none of the {len(self.finalists)} that there are")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        predictor = None if self.predictor is None else asdict(self.predictor)
        lists = {"finalists": [item.to_json() for item in self.finalists], "exports": [asdict(item) for item in self.exports]}
        return {**vars(self), "predictor": predictor, **lists}

    @classmethod
    def from_json(cls, data: object, file: Path | str = "answer") -> Answer:
        """Inverse of `to_json`; raises WrongValue, which names the file and the place in it."""
        return read(cls, data, file, WAY_OUT, POLICIES)

    @property
    def best(self) -> Finalist | None:
        """The chosen finalist."""
        return None if self.chosen is None else self.finalists[self.chosen]

    @property
    def missing(self) -> tuple[Export, ...]:
        """The exports that are not there."""
        return tuple(item for item in self.exports if item.problem)


def answers(folder: Path) -> dict[str, Answer]:
    """All answers of a study, by objective, the oldest first."""
    found = [(_read(path), path) for path in _answer_files(folder)]
    found.sort(key=lambda pair: pair[0].written or _changed(pair[1]))
    return {answer.objective: answer for answer, _ in found}


def _answer_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "answers").glob("*.json") if not path.name.startswith("."))


def _read(path: Path) -> Answer:
    return Answer.from_json(unsealed(path.read_bytes(), path, WAY_OUT), path)


def _changed(path: Path) -> str:
    """When a file was changed, as `Answer.written` says it."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()


def set_damaged_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Moves answers aside that cannot be read, and says which: a run that goes on would read them all at its end."""
    for path in _answer_files(folder):
        try:
            _read(path)
        except InputError as error:
            cause = str(error).partition(f"; {WAY_OUT}")[0]
            say(f"{cause}; it is moved to {set_aside(path).name}: ask for that objective again to have its answer")


def policy_name(finalist: Finalist, answer: Answer) -> str:
    """A file name: the objective for the answer, the preset's name for a simple policy."""
    if finalist is answer.best:
        return file_name(answer.objective)
    text = "".join(c if c.isalnum() else "-" for c in finalist.name)
    return "-".join(filter(None, text.split("-")))


def save(folder: Path, answer: Answer, prepared: Prepared, config: RunConfig, policies: Mapping[str, str]) -> None:
    """Write an answer, its policies (name -> text of the file), the frontier of all answers, the picture and the report."""
    _keep(folder, answer)
    for name, text in policies.items():
        write_text(folder / "policies" / f"{name}.yaml", text)
    _write_report(folder, answer, prepared, config)


def save_exports(folder: Path, answer: Answer, prepared: Prepared, config: RunConfig) -> None:
    """Write an answer again, now that it says what became of its exports; where one is missing, the report says so too."""
    _keep(folder, answer)
    if answer.missing:
        _write_report(folder, answer, prepared, config)


def _keep(folder: Path, answer: Answer) -> None:
    written = replace(answer, written=datetime.now(UTC).isoformat())
    write_text(folder / "answers" / f"{file_name(answer.objective)}.json", sealed(written.to_json()))


def _write_report(folder: Path, answer: Answer, prepared: Prepared, config: RunConfig) -> None:
    data = report_data(folder, answer, prepared, config)
    write_csv([entry.candidate for entry in data.measured], folder / "frontier.csv")
    write_picture(data, folder / "frontier.png")
    write_page(data, folder / "report.html")


def saved_prepared(folder: Path) -> Prepared:
    """What a study prepared once; raises ConfigError where it has not got so far."""
    path = folder / "steps" / "prepared.json"
    if not path.exists():
        raise ConfigError(f"{folder}: nothing is prepared there yet; repeat `search run` to finish it")
    prepared = Prepared.from_json(unsealed(path.read_bytes(), path, WAY_OUT).get("value"), path)
    # Studies of earlier versions were prepared for one workload and do not repeat which.
    return prepared if prepared.workload else replace(prepared, workload=saved_config(folder).load.name)


def saved_answer(folder: Path, objective: str = "") -> Answer:
    """A study's answer for an objective, by default the latest; raises ConfigError where there is none."""
    if not (folder / "config.toml").exists():
        raise ConfigError(f"{folder}: no study there (no config.toml); `search run` makes one")
    found = answers(folder)
    if not found:
        raise ConfigError(f"{folder}: no answer yet; repeat `search run` to finish it")
    if objective and objective not in found:
        raise ConfigError(f"{folder}: no answer for {objective!r}; there are {shortened(found)}")
    return found[objective or list(found)[-1]]


BEST = "best"
"""Names the answer's own policy."""


def measured_policy(folder: Path, answer: Answer, wanted: str = BEST) -> tuple[Answer, Finalist]:
    """A measured policy of a study with the answer that it was measured for.

    wanted: `best`, a policy's name, or its row in the table of `search show`, counted from 1. Raises ConfigError where there is none.
    """
    if wanted == BEST:
        if answer.best is None:
            raise ConfigError(f"{folder}: no policy met {answer.objective}; name one of the measured ones with --candidate")
        return answer, answer.best
    rows = sorted(measured_entries(folder, answer, saved_config(folder).stated_workloads), key=_by_latency)
    names = [entry.candidate.name for entry in rows]
    found = [entry for row, entry in enumerate(rows, 1) if wanted in (str(row), entry.candidate.name)]
    if not found:
        raise ConfigError(
            f"--candidate {wanted}: not measured there; use best, a row from 1 to {len(rows)}, or {shortened(names)}"
        )
    key = found[0].candidate.policy.key()
    if not found[0].candidate.policy.sites:
        raise ConfigError(f"--candidate {wanted}: the dense model, of which there is nothing to export")
    held = [(source, item) for source in [answer, *answers(folder).values()] for item in source.finalists]
    return next((source, item) for source, item in held if item.policy.key() == key)


def _by_latency(entry: Entry) -> tuple[float, float]:
    return entry.candidate.latency_ms, entry.candidate.kl


def saved_report(folder: Path, objective: str = "") -> ReportData:
    """The report of a finished study, from what it left behind."""
    answer, prepared, config = saved_answer(folder, objective), saved_prepared(folder), saved_config(folder)
    try:
        return report_data(folder, answer, prepared, config)
    except InputError as error:
        raise ConfigError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
    except (ValueError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{folder}: its files do not fit together ({error}); repeat `search run`") from error


def measured_entries(folder: Path, answer: Answer, workloads: Sequence[Workload]) -> list[Entry]:
    """Everything measured in the main workload of an answer, each policy once: its finalists first, then those of other objectives.

    Machines drift between runs, so that the others' latencies are their measured ratios to the dense model of their own run, times the
    dense model's latency in this one.
    """
    entries: dict[str, Entry] = {}
    main = Objectives.parse(answer.objective, workloads).main.workload
    others = [
        other
        for name, other in answers(folder).items()
        if name != answer.objective and Objectives.parse(name, workloads).main.workload == main
    ]
    dense_ms = answer.finalists[0].latency_ms
    for source in [answer, *reversed(others)]:
        for finalist in source.finalists:
            if source is not answer:
                finalist = _rescaled(finalist, dense_ms)
            if finalist.label != answer.finalists[0].label:
                continue  # what was measured and what was not never share a table
            if math.isnan(finalist.report_kl) or finalist.policy.key() in entries:
                continue
            if finalist.name == DENSE_NAME:
                group: content.Group = "dense"
            elif finalist is answer.best:
                group = "chosen"
            else:
                group = "baseline" if finalist.simple else "search"
            elsewhere = source is not answer
            met = told_of(finalist, answer.finalists[0].met, answer.objective, answer.limit_ms if elsewhere else None)
            entries[finalist.policy.key()] = Entry(candidate(finalist), group, elsewhere, met)
    result = list(entries.values())
    if answer.best is not None and not answer.best.policy.sites:
        result.append(Entry(replace(candidate(answer.best), name="dense, the answer"), "chosen"))
    return result


def _rescaled(finalist: Finalist, dense_ms: float) -> Finalist:
    ratio, lo, hi = finalist.ratio, finalist.ratio_lo, finalist.ratio_hi
    return replace(finalist, latency_ms=ratio * dense_ms, lo_ms=lo * dense_ms, hi_ms=hi * dense_ms)


def candidate(finalist: Finalist) -> Candidate:
    """A finalist as a candidate, its quality on the report text: measured, or a proxy where its latency is of a target that is not here."""
    scores = {} if math.isnan(finalist.perplexity) else {"perplexity": finalist.perplexity}
    scores |= {} if math.isnan(finalist.report_top1) else {TOP1: finalist.report_top1}
    scores |= {f"{task} {metric}": value for task, found in finalist.tasks.items() for metric, value in found.items()}
    return Candidate(
        policy=finalist.policy,
        name=finalist.name,
        fidelity=Fidelity.MEASURED if finalist.label == "measured" else Fidelity.PROXY,
        kl=finalist.report_kl,
        kl_stderr=0.0 if math.isnan(finalist.report_kl_stderr) else finalist.report_kl_stderr,
        latency_ms=finalist.latency_ms,
        latency_lo=finalist.lo_ms,
        latency_hi=finalist.hi_ms,
        size_bytes=finalist.size_bytes,
        scores=scores,
        role="report",
        latency_label=finalist.label,
    )


def report_data(folder: Path, answer: Answer, prepared: Prepared, config: RunConfig) -> ReportData:
    """The report of one answer in the light of the whole study.

    Machines drift: what was predicted is told at the pace of the run that the answer's latencies come from, by the dense model's.
    """
    asked = Objectives.parse(answer.objective, config.stated_workloads)
    prepared = under(prepared, asked)
    if asked.main.workload.name != prepared.workload:
        raise ConfigError(
            f"{folder}: its last run was about {prepared.workload}; repeat `search run` with {answer.objective} to see that answer again"
        )
    entries = measured_entries(folder, answer, config.stated_workloads)
    pace = answer.finalists[0].latency_ms / prepared.dense_ms[0]
    # Of the answer: an absent target's is measured on a machine that the study was not prepared for.
    device = str(answer.versions.get("device", prepared.target["description"]))
    threads = answer.versions.get("threads", prepared.target["threads"])
    told = "" if "thread" in device else f", threads: {threads}"
    generated = any(use["generated"] for use in prepared.data.values())
    return ReportData(
        study=config.study_name,
        model=str(prepared.model["label"]),
        target=f"{prepared.target['name']} ({device}){told}",
        objective=content.Objective(asked.main.text, answer.limit_ms, _unit(asked.main), asked.main.workload.name),
        verdict=answer.verdict,
        also=tuple(map(_met_words, answer.best.met[1:] if answer.best else ())),
        measured=tuple(entries),
        predicted=tuple(predicted_curve(prepared, pace)),
        sites=tuple((site.name, site.kind, site.block) for site in prepared.sites),
        dense_format=prepared.sites[0].options[0].format,
        guard=guard(answer),
        latency_fits=latency_fits(prepared),
        predictor=answer.predictor,
        shadow_price=answer.shadow_price / pace,
        data=tuple(
            DataUse(role, use["source"], use["sequences"] * use["length"], use["sha256"])  # type: ignore[arg-type]
            for role, use in prepared.data.items()
        ),
        cost=tuple((name, _amount(name, value)) for name, value in answer.cost.items()),
        limits=() if answer.best is None else limits(prepared, answer.best.policy),
        shares=() if answer.best is None else shares(prepared, answer.best.policy, pace),
        latency_pairs=latency_pairs([answer, *answers(folder).values()], prepared, config.stated_workloads),
        provenance=(
            ("model digest", str(prepared.model["digest"])),
            ("dense reference", prepared.dense_name),
            ("device fingerprint", str(prepared.target["fingerprint"])),
            *answer.versions.items(),
        ),
        perplexity_note="the text was written by the model itself" if generated else "",
        notes=(*map(str, prepared.model["notes"]), *prepared.notes, *answer.notes, *map(_missing_words, answer.missing)),
    )


def _unit(objective: Objective) -> str:
    return f"{objective.workload.unit} (95th percentile)" if objective.quantile != 0.5 else objective.workload.unit


def _missing_words(export: Export) -> str:
    return f"there is no {export.format} export{'' if export.asked else ', which was not asked for'}: {export.problem}"


def _met_words(met: Met) -> str:
    """What was also asked for, and what became of it."""
    if met.unit == "bytes":
        return f"{met.name}: {'met' if met.met else 'not met'} with {content.mebibytes(met.value)}."
    return f"{met.name}: {'met' if met.met else 'not met'} with {met.value:.4g} {met.unit} [{met.lo:.4g}, {met.hi:.4g}]."


def guard(answer: Answer) -> Guard | None:
    """The comparison with the simple policies, in the report's terms."""
    n = sum(1 for item in answer.finalists if item.simple and item.name != DENSE_NAME)
    if answer.simple is None or answer.difference is None:
        return None if answer.best is None else Guard(True, "none", None, n)
    mean, stderr = answer.difference
    won = answer.best is not None and not answer.best.simple
    return Guard(won, answer.finalists[answer.simple].name, normal_interval(mean, stderr), n)


def _amount(name: str, value: float) -> str:
    return f"{value:.0f} s" if name.endswith("time") else f"{value:g}"


def json_rows(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """The measured table as JSON rows."""
    return candidate_table(sorted(entries, key=_by_latency)).json()


def saved_config(folder: Path) -> RunConfig:
    """The configuration that a study was last run with, its name and place as they are now: folders are moved and renamed.

    A cache that is not here, because the study comes from another machine, is this machine's own.
    """
    saved = read_toml(folder / "config.toml")
    if not Path(saved.get("cache", "")).expanduser().is_dir():
        saved["cache"] = ""
    here = folder.resolve()
    return RunConfig(**{**saved, "study": here.name, "results": str(here.parent)})
