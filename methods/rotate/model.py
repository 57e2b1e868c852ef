"""`transform_model`: applies what was decided for a model as a whole, and tests that the model still computes what it did.

Only what can be fused into weights is done. SpinQuant's and QuaRot's online rotations, R3 (queries and keys behind the rotary
embedding) and R4 (the down projection's input), would run between kernels at every token, and there is no kernel for them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.catalogue import MODEL_METHODS, model_method
from methods.formats.numerics import DTYPES
from methods.model.settings import untie_
from methods.model.structure import Structure
from methods.model.trace import logits_of, probe_tokens
from methods.policy import Decision, Knob
from methods.rotate.rotation import Rotations, fused, random_rotations, rotated
from methods.rotate.spinquant import Spin, spin
from methods.rotate.wiring import RotationRefused, Wiring, wiring

__all__ = ["RotationRefused", "apply_rotations", "rotations_of", "transform_model"]

TOLERANCE = 1e-3
"""Largest change of a logit, as a part of the largest one: fp32 stays far below, anything that is wired otherwise far above."""


def transform_model(
    model: Any,
    structure: Structure,
    decisions: Sequence[Decision],
    batches: Sequence[Tensor] = (),
    *,
    dtype: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Structure:
    """Rewrites the model, in place, as the decisions say; the structure that it has then (an untied head counts as parameters).

    Call it right after loading, before anything reads the weights. batches: token ids (b, t) that `spinquant` learns from.
    dtype: a storage dtype that the new weights are rounded to; without, the model computes what it did up to fp32 rounding.
    Raises RotationRefused, with the model as it was, where the architecture does not allow it, and ValueError for a decision that is
    none of the whole model's.
    """
    for decision in _checked(decisions):
        structure = apply_rotations(
            model, structure, rotations_of(model, structure, decision, batches, progress=progress), dtype=dtype
        )
    return structure


def refuses(model: Any, structure: Structure, decision: Decision) -> str | None:
    """Why the decision cannot stand for this model, which stays as it is, or None; learns nothing."""
    knobs = {name: value for name, value in decision.knobs if name in ("seed", "heads")}
    try:
        _verify(model, structure, wiring(model, structure), rotations_of(model, structure, Decision.of("quarot", **knobs)))
    except RotationRefused as error:
        return str(error)
    return None


def rotations_of(
    model: Any,
    structure: Structure,
    decision: Decision,
    batches: Sequence[Tensor] = (),
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Rotations:
    """The rotations that a decision means for this model, which stays as it is; errors as in `transform_model`.

    `spinquant` with no steps is `quarot` of the same seed.
    """
    knobs = _knobs(decision)
    found = wiring(model, structure)
    heads = bool(knobs["heads"])
    if heads and not found.heads:
        raise RotationRefused(
            f"{structure.architecture}: no value and output projection in every block whose heads could be rotated; "
            f"use {decision.method}:heads=false"
        )
    start = random_rotations(structure, int(knobs["seed"]), heads=heads)
    if decision.method == "quarot":
        return start
    _verify(model, structure, found, start)
    settings = Spin(str(knobs["format"]), int(knobs["steps"]), float(knobs["rate"]), int(knobs["batch"]), int(knobs["seed"]))
    return spin(model, structure, found, start, batches, settings, progress=progress)


@torch.no_grad()
def apply_rotations(model: Any, structure: Structure, rotations: Rotations, *, dtype: str = "") -> Structure:
    """Puts rotations into the model, in place, with fp64 arithmetic; see `transform_model`. Memory: six times the model at its peak."""
    state = _verify(model, structure, wiring(model, structure), rotations)
    for name, tensor in state.items():
        parameter = model.get_parameter(name)
        stored = (tensor.to(DTYPES[dtype]) if dtype else tensor).to(parameter.dtype)
        if structure.tied and name == f"{structure.head}.weight":
            structure = untie_(model, structure, stored)
        else:
            parameter.data = stored
    return structure


def _checked(decisions: Sequence[Decision]) -> Sequence[Decision]:
    for decision in decisions:
        _knobs(decision)
    if len(decisions) > 1:
        raise ValueError(f"{' and '.join(d.label for d in decisions)} both rotate the model; choose one")
    return decisions


def _knobs(decision: Decision) -> dict[str, Knob]:
    method = model_method(decision.method)
    if not method.rotates:
        others = [name for name, other in MODEL_METHODS.items() if other.rotates]
        raise ValueError(f"{decision.label} changes no weight of the model; {' and '.join(others)} do")
    return method.resolve(dict(decision.knobs))


@torch.no_grad()
def _verify(model: nn.Module, structure: Structure, found: Wiring, rotations: Rotations) -> dict[str, Tensor]:
    """The rotated parameters in fp64; raises RotationRefused where the model with them would not compute what it does now."""
    plain = fused(model, structure, found)
    state = rotated(plain, structure, found, rotations)
    if _change(model, structure, state) <= TOLERANCE:
        return state
    if rotations.heads is not None:
        without = rotated(plain, structure, found, Rotations(rotations.residual))
        if _change(model, structure, without) <= TOLERANCE:
            raise RotationRefused(
                f"{structure.architecture}: its value heads cannot be rotated (something stands between them and the output projection, "
                "or they are laid out otherwise); use heads=false"
            )
    norms = ", ".join(found.unread[:2])
    reason = (
        f"norms such as {norms} scale, channel by channel, what is added to the stream" if norms else "it is wired otherwise"
    )
    raise RotationRefused(
        f"{structure.architecture}: rotating its residual stream changes what it computes: {reason}; "
        "only pre-norm decoders are rotated, use a method of a single site"
    )


def _change(model: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> float:
    """Largest change of a logit of a few tokens under other parameters, as a part of the largest one."""
    ids = probe_tokens(structure.n_vocab)
    expected, logits = logits_of(model, ids), logits_with(model, state, ids)
    return float((logits - expected).abs().max() / expected.abs().max())


def logits_with(model: nn.Module, state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (b, t, n_vocab) fp32 of token ids (b, t) with some parameters replaced, a tied head apart from its embedding."""
    own = {name: tensor.to(model.get_parameter(name).dtype) for name, tensor in state.items()}
    out = functional_call(model, own, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False)
    result: Tensor = out.logits.float()
    return result
