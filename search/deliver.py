"""Delivering an answer: its policy file, its checkpoint, and exports that are loaded back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.config import RunConfig
from search.export.registry import EXPORTERS
from search.prepared import Prepared
from spaces.runtimes import runtime

if TYPE_CHECKING:
    from torch import Tensor

    from search.finalists import Finalist
    from search.results import Answer
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


def deliver(session: Session, prepared: Prepared, answer: Answer, edits: Mapping[str, Any]) -> None:
    """Write the answer's checkpoint, and the exports asked for, each loaded back and compared."""
    from methods import checkpoint

    best = answer.best
    assert best is not None
    file = policy_file_of(session, prepared, best, answer)
    folder = checkpoint_folder(session.config.folder, best)
    session.switch.dense()
    if not folder.exists():
        with session.progress.busy("writing the checkpoint"):
            checkpoint.write(folder, session.loaded, file, edits)
    session.progress.say(f"checkpoint: {folder} (search generate {folder})")
    for name in export_formats(session.config):
        export_answer(
            session, name, file, edits, session.config.folder / "exports" / name / folder.name, bool(session.config.export)
        )


def export_formats(config: RunConfig) -> tuple[str, ...]:
    """The formats asked for, or the one that the runtime reads."""
    own = runtime(config.runtime).export
    return config.export or ((own,) if own in EXPORTERS else ("dense",))


def export_answer(
    session: Session, name: str, file: Any, edits: Mapping[str, Any], folder: Path, required: bool, ids: Tensor | None = None
) -> Any:
    """Export, load back in the stock runtime and compare; where it was not `required`, a refusal is only reported.

    ids: (b, t) token ids to compare on; by default the report text's first sequence.
    """
    from search.evaluate import Switch
    from search.export.registry import exporter

    module = exporter(name)
    session.switch.dense()
    try:
        if not folder.exists():
            with session.progress.busy(f"exporting as {name}"):
                module.export(folder, session.loaded, file, edits)
    except ValueError as error:
        if required:
            raise
        session.progress.say(f"not exported as {name}: {error}")
        return None
    switch: Switch = session.switch
    switch.edits(edits)
    with session.progress.busy(f"loading the {name} export back"):
        tokens = compared(session.corpora["report"].tokens) if ids is None else ids
        check = module.verify(folder, session.model, tokens)
    switch.dense()
    if not check.ok:
        raise ValueError(f"export {folder}: what stock runtimes load is not what was evaluated: {check.message}")
    session.progress.say(f"exported {folder}: {check.summary}")
    return check


def compared(tokens: Tensor) -> Tensor:
    """The first sequences (n, length) of a text (n_sequences, length), together `COMPARED` tokens or more."""
    return tokens[: -(-COMPARED // tokens.shape[1])]
