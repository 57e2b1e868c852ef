import dataclasses

import pytest
import torch

from methods.model.describe import describe
from profilers.end_to_end import Measurement
from profilers.shortened import saving, shortened
from profilers.timer import Sample, Samples
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_shorter_model_is_the_first_blocks_and_the_head(arch: str) -> None:
    model, tokens = tiny_model(arch), tiny_tokens(1, 8)
    structure = describe(model)
    before = model(input_ids=tokens).logits
    short = shortened(model, structure, 2)
    first, second, third = (model.get_submodule(name) for name in structure.blocks)
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate((first, second, third))]
    logits = short(input_ids=tokens).logits
    assert ran == [0, 1] and torch.isfinite(logits).all() and not torch.allclose(logits, before)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(shortened(model, structure, len(structure.blocks))(input_ids=tokens).logits, before)
    assert {id(p) for p in short.parameters()} < {id(p) for p in model.parameters()}


def test_a_number_of_blocks_that_the_model_does_not_have_is_refused() -> None:
    model = tiny_model("llama")
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"n_blocks={wrong}: .* has 1 to 3"):
            shortened(model, describe(model), wrong)


def _run(ms: list[float], interrupted: tuple[int, ...] = ()) -> Measurement:
    samples = Samples([Sample(i, v * 1e-3, v * 0.9e-3, i in interrupted) for i, v in enumerate(ms)])
    return Measurement(samples.timing(), samples, 0.0)


def test_a_saving_is_the_difference_of_differences_round_by_round() -> None:
    drift = [0.0, 1.0, 5.0, 2.0, 0.5]
    runs = [_run([base + d for d in drift]) for base in (20.0, 12.0, 15.0, 10.0)]
    found = saving(*runs)
    assert dataclasses.astuple(found) == pytest.approx((3.0, 3.0, 3.0))
    disturbed = [runs[0], _run([12.0, 13.0, 99.0, 14.0, 12.5], (2,)), *runs[2:]]
    assert saving(*disturbed).ms == pytest.approx(3.0)
    lost = [_run([base + d for d in drift], (0, 1, 2, 3, 4)) for base in (20.0, 12.0, 15.0, 10.0)]
    assert saving(*lost).ms == pytest.approx(2.7)  # CPU time of all rounds
    # One that was contended is known by its CPU time alone, and is not to be held against the wall time of the others.
    mixed = [runs[0], _run([12.0 + d for d in drift], (0, 1, 2)), *runs[2:]]
    assert saving(*mixed).ms == pytest.approx(2.7)
