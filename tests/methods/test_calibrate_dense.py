"""A sweep that is told that nothing will be edited: the same statistics from hidden states that are kept once."""

import pytest
import torch

from methods.calibrate import sweep
from methods.method import Edit, Need, Stats
from methods.model.blocks import BlockRunner
from methods.model.describe import describe
from tests.tiny import tiny_model, tiny_tokens


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_dense_sweep_gives_the_same_statistics_and_keeps_each_hidden_state_once(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(arch)
    structure = describe(model)
    batches = [tiny_tokens(length=24, seed=seed) for seed in range(3)]
    needs = {site.name: frozenset({Need.HESSIAN, Need.SAMPLE}) for site in structure.sites}
    found: dict[bool, dict[str, Stats]] = {False: {}, True: {}}
    given, before, inputs = [], [], BlockRunner.inputs

    def watched(runner: BlockRunner) -> list[torch.Tensor]:
        given.append(inputs(runner))
        before[:] = [hidden.clone() for hidden in given[-1]]
        return given[-1]

    monkeypatch.setattr(BlockRunner, "inputs", watched)
    for dense in found:

        def visit(block: int, stats: dict[str, Stats], dense: bool = dense) -> None:
            found[dense].update(stats)
            assert all(torch.equal(now, first) != dense for now, first in zip(given[-1], before, strict=True))

        sweep(model, structure, batches, needs, visit, dense=dense, skip=lambda block: block == 1)
    assert found[True].keys() == found[False].keys() and len(structure.blocks) > 1
    for name, stats in found[True].items():
        assert torch.equal(stats.hessian, found[False][name].hessian)
        assert torch.equal(stats.sample, found[False][name].sample)


def test_a_dense_sweep_refuses_edits() -> None:
    model = tiny_model("llama")
    structure = describe(model)
    site = structure.sites[0].name
    with pytest.raises(ValueError, match="dense=True, but visit returned edits"):
        sweep(model, structure, [tiny_tokens(length=8, seed=0)], {}, lambda block, stats: {site: Edit()}, dense=True)
