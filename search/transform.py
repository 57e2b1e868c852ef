"""What a run does to the model as a whole before anything is decided at its sites: `--transform`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from methods.catalogue import model_method
from methods.model.load import LoadedModel
from methods.model.trace import logits_of
from methods.model.weights import digest_of
from methods.policy import Decision
from methods.rotate.model import apply_rotations, rotations_of
from methods.rotate.rotation import Rotations
from search.files import content_key, kept_tensors
from search.progress import Progress

_COMPARED = 128
"""Tokens on which the rounding of the rotated weights is judged."""


def transformed(
    loaded: LoadedModel, decision: Decision, batches: Sequence[Tensor], cache: Path, progress: Progress
) -> LoadedModel:
    """The model, changed in place, under a decision of the whole model; its digest is another one, and so is every key made of it.

    The new weights are rounded to the checkpoint's dtype, as they are priced and exported; a note says what that costs. batches: token
    ids (b, t); what is learned from them is kept in the cache folder. Raises RotationRefused, with the reason.
    """
    model, structure = loaded.model, loaded.structure
    ids = batches[0][:1, :_COMPARED]
    before = logits_of(model, ids).log_softmax(-1)
    progress.say(f"transforming the whole model: {decision.label}")
    rotations = _rotations(loaded, decision, batches, cache, progress)
    structure = apply_rotations(model, structure, rotations, dtype=structure.dtype)
    after = logits_of(model, ids).log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    note = (
        f"the whole model was transformed by {decision.label}, and its weights were rounded to {structure.dtype} again: "
        f"KL {max(kl, 0):.2g} nats per token from the model as stored, on {ids.numel()} tokens; losses are relative to the new model"
    )
    progress.say(note)
    digest = content_key(digest_of(model, structure.dtype), decision.label)
    return replace(loaded, structure=structure, digest=digest, notes=(*loaded.notes, note))


def _rotations(
    loaded: LoadedModel, decision: Decision, batches: Sequence[Tensor], cache: Path, progress: Progress
) -> Rotations:
    """Those of the decision; learned ones are looked for in the cache, since learning is slow and not the same on every machine."""
    if "steps" not in model_method(decision.method).knobs:
        return rotations_of(loaded.model, loaded.structure, decision)
    from search.session import all_threads

    tokens = content_key([batch.tolist() for batch in batches])
    path = cache / "rotations" / f"{content_key(loaded.digest, decision.label, tokens)}.safetensors"

    def learn() -> dict[str, Tensor]:
        with progress.bar("learning rotations") as update, all_threads():
            rotations = rotations_of(loaded.model, loaded.structure, decision, batches, progress=update)
        return {"residual": rotations.residual, **({} if rotations.heads is None else {"heads": rotations.heads})}

    found = kept_tensors(path, learn, progress.say)
    return Rotations(found["residual"], found.get("heads"))


def text_of(decisions: Sequence[Decision]) -> str:
    """The run's option that means these decisions of the whole model; raises ValueError for more than one."""
    if len(decisions) > 1:
        raise ValueError(f"{' and '.join(d.label for d in decisions)}: a model is transformed once; choose one")
    return decisions[0].label if decisions else "none"
