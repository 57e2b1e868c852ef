"""Running all blocks one by one is running the model."""

from __future__ import annotations

import pytest
import torch

from methods.model.blocks import BlockRunner
from methods.model.describe import describe
from methods.model.trace import logits_of
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens


def _logits_from(model, structure, hidden, ids):
    """The model's own final norm and head on given hidden states: they replace what its last block returns."""

    def replace(_module, _args, output):
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = model.get_submodule(structure.blocks[-1]).register_forward_hook(replace)
    result = logits_of(model, ids)
    handle.remove()
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_blocks_make_the_model(arch):
    model = tiny_model(arch)
    structure = describe(model)
    batches = [tiny_tokens(seed=seed) for seed in range(3)]
    runner = BlockRunner(model, structure, batches)
    hidden = runner.inputs()
    for block in range(3):
        hidden = [runner.run(block, h) for h in hidden]
    for ids, final in zip(batches, hidden, strict=True):
        assert final.shape == (2, 24, 96)
        assert torch.allclose(_logits_from(model, structure, final, ids), logits_of(model, ids), atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_run_with_the_weights_they_have_now():
    model = tiny_model("llama")
    runner = BlockRunner(model, describe(model), [tiny_tokens()])
    (hidden,) = runner.inputs()
    before = runner.run(1, hidden)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    assert not torch.allclose(runner.run(1, hidden), before)


def test_batches_of_different_shapes_are_refused():
    model = tiny_model("llama")
    structure = describe(model)
    with pytest.raises(ValueError, match="one shape"):
        BlockRunner(model, structure, [tiny_tokens(length=8), tiny_tokens(length=9)])
    with pytest.raises(ValueError, match="at least one"):
        BlockRunner(model, structure, [])
