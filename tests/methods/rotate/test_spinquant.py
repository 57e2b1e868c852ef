"""Learned rotations: orthogonal throughout, the random ones after no step, and a smaller loss of the rounded model afterwards."""

from __future__ import annotations

import pytest
import torch

from methods.formats.format import parse_format
from methods.hadamard import random_orthogonal
from methods.model.describe import describe
from methods.policy import Decision
from methods.rotate.cayley import CayleySGD, cayley
from methods.rotate.model import rotations_of, transform_model
from methods.rotate.rotation import Rotations, fused
from methods.rotate.spinquant import _RoundedModel
from methods.rotate.wiring import wiring
from tests.tiny import tiny_model, tiny_tokens

FORMAT = "w3a8-token-g48"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text() -> list[torch.Tensor]:
    return list(tiny_tokens(6, 20).split(2))


def spinquant(**knobs: bool | int | float | str) -> Decision:
    return Decision.of("spinquant", **{"format": FORMAT, "steps": 4, "batch": 3, **knobs})


def rounded_loss(rotations: Rotations) -> float:
    model = tiny_model("llama")
    structure = describe(model)
    found = wiring(model, structure)
    state = {name: tensor.float() for name, tensor in fused(model, structure, found).items()}
    with _RoundedModel(model, structure, found, state, parse_format(FORMAT)) as rounded, torch.no_grad():
        return float(rounded.loss(rotations, torch.cat(text())[:4]))


def test_the_cayley_transform_is_a_rotation_near_the_exponential() -> None:
    skew = torch.randn(3, 7, 7, generator=generator(), dtype=torch.float64) * 0.02
    skew = skew - skew.mT
    rotation = cayley(skew)
    assert (rotation @ rotation.mT - torch.eye(7)).abs().max() < 1e-13
    assert (rotation - torch.matrix_exp(skew)).abs().max() < 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_descent_stays_orthogonal_and_finds_the_nearest_rotation(momentum: float) -> None:
    """The rotation that is nearest to a matrix is known: it is the polar factor."""
    target = random_orthogonal(6, generator(1))
    target[0] *= target.det().sign()
    x = torch.eye(6, dtype=torch.float64).requires_grad_()
    optimizer = CayleySGD([{"params": [x], "lr": 0.2}], momentum=momentum)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (x - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 1e-3 < 1 < losses[0]
    assert (x @ x.mT - torch.eye(6)).abs().max() < 1e-12


def test_without_steps_it_is_quarot_of_the_same_seed() -> None:
    model = tiny_model("llama")
    structure = describe(model)
    start = rotations_of(model, structure, Decision.of("quarot", seed=3))
    found = rotations_of(model, structure, spinquant(steps=0, seed=3))
    assert start.heads is not None and found.heads is not None
    assert torch.equal(found.residual, start.residual) and torch.equal(found.heads, start.heads)


@pytest.mark.parametrize("heads", [True, False])
def test_learning_makes_the_rounded_models_loss_smaller_and_keeps_the_model(heads: bool) -> None:
    model = tiny_model("llama")
    before, structure = {name: p.clone() for name, p in model.named_parameters()}, describe(model)
    start = rotations_of(model, structure, Decision.of("quarot", heads=heads))
    found = rotations_of(model, structure, spinquant(heads=heads), text())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert rounded_loss(found) < rounded_loss(start) - 1e-3
    assert (found.heads is not None) is heads
    for matrix in (found.residual, *([] if found.heads is None else [found.heads])):
        assert (matrix @ matrix.mT - torch.eye(matrix.shape[-1])).abs().max() < 1e-10
    assert not torch.equal(found.residual, start.residual)
    with torch.no_grad():
        logits = model(tiny_tokens()).logits
        transform_model(model, structure, [spinquant(heads=heads, steps=2)], text())
        assert (model(tiny_tokens()).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["gemma", "mixtral"])
def test_other_architectures_learn_too(arch: str) -> None:
    model = tiny_model(arch)
    structure = describe(model)
    found = rotations_of(model, structure, spinquant(steps=1), text())
    assert (found.residual @ found.residual.T - torch.eye(96)).abs().max() < 1e-10


def test_it_needs_text_and_a_format_that_fits() -> None:
    model = tiny_model("llama")
    structure = describe(model)
    with pytest.raises(ValueError, match="no text to learn from"):
        rotations_of(model, structure, spinquant())
    with pytest.raises(ValueError, match="does not divide"):
        rotations_of(model, structure, spinquant(format="w4a16-g112"), text())
    with pytest.raises(ValueError, match="unknown format"):
        rotations_of(model, structure, spinquant(format="int4"), text())
