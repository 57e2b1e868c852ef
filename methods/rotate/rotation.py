"""The exact rewriting: norm gains fused into what reads them, the residual stream and the value heads turned.

Conventions: a hidden state is a row x, which becomes x R1; what a value head puts out, a row v, becomes v R2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.hadamard import random_hadamard
from methods.model.structure import Structure
from methods.model.weights import bias_of, norm_view
from methods.rotate.wiring import HeadPair, Wiring


@dataclass(frozen=True)
class Rotations:
    """residual: R1 (d_model, d_model); heads: R2 (n_blocks, n_kv_heads, head_dim, head_dim), None for none; orthogonal, fp64."""

    residual: Tensor
    heads: Tensor | None = None


def random_rotations(structure: Structure, seed: int, *, heads: bool) -> Rotations:
    """Random Hadamard matrices, a new one for every value head; R1 does not depend on `heads`."""
    generator = torch.Generator().manual_seed(seed)
    residual = random_hadamard(structure.d_model, generator)
    if not heads:
        return Rotations(residual)
    own = [random_hadamard(structure.head_dim, generator) for _ in range(len(structure.blocks) * structure.n_kv_heads)]
    shape = len(structure.blocks), structure.n_kv_heads, structure.head_dim, structure.head_dim
    return Rotations(residual, torch.stack(own).view(shape))


def fused(model: nn.Module, structure: Structure, wiring: Wiring) -> dict[str, Tensor]:
    """The parameters, by full name, that a rotation changes, in fp64 and with the norms' gains moved into their readers.

    The same function as before: `normalise(x) * g @ W^T = normalise(x) @ (W g)^T`. A tied head has a weight of its own here.
    """
    state = {f"{structure.embedding}.weight": model.get_parameter(f"{structure.embedding}.weight").detach().double()}
    for norm, readers in wiring.readers.items():
        view = norm_view(model, norm)
        gain = view.weight.double() + view.unit_offset
        state[f"{norm}.weight"] = torch.full_like(gain, 1.0 - view.unit_offset)
        for name in readers:
            state[f"{name}.weight"] = model.get_parameter(f"{name}.weight").detach().double() * gain
    for name in (*wiring.writers, *(pair.value for pair in wiring.heads)):
        if f"{name}.weight" not in state:
            state[f"{name}.weight"] = model.get_parameter(f"{name}.weight").detach().double()
        bias = bias_of(model.get_submodule(name))
        if bias is not None:
            state[f"{name}.bias"] = bias.double()
    return state


def rotated(state: Mapping[str, Tensor], structure: Structure, wiring: Wiring, rotations: Rotations) -> dict[str, Tensor]:
    """`fused` parameters after the rotations, in the state's dtype; differentiable in the rotations."""
    result = dict(state)
    dtype = state[f"{structure.embedding}.weight"].dtype
    r1 = rotations.residual.to(dtype)
    if rotations.heads is not None:
        for pair, r2 in zip(wiring.heads, rotations.heads.to(dtype), strict=True):
            _turn_heads(result, pair, r2)
    for name in (structure.embedding, *(name for readers in wiring.readers.values() for name in readers)):
        # E R1 for what puts x R1 out, W R1 for what reads it: (x R1) (W R1)^T = x W^T.
        result[f"{name}.weight"] = result[f"{name}.weight"] @ r1
    for name in wiring.writers:
        result[f"{name}.weight"] = r1.T @ result[f"{name}.weight"]
        if f"{name}.bias" in result:
            result[f"{name}.bias"] = result[f"{name}.bias"] @ r1
    return result


def _turn_heads(state: dict[str, Tensor], pair: HeadPair, r2: Tensor) -> None:
    """v R2 out of every value head, R2^T v into the columns of `output` that its query heads fill; r2: (n_kv_heads, d, d).

    Attention only averages the rows of a value head, so that R2 passes through it.
    """
    n_kv, d = pair.n_kv_heads, pair.head_dim
    weight = state[f"{pair.value}.weight"]
    rows = weight[pair.first :].view(n_kv, d, -1)
    state[f"{pair.value}.weight"] = torch.cat([weight[: pair.first], (r2.mT @ rows).reshape(n_kv * d, -1)])
    if f"{pair.value}.bias" in state:
        bias = state[f"{pair.value}.bias"]
        own = (bias[pair.first :].view(n_kv, 1, d) @ r2).reshape(-1)
        state[f"{pair.value}.bias"] = torch.cat([bias[: pair.first], own])
    out = state[f"{pair.output}.weight"]
    columns = out.view(len(out), n_kv, pair.n_heads // n_kv, d)
    state[f"{pair.output}.weight"] = torch.einsum("okgi,kij->okgj", columns, r2).reshape(out.shape)
