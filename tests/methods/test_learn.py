"""THE training loop against loops written out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from methods.learn import SignSGD, Training, batches, constant, cosine, learn, linear, through

ROWS = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
WANTED = ROWS @ torch.tensor([[1.0], [-2.0], [0.5]])
START = {"slope": torch.zeros(3, 1), "shift": torch.ones(1)}


def _loss(parameters, drawn, done):
    return (ROWS[drawn] @ parameters["slope"] + parameters["shift"] - WANTED[drawn]).square().mean()


def _everything(parameters):
    return float(_loss(parameters, torch.arange(11), 0.0))


def test_no_steps_return_the_input():
    learned = learn(START, _loss, 11, Training(0, 0.1))
    assert learned.step == 0 and learned.losses == ()
    assert all(torch.equal(learned.parameters[name], START[name]) for name in START)


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
def test_is_the_loop_written_out(schedule):
    training = Training(30, {"slope": 0.1, "shift": 0.02}, schedule=schedule, batch=4, seed=3)
    learned = learn(START, _loss, 11, training)
    slope, shift = (START[name].clone().requires_grad_() for name in ("slope", "shift"))
    optimizer = torch.optim.Adam([{"params": [slope], "lr": 0.1}, {"params": [shift], "lr": 0.02}])
    losses = []
    for step, drawn in enumerate(islice(batches(11, 4, 3), 30)):
        loss = (ROWS[drawn] @ slope + shift - WANTED[drawn]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step / 30)
        optimizer.param_groups[1]["lr"] = 0.02 * schedule(step / 30)
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(learned.parameters["slope"], slope) and torch.equal(learned.parameters["shift"], shift)
    assert learned.losses == tuple(losses) and learned.step == 30
    assert START["slope"].count_nonzero() == 0 and not START["slope"].requires_grad


def test_same_seed_same_result():
    results = [learn(START, _loss, 11, Training(20, 0.1, batch=3, seed=seed)).parameters["slope"] for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_batches_take_every_item_once_a_round():
    drawn = torch.cat(list(islice(batches(7, 3, 5), 14)))
    rounds = drawn[:42].view(6, 7)
    assert all(sorted(round_.tolist()) == list(range(7)) for round_ in rounds)
    assert len({tuple(round_.tolist()) for round_ in rounds}) > 1
    assert sorted(next(batches(4, 9, 0)).tolist()) == [0, 1, 2, 3]


def test_sign_descent_steps_are_of_one_size():
    start = {"w": torch.tensor([3.0, -2.0, 0.0])}
    target = torch.tensor([0.0, 5.0, 0.0])
    rate = Training(4, 0.5, SignSGD, linear)
    learned = learn(start, lambda p, _d, _t: (p["w"] - target).square().sum(), 1, rate)
    # Steps of 0.5, 0.375, 0.25 and 0.125 towards the target; none where the gradient is zero.
    assert torch.equal(learned.parameters["w"], torch.tensor([1.75, -0.75, 0.0]))


def test_bounds_and_clipping():
    def slope(parameters, _drawn, _done):
        return (parameters["w"] * torch.tensor([3.0, 4.0])).sum()

    sgd, start = torch.optim.SGD, {"w": torch.zeros(2)}
    bounded = learn(start, slope, 1, Training(5, 1.0, sgd, bounds={"w": (-0.25, 0.5)}))
    assert torch.equal(bounded.parameters["w"], torch.full((2,), -0.25))
    clipped = learn(start, slope, 1, Training(1, 1.0, sgd, clip=1.0))
    assert torch.allclose(clipped.parameters["w"], torch.tensor([-0.6, -0.8]), atol=1e-5)


def test_keeps_the_best():
    away = Training(4, 5.0, torch.optim.SGD, batch=11, every=3)
    assert _everything(learn(START, _loss, 11, away, evaluate=_everything).parameters) > _everything(START)
    best = learn(START, _loss, 11, replace(away, keep_best=True), evaluate=_everything)
    assert best.step == 0 and all(torch.equal(best.parameters[name], START[name]) for name in START)
    down = learn(START, _loss, 11, Training(25, 0.3, keep_best=True, every=4), evaluate=_everything)
    assert [step for step, _ in down.evaluations] == [0, 4, 8, 12, 16, 20, 24, 25]
    step, least = min(down.evaluations, key=lambda pair: pair[1])
    assert down.step == step > 0 and _everything(down.parameters) == least
    running = learn(START, _loss, 11, Training(25, 0.3, keep_best=True))
    assert running.step == min(range(25), key=lambda index: running.losses[index])


def test_touches_nothing_but_the_parameters():
    frozen = torch.tensor([2.0], requires_grad=True)
    seen = []
    learned = learn(
        {"w": torch.ones(1), "unused": torch.ones(2)},
        lambda p, _d, _t: (p["w"] * frozen).square().sum(),
        1,
        Training(3, 0.1),
        progress=lambda done, of: seen.append((done, of)),
    )
    assert frozen.grad is None and frozen.item() == 2.0 and torch.equal(learned.parameters["unused"], torch.ones(2))
    assert learned.parameters["w"] < 1 and not learned.parameters["w"].requires_grad
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_part_done_is_told():
    parts = []
    learn(START, lambda p, d, done: parts.append(done) or _loss(p, d, done), 11, Training(4, 0.1))
    assert parts == [0.0, 0.25, 0.5, 0.75]


def test_through_passes_the_value_and_the_gradient():
    x = torch.tensor([0.1, 0.30001, 7.7], requires_grad=True)
    value = torch.tensor([1e8, 0.1, -3.3])
    out = through(x, value)
    assert torch.equal(out, value)
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("training", "loss", "message"),
    [
        (Training(3, 1e30, torch.optim.SGD), _loss, r"the loss is (inf|nan) after [12] of 3 steps; use a rate below 1e\+30"),
        (Training(3, 0.1), lambda p, d, t: torch.tensor(1.0), "does not depend on the parameters"),
        (Training(3, {"slope": 0.1}), _loss, r"no rate for \['shift'\]"),
        (Training(3, 0.1, bounds={"slop": (0.0, 1.0)}), _loss, r"bounds of \['slop'\], which are no parameters"),
        (Training(-1, 0.1), _loss, "steps=-1"),
    ],
)
def test_errors_say_what_to_do(training, loss, message):
    with pytest.raises(ValueError, match=message):
        learn(START, loss, 11, training)
