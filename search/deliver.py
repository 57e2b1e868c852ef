"""Delivering an answer: its policy file, its checkpoint, and exports that are loaded back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.config import RunConfig
from search.export.registry import EXPORTERS
from search.memory import give_back
from search.prepared import Prepared
from spaces.runtimes import runtime

if TYPE_CHECKING:
    from torch import Tensor

    from methods.method import Edit
    from methods.policy_file import PolicyFile
    from search.export.verification import Verification
    from search.finalists import Finalist
    from search.results import Answer, Export
    from search.session import Session

COMPARED = 64
"""Tokens on which the loss of an export is compared, where the text has so many: that of one or two tells noise."""


def policy_file_of(session: Session, prepared: Prepared, item: Finalist, answer: Answer) -> Any:
    """The policy with everything that was measured of it."""
    from methods.policy import Policy
    from methods.policy_file import PolicyFile
    from search.results import policy_name

    workload = session.config.load
    measured: list[Mapping[str, Any]] = [
        {
            "metric": f"latency_ms ({workload.unit})",
            "value": item.latency_ms,
            "ci95" if item.label == "measured" else "bounds": [item.lo_ms, item.hi_ms],
            "source": item.label,
        },
        {"metric": "size_bytes", "value": item.size_bytes, "source": "measured"},
    ]
    if item.report_kl == item.report_kl:
        sha = prepared.data["report"]["sha256"]
        measured.append({"metric": "kl_nats_per_token", "value": item.report_kl, "source": "measured", "dataset_sha256": sha})
        if item.perplexity == item.perplexity:
            measured.append({"metric": "perplexity", "value": item.perplexity, "source": "measured", "dataset_sha256": sha})
    calibration, decision = prepared.data["calibrate"], session.config.transform_decision
    tokens = calibration["sequences"] * calibration["length"]
    return PolicyFile(
        policy=Policy(item.policy.sites, () if decision is None else (decision,)),
        id=f"{session.config.study_name}-{policy_name(item, answer)}",
        model={"id": prepared.model["label"], "revision": prepared.model["digest"]},
        target={
            "device": prepared.target["description"],
            "fingerprint": prepared.target["fingerprint"],
            "engine": "isolatency",
            "threads": prepared.target["threads"],
            "workload": workload.name,
            "objective": answer.objective,
        },
        measured=measured,
        weights_algo={
            "calib": {"sha256": calibration["sha256"], "tokens": tokens, "seqlen": calibration["length"]},
            "in_order": item.recompressed,
            "seed": session.config.seed,
        },
        provenance={"versions": dict(answer.versions), "study": session.config.study_name},
    )


def policy_text(session: Session, prepared: Prepared, item: Finalist, answer: Answer) -> str:
    from methods import policy_file

    return policy_file.render(policy_file_of(session, prepared, item, answer), session.loaded.structure)


def checkpoint_folder(folder: Path, item: Finalist) -> Path:
    """Where an answer's own checkpoint lies: named by policy and weights, so that equal answers share it."""
    return folder / "models" / f"{item.policy.key()}{'-in-order' if item.recompressed else ''}"


def deliver(session: Session, prepared: Prepared, answer: Answer, edits: Mapping[str, Edit]) -> tuple[Export, ...]:
    """Write the answer's checkpoint, and the exports asked for, each loaded back and compared; returns what became of the exports.

    What is there already and sound is kept; what is damaged, or of other weights, is moved aside and made again.
    """
    best = answer.best
    assert best is not None
    file = policy_file_of(session, prepared, best, answer)
    folder = checkpoint_folder(session.config.folder, best)
    session.switch.dense()
    give_back()
    _write_checkpoint(session, folder, file, edits)
    session.progress.say(f"checkpoint: {folder} (search generate {folder})")
    place = session.config.folder / "exports"
    return tuple(_exported(session, name, file, edits, place / name / folder.name) for name in export_formats(session.config))


def _write_checkpoint(session: Session, folder: Path, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    from methods import atomic, checkpoint

    if folder.exists():
        problem = checkpoint.problem(folder, edits)
        if not problem:
            return
        session.progress.say(f"{problem}; it is moved to {atomic.set_aside(folder).name} and written again")
    with session.progress.busy("writing the checkpoint"):
        checkpoint.write(folder, session.loaded, file, edits)


def export_formats(config: RunConfig) -> tuple[str, ...]:
    """The formats asked for, or the one that the runtime reads."""
    own = runtime(config.runtime).export
    return config.export or ((own,) if own in EXPORTERS else ("dense",))


def asked_for(config: RunConfig, name: str) -> bool:
    """Whether an answer without this export is not what was asked for.

    An engine that was named reads its own format and nothing else; for the project's own runtime the checkpoint does.
    """
    return bool(config.export) or runtime(config.runtime).export == name


def _exported(session: Session, name: str, file: PolicyFile, edits: Mapping[str, Edit], folder: Path) -> Export:
    """An export in the study, or why there is none: an answer stands without it."""
    from methods.bank import DamagedEdit
    from search.results import Export

    config = session.config
    place = folder.relative_to(config.folder).as_posix()
    asked = asked_for(config, name)
    try:
        export_answer(session, name, file, edits, folder, heal=True)
    except DamagedEdit:
        raise  # no fault of the export: whoever made the edits makes them again
    except ValueError as error:
        session.progress.say(f"not exported as {name}: {error}")
        return Export(name, place, asked, str(error))
    return Export(name, place, asked)


def export_answer(
    session: Session,
    name: str,
    file: PolicyFile,
    edits: Mapping[str, Edit],
    folder: Path,
    heal: bool,
    ids: Tensor | None = None,
) -> Verification:
    """Export, load back in the stock runtime and compare; what stands in `folder` and is just that is kept.

    ids: (b, t) token ids to compare on, by default the report text's first; heal: move aside what stands there and is not that, and
    export again. Otherwise, and for what the format cannot express or does not give back, raises ValueError; nothing is left then.
    """
    from methods.atomic import set_aside
    from methods.lift import Lifted
    from search.export import checked
    from search.export.registry import exporter

    module, progress = exporter(name), session.progress
    session.switch.dense()
    lifted = Lifted(edits, session.loaded.structure, session.model)
    tokens = compared(session.corpora["report"].tokens) if ids is None else ids

    def write(place: Path) -> None:
        session.switch.dense()
        with progress.busy(f"exporting as {name}"):
            module.export(place, session.loaded, file, lifted)

    def verify(place: Path) -> Verification:
        session.switch.edits(lifted)
        with progress.busy(f"loading the {name} export back"):
            return module.verify(place, session.model, tokens)

    try:
        if folder.exists():
            check = checked.standing(folder, verify)
            if check.ok:
                progress.say(f"exported {folder}: {check.summary}")
                return check
            if not heal:
                raise ValueError(
                    f"{folder} is no sound {name} export of it: {check.message}; remove it or choose another folder"
                )
            progress.say(f"{folder}: {check.message}; it is moved to {set_aside(folder).name} and exported again")
        check = checked.export(folder, write, verify)
    finally:
        session.switch.dense()
    progress.say(f"exported {folder}: {check.summary}")
    return check


def compared(tokens: Tensor) -> Tensor:
    """The first sequences (n, length) of a text (n_sequences, length), together `COMPARED` tokens or more."""
    return tokens[: -(-COMPARED // tokens.shape[1])]
