"""THE calibration loop against the slow way: the whole model run with recording hooks on single layers."""

from __future__ import annotations

import pytest
import torch

from methods import calibrate
from methods.apply import Installer
from methods.calibrate import N_SAMPLE, sweep
from methods.formats import parse_format
from methods.formats.numerics import Compressed
from methods.method import Edit, Need, Stats
from methods.model.describe import describe
from methods.model.trace import logits_of
from methods.model.weights import weight_of
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

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
        routed = "experts" in name and "shared" not in name
        assert torch.allclose(stats.first.double(), x[:0] if routed else x[::24], atol=1e-5)
        assert stats.first_drift.shape == stats.first.shape and not stats.first_drift.any()
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
    assert torch.allclose(sample, rows[stride - 1 :: stride], atol=1e-5)


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


def test_blocks_that_are_done_give_their_weights_back():
    """At every visit the model has its own weights in all blocks: compressed copies of one block at a time lie beside them."""
    model, batches = tiny_model("llama"), _batches()
    structure = describe(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen: list[int] = []

    def visit(block, stats):
        seen.append(block)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
        return _halved(model, structure, block)

    sweep(model, structure, batches, _everything(structure), visit)
    assert seen == [0, 1, 2]


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


def _hidden(model, block, batches):
    """The slow way: what the block reads and puts out in whole forward passes."""
    seen = []
    module = model.get_submodule(block)
    hook = module.register_forward_hook(
        lambda _m, args, kwargs, out: seen.append(
            (args[0] if args else kwargs["hidden_states"], out if isinstance(out, torch.Tensor) else out[0])
        ),
        with_kwargs=True,
    )
    for batch in batches:
        logits_of(model, batch)
    hook.remove()
    return [inputs for inputs, _ in seen], [outputs for _, outputs in seen]


COMPARED = frozenset({Need.DRIFT, Need.FIRST, Need.FIRST_DRIFT, Need.BLOCK, Need.HESSIAN})


@pytest.mark.parametrize("arch", ["llama", "gpt2", "neox"])
def test_drift_compares_with_the_dense_stream(arch):
    model, batches = tiny_model(arch), _batches()
    structure = describe(model)
    needs = {site.name: COMPARED for site in structure.sites if site.block != 1}
    found = _swept(model, structure, batches, needs, lambda block, stats: _halved(model, structure, block))
    names = [layer.name for site in structure.in_block(2) for layer in site.layers]
    first = [layer.name for site in structure.in_block(0) for layer in site.layers]
    assert set(found) == {*names, *first} and not any(found[name].drift.any() for name in first)
    dense, (_, targets) = _inputs(model, names, batches), _hidden(model, structure.blocks[2], batches)
    with Installer(model, structure) as installer:
        for block in (0, 1):
            for site, edit in _halved(model, structure, block).items():
                installer.install(site, edit)
        now, (inputs, _) = _inputs(model, names, batches), _hidden(model, structure.blocks[2], batches)
    for name in names:
        drift = (dense[name] - now[name]).T @ now[name] / len(now[name])
        assert drift.abs().max() > 1e-2
        assert torch.allclose(found[name].drift.double(), drift, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found[name].first_drift.double(), (dense[name] - now[name])[::24], atol=1e-5)
        assert torch.allclose(found[name].hessian.double(), now[name].T @ now[name] / len(now[name]), rtol=1e-4, atol=1e-5)
    sample = found[names[0]].block
    assert all(torch.allclose(h, wanted, atol=1e-5) for h, wanted in zip(sample.inputs, inputs, strict=True))
    assert all(torch.allclose(h, wanted, atol=1e-5) for h, wanted in zip(sample.targets, targets, strict=True))


def test_a_dense_sweep_does_not_drift():
    model = tiny_model("mixtral")
    structure = describe(model)
    found = _swept(model, structure, _batches(), _everything(structure, COMPARED))
    assert all(not stats.drift.any() for stats in found.values())
    blocks = {id(found[layer.name].block) for site in structure.in_block(1) for layer in site.layers}
    assert len(blocks) == 1
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.* has no drift, for other tokens reach its experts"):
        _swept(model, structure, _batches(), _everything(structure, COMPARED), lambda b, s: _halved(model, structure, b))


def test_the_second_stream_is_run_only_where_it_is_needed(monkeypatch):
    model = tiny_model("llama")
    structure = describe(model)
    runs = []
    original = calibrate.BlockRunner.run
    monkeypatch.setattr(calibrate.BlockRunner, "run", lambda self, block, h: runs.append(block) or original(self, block, h))

    def count(needs):
        runs.clear()
        _swept(model, structure, _batches(1), needs, lambda block, stats: _halved(model, structure, block))
        return [runs.count(block) for block in range(3)]

    assert count({}) == [1, 1, 1]
    assert count(_everything(structure, frozenset({Need.HESSIAN}))) == [2, 2, 2]
    assert count(_everything(structure, COMPARED)) == [2, 3, 3]
    assert count({structure.in_block(1)[0].name: COMPARED}) == [2, 3, 1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_block_is_a_function_of_its_weights(arch):
    """Replaced weights and input rounding give what the edited model gives; gradients reach the weights and nothing else."""
    model, batches = tiny_model(arch), _batches(2)
    structure = describe(model)
    site = structure.in_block(1)[-1]
    sample = next(iter(_swept(model, structure, batches, {site.name: frozenset({Need.BLOCK})}).values())).block
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fmt = parse_format("w4a8-token-g16")
    weights = {layer.name: 0.5 * weight_of(model.get_submodule(layer.name)) for layer in site.layers}
    edit = Edit({name: Compressed(weight, {}, fmt) for name, weight in weights.items()})
    with Installer(model, structure) as installer:
        installer.install(site.name, edit)
        expected = _hidden(model, structure.blocks[1], batches)[1]
    formats = dict.fromkeys(weights, fmt)
    assert all(torch.allclose(sample.run(h, {}, {}), t, atol=1e-5) for h, t in zip(sample.inputs, sample.targets, strict=True))
    for h, wanted, dense in zip(sample.inputs, expected, sample.targets, strict=True):
        out = sample.run(h, weights, formats)
        assert torch.allclose(out, wanted, atol=1e-5) and not torch.allclose(out, dense, atol=1e-3)
        assert not torch.allclose(out, sample.run(h, weights, {}), atol=1e-5) and not out.requires_grad
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    out = sample.run(sample.inputs[0], leaves, formats)
    (out * sample.targets[0]).sum().backward()
    assert any(leaf.grad is not None and leaf.grad.abs().max() > 1e-4 for leaf in leaves.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_takes_other_parameters_of_its_own():
    model, batches = tiny_model("llama"), _batches(1)
    structure = describe(model)
    site = structure.in_block(1)[0]
    sample = next(iter(_swept(model, structure, batches, {site.name: frozenset({Need.BLOCK})}).values())).block
    norm = f"{site.norm}.weight"
    halved = {norm: model.get_parameter(norm) / 2}
    halved |= {layer.name: 2 * weight_of(model.get_submodule(layer.name)) for layer in site.layers}
    assert torch.allclose(sample.run(sample.inputs[0], halved, {}), sample.targets[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"layers.2.* are no parameters of model.layers.1"):
        sample.run(sample.inputs[0], {norm.replace("layers.1", "layers.2"): halved[norm]}, {})


def test_the_block_sample_is_bounded(monkeypatch):
    model = tiny_model("llama")
    structure = describe(model)
    monkeypatch.setattr(calibrate, "N_BLOCK", 150)
    site = structure.in_block(1)[0].name
    batches = _batches(8)
    sample = next(iter(_swept(model, structure, batches, {site: frozenset({Need.BLOCK})}).values())).block
    inputs, _ = _hidden(model, structure.blocks[1], batches)
    assert len(sample.inputs) == len(sample.targets) == 3
    assert all(torch.allclose(h, inputs[i], atol=1e-5) for h, i in zip(sample.inputs, (0, 3, 6), strict=True))


def test_unknown_sites_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"\['nowhere'\] are no sites"):
        sweep(model, describe(model), _batches(), {"nowhere": ALL}, lambda block, stats: None)
