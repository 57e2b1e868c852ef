"""Rotations around one weight, undone by whoever decodes it: `W -> U (W diag(s)) V^T` for inputs `V (x / s)`, outputs turned back by U^T.

Parts of a payload, each there or not:
`turn.left_a` (p, p), `turn.left_b` (q, q) fp32: U = A ⊗ B over the p q outputs; `turn.right_a`, `turn.right_b`: V likewise over the inputs;
`turn.block` (1,) int32: V = I ⊗ H with Hadamard matrices of this order; `turn.ratio` (d_in,) bf16: s.
`turn.power` (d_in,) int8: s = 2**-power instead, powers of two by which the rows that write the inputs can be multiplied, so that
nothing is left to undo where the model runs (`methods.lift`).
`turn.slots` (3, n) int32, next to the inputs as they are: some taken apart, others joined, which is no rotation (`methods.formats.slots`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.slots import from_slots, shares, to_slots
from methods.hadamard import block_transform

Payload = Mapping[str, Tensor]

POWER = "turn.power"


def turned(weight: Tensor, payload: Payload) -> Tensor:
    """Weight (d_out, d_in) -> `U (W diag(s)) V^T` in fp64."""
    weight = weight.double()
    if "turn.slots" in payload:
        weight = to_slots(weight, payload["turn.slots"])
    weight = _right(weight * _ratio(payload), payload)
    if "turn.left_a" in payload:
        weight = _kronecker(weight.T, payload["turn.left_a"], payload["turn.left_b"]).T
    return weight


def turned_back(weight: Tensor, payload: Payload) -> Tensor:
    """Undoes `turned`, in fp64; joined inputs keep the mean of their columns."""
    weight = weight.double()
    if "turn.left_a" in payload:
        weight = _kronecker(weight.T, payload["turn.left_a"].T, payload["turn.left_b"].T).T
    weight = _right(weight, payload, back=True)
    weight = weight / _ratio(payload)
    if "turn.slots" in payload:
        weight = from_slots(weight * shares(weight.shape[1], payload["turn.slots"]), payload["turn.slots"])
    return weight


def turned_inputs(x: Tensor, payload: Payload) -> Tensor:
    """Inputs (…, d_in) -> `V (x / s)`, as whoever runs the turned weight has them: in fp64, or as they are where powers of two are all."""
    x = x if _powers_alone(payload) else x.double()
    if "turn.slots" in payload:
        x = to_slots(x, payload["turn.slots"]) * shares(x.shape[-1], payload["turn.slots"])
    return _right(x / _ratio(payload), payload)


def inputs_back(x: Tensor, payload: Payload) -> Tensor:
    """Undoes `turned_inputs`: rounded there and brought back, inputs meet the decoded weight as the turned ones meet the turned weight."""
    x = _right(x if _powers_alone(payload) else x.double(), payload, back=True) * _ratio(payload)
    return from_slots(x, payload["turn.slots"]) if "turn.slots" in payload else x


def is_turned(payload: Payload) -> bool:
    """Whether the payload has a rotation."""
    return any(part.startswith("turn.") for part in payload)


def _powers_alone(payload: Payload) -> bool:
    return all(part == POWER for part in payload if part.startswith("turn."))


def _ratio(payload: Payload) -> Tensor | float:
    """s (d_in,): fp64, or fp32 for powers of two, which are exact in it."""
    if POWER in payload:
        return torch.exp2(-payload[POWER].float())
    return payload["turn.ratio"].double() if "turn.ratio" in payload else 1.0


def _right(x: Tensor, payload: Payload, *, back: bool = False) -> Tensor:
    """Rows x (…, d_in) -> V x, or V^T x."""
    if "turn.block" in payload:
        x = block_transform(x, int(payload["turn.block"]), inverse=back)
    if "turn.right_a" in payload:
        a, b = payload["turn.right_a"], payload["turn.right_b"]
        x = _kronecker(x, a.T, b.T) if back else _kronecker(x, a, b)
    return x


def _kronecker(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows x (…, p q) -> (A ⊗ B) x, fp64."""
    grid = x.reshape(*x.shape[:-1], len(a), len(b))
    return torch.einsum("ij,...jk,lk->...il", a.double(), grid, b.double()).reshape(x.shape)
