"""THE calibration loop against the slow way: the whole model run with recording hooks on single layers."""

from __future__ import annotations

import pytest
import torch

from methods.apply import Installer
from methods.calibrate import N_SAMPLE, sweep
from methods.formats import parse_format
from methods.formats.numerics import Compressed
from methods.method import Edit, Need, Stats
from methods.model.describe import describe
from methods.model.trace import logits_of
from methods.model.weights import weight_of
from tests.tiny import tiny_model, tiny_tokens

ALL = frozenset(Need)


def _batches(n=3, length=24):
    return [tiny_tokens(length=length, seed=seed) for seed in range(n)]


def _everything(structure, needs=ALL):
    return {site.name: needs for site in structure.sites}


def _swept(model, structure, batches, needs, edit=None, **options):
    """All statistics by layer; `edit(block, stats)` as the visit, if given."""
    found: dict[str, Stats] = {}

    def visit(block, stats):
        found.update(stats)
        return edit(block, stats) if edit else None

    sweep(model, structure, batches, needs, visit, **options)
    return found


def _inputs(model, names, batches):
    """The slow way: the rows that each layer reads in whole forward passes."""
    rows = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: rows[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    for batch in batches:
        logits_of(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double() if found else torch.zeros(0, 1) for name, found in rows.items()}


def _halved(model, structure, block):
    """Edits that halve every weight of the block, rounded to bf16."""
    edits = {}
    for site in structure.in_block(block):
        weights = {layer.name: weight_of(model.get_submodule(layer.name)) / 2 for layer in site.layers}
        dense = parse_format("bf16")
        edits[site.name] = Edit({name: Compressed.of(dense, {"weight": w.bfloat16()}) for name, w in weights.items()})
    return edits


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mixtral", "qwen2-moe"])
def test_statistics_are_those_of_the_layers_inputs(arch):
    model = tiny_model(arch)
    structure = describe(model)
    batches = _batches()
    found = _swept(model, structure, batches, _everything(structure))
    names = [layer.name for _, layer in structure.layers()]
    assert set(found) == set(names)
    for name, x in _inputs(model, names, batches).items():
        stats = found[name]
        assert stats.n_tokens == len(x)
        assert torch.allclose(stats.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(stats.abs_max.double(), x.abs().amax(0), atol=1e-5)
        assert torch.allclose(stats.abs_mean.double(), x.abs().mean(0), atol=1e-5)
        assert torch.allclose(stats.range.double(), torch.stack(x.aminmax(dim=0)), atol=1e-5)
        assert torch.allclose(stats.sample.double(), x, atol=1e-5)
        assert {t.dtype for t in (stats.hessian, stats.abs_max, stats.abs_mean, stats.sample)} == {torch.float32}


def test_only_what_is_needed_is_collected_and_shared():
    model = tiny_model("llama")
    structure = describe(model)
    needs = {"model.layers.1.mlp.gate_proj+up_proj": frozenset({Need.ABS_MAX}), "model.layers.2.self_attn.o_proj": frozenset()}
    calls = []
    sweep(model, structure, _batches(), needs, lambda block, stats: calls.append((block, stats)))
    assert [(block, set(stats)) for block, stats in calls] == [
        (0, set()),
        (1, {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}),
        (2, set()),
    ]
    stats = calls[1][1]
    gate = stats["model.layers.1.mlp.gate_proj"]
    assert gate is stats["model.layers.1.mlp.up_proj"]
    assert (gate.hessian, gate.abs_mean, gate.sample) == (None, None, None)
    assert gate.n_tokens == 3 * 2 * 24


@pytest.mark.parametrize("length", [100, 256, 301])
def test_the_sample_is_spread_evenly(length):
    model = tiny_model("llama")
    structure = describe(model)
    name = "model.layers.0.self_attn.q_proj"
    batches = _batches(4, length)
    site = structure.sites[0].name
    sample = _swept(model, structure, batches, {site: frozenset({Need.SAMPLE})})[name].sample
    rows = _inputs(model, [name], batches)[name].float()
    stride = -(-len(rows) // len(sample))
    assert N_SAMPLE / 2 < len(sample) <= N_SAMPLE
    assert stride & (stride - 1) == 0
    assert torch.allclose(sample, rows[::stride], atol=1e-5)


def test_edits_reach_the_blocks_after_them():
    """With edits returned, statistics are those of a model that carries the edits of all blocks before."""
    model, batches = tiny_model("llama"), _batches()
    structure = describe(model)
    dense = logits_of(model, batches[0])
    found = _swept(model, structure, batches, _everything(structure), lambda block, stats: _halved(model, structure, block))
    assert torch.equal(logits_of(model, batches[0]), dense)
    for block in range(3):
        names = [layer.name for site in structure.in_block(block) for layer in site.layers]
        with Installer(model, structure) as installer:
            for before in range(block):
                for site, edit in _halved(model, structure, before).items():
                    installer.install(site, edit)
            expected = _inputs(model, names, batches)
        for name in names:
            assert torch.allclose(found[name].sample.double(), expected[name], atol=1e-5)
    plain = _swept(model, structure, batches, _everything(structure))
    assert not torch.allclose(plain[names[0]].sample, found[names[0]].sample, atol=1e-2)


def test_a_sweep_resumes():
    model, batches = tiny_model("neox"), _batches()
    structure = describe(model)
    whole = _swept(model, structure, batches, _everything(structure))
    last = {layer.name for site in structure.in_block(2) for layer in site.layers}
    for options in ({"start": 2}, {"skip": lambda block: block < 2}):
        part = _swept(model, structure, batches, _everything(structure), **options)
        assert set(part) == last
        assert all(torch.equal(part[name].hessian, whole[name].hessian) for name in last)


def test_experts_without_tokens_have_zeros():
    model = tiny_model("mixtral")
    structure = describe(model)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[:, :] = 0
        layer.mlp.gate.forward = lambda x: (None, torch.full((len(x), 1), 1.0), torch.full((len(x), 1), 2))
    found = _swept(model, structure, _batches(), _everything(structure))
    counts = [found[f"model.layers.1.mlp.experts.{e}.gate_up_proj"].n_tokens for e in range(4)]
    assert counts == [0, 0, 144, 0]
    empty = found["model.layers.1.mlp.experts.0.down_proj"]
    assert torch.equal(empty.hessian, torch.zeros(160, 160))
    assert torch.equal(empty.abs_max, torch.zeros(160))
    assert torch.equal(empty.abs_mean, torch.zeros(160))
    assert empty.sample.shape == (0, 160)


def test_the_model_is_restored_when_a_visit_raises():
    model = tiny_model("llama")
    structure = describe(model)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    def visit(block, stats):
        if block == 1:
            raise RuntimeError("stop")
        return _halved(model, structure, block)

    with pytest.raises(RuntimeError, match="stop"):
        sweep(model, structure, _batches(), {}, visit)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unknown_sites_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"\['nowhere'\] are no sites"):
        sweep(model, describe(model), _batches(), {"nowhere": ALL}, lambda block, stats: None)
