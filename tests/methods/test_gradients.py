"""Gradients and what is made of them, against whole-model autograd, finite differences and a dense eigendecomposition."""

import math

import pytest
import torch

from methods.apply import Installer, site_view
from methods.calibrate import sweep
from methods.formats import parse_format
from methods.formats.numerics import Compressed, quantize_activation
from methods.gradients import Fisher, Loss, bounded, every_linear, reverse
from methods.method import Edit, Need, NormView, SiteView, Stats
from methods.model.describe import describe
from methods.model.structure import LayerSpec, Site
from methods.model.trace import logits_of
from methods.model.weights import is_transposed, weight_of
from methods.policy import Decision
from methods.statistics import edit_error, first_order, format_errors, top_eigenvalues
from tests.tiny import ARCHITECTURES, seeded, tiny_model, tiny_tokens


def text_loss(model, ids):
    """Mean cross-entropy of the text ids (b, t), with a graph where parameters want one."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def weight_gradients(model, names, ids):
    """By layer (d_out, d_in), the slow way: the whole model's graph."""
    modules = {name: model.get_submodule(name) for name in names}
    for module in modules.values():
        module.weight.requires_grad_(True)
    found = torch.autograd.grad(text_loss(model, ids), [m.weight for m in modules.values()], allow_unused=True)
    result = {}
    for (name, module), gradient in zip(modules.items(), found, strict=True):
        module.weight.requires_grad_(False)
        gradient = torch.zeros_like(module.weight) if gradient is None else gradient
        result[name] = gradient.T if is_transposed(module) else gradient
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fisher_is_the_mean_squared_gradient_of_whole_model_autograd(arch):
    model = tiny_model(arch)
    structure = describe(model)
    batches = [tiny_tokens(1, 12, seed) for seed in range(3)]
    fisher = Fisher(model, structure, batches, [1, 2])
    for block in (2, 1):
        names = every_linear(structure)(block)
        found = fisher.of(block, names)
        slow = [weight_gradients(model, names, ids) for ids in batches]
        for name in names:
            expected = sum(own[name].double().square() for own in slow) / 3
            if "expert" not in name:
                assert expected.any()
            assert torch.allclose(found[name].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()) + 1e-20)


def test_sequences_of_a_batch_are_samples_of_their_own():
    model = tiny_model("llama")
    structure = describe(model)
    ids = tiny_tokens(3, 12)
    names = every_linear(structure)(0)
    together = Fisher(model, structure, [ids], [0]).of(0, names)
    apart = Fisher(model, structure, [ids[i : i + 1] for i in range(3)], [0]).of(0, names)
    for name in names:
        assert torch.allclose(together[name], apart[name], rtol=1e-4, atol=1e-5 * float(apart[name].max()))


def test_a_block_is_differentiated_with_what_stood_when_the_sweep_was_made():
    """Editing the blocks before does not change a block's Fisher information: boundaries are kept."""
    model = tiny_model("llama")
    structure = describe(model)
    names = every_linear(structure)(1)
    batches = [tiny_tokens(1, 12, seed) for seed in range(2)]
    fisher = Fisher(model, structure, batches, [0, 1])
    before = fisher.of(1, names)
    with Installer(model, structure) as installer:
        for site in structure.in_block(0):
            weights = {x.name: weight_of(model.get_submodule(x.name)) / 2 for x in site.layers}
            installer.install(
                site.name, Edit({n: Compressed.of(parse_format("bf16"), {"weight": w.bfloat16()}) for n, w in weights.items()})
            )
        after = fisher.of(1, names)
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_the_calibration_sweep_hands_out_the_dense_models_fisher_information():
    """Also behind compressed blocks; layers share no object then, and sites that did not ask have none."""
    model = tiny_model("llama")
    structure = describe(model)
    batches = [tiny_tokens(1, 12, seed) for seed in range(3)]
    gate_up = [site for site in structure.sites if site.kind == "gate_up"]
    needs = {site.name: frozenset({Need.FISHER, Need.ABS_MAX}) for site in gate_up[:2]}
    needs[structure.sites[0].name] = frozenset({Need.ABS_MAX})
    found = {}

    def visit(block, stats):
        found.update(stats)
        return {site.name: moved(model, site, 1) for site in structure.in_block(block)} if block == 0 else None

    sweep(model, structure, batches, needs, visit)
    expected = Fisher(model, structure, batches, [0, 1])
    for block in (0, 1):
        names = [layer.name for layer in gate_up[block].layers]
        for name, fisher in expected.of(block, names).items():
            assert torch.equal(found[name].fisher, fisher)
            assert found[name].abs_max is not None
        assert found[names[0]] is not found[names[1]]
    assert found[structure.sites[0].layers[0].name].fisher is None
    assert found[structure.sites[0].layers[0].name] is found[structure.sites[0].layers[1].name]


def test_taps_are_the_inputs_and_output_gradients_of_whole_model_autograd():
    model = tiny_model("gemma2")
    structure = describe(model)
    ids = tiny_tokens(1, 10)
    for passage in reverse(model, structure, [ids], Loss(), every_linear(structure), until=1):
        assert passage.block >= 1
        slow = weight_gradients(model, list(passage.taps[0]), ids)
        for name, tap in passage.taps[0].items():
            found = tap.gradients[0].reshape(-1, tap.gradients[0].shape[-1]).T @ tap.x.reshape(-1, tap.x.shape[-1])
            assert torch.allclose(found, slow[name], rtol=1e-3, atol=1e-5 * float(slow[name].abs().max()))


@pytest.mark.parametrize("kind", ["text", "sampled"])
def test_gradients_in_the_logits_are_those_of_the_cross_entropy(kind):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(7, 11, generator=generator)
    ids = torch.randint(0, 11, (7,), generator=generator)
    labels, scored = ids[1:], logits.clone()[:-1]
    if kind == "sampled":
        labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
        scored = logits.clone()
    leaf = scored.requires_grad_(True)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, labels), leaf)
    (found,) = Loss(kind).gradients(logits, ids, torch.Generator().manual_seed(3))
    assert torch.allclose(found[: len(expected)], expected, atol=1e-7)
    assert not found[len(expected) :].any()


def test_probes_have_the_covariance_of_the_kl_divergence():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    loss = Loss("divergence", 10_000)
    found = torch.stack(list(loss.gradients(logits, torch.zeros(2, dtype=torch.int64), torch.Generator().manual_seed(1))))
    p = logits.softmax(-1)
    for position in range(2):
        expected = (torch.diag(p[position]) - torch.outer(p[position], p[position])) / 2
        assert torch.allclose(torch.cov(found[:, position].T), expected, atol=0.005)


def test_unknown_losses_and_probes_of_the_text_are_refused():
    with pytest.raises(ValueError, match="kind='kl'; use text, sampled or divergence"):
        Loss("kl")
    with pytest.raises(ValueError, match="n_probes=2; use 1 with text"):
        Loss("text", 2)
    with pytest.raises(ValueError, match="n_probes=0"):
        Loss("sampled", 0)


def test_tokens_are_bounded_and_spread():
    batches = [torch.full((1, 10), i) for i in range(7)]
    assert [int(batch[0, 0]) for batch in bounded(batches, 35)] == [0, 2, 4]
    assert len(bounded(batches, 5)) == 1
    assert bounded(batches, 1000) == batches


def moved(model, site, sign):
    """An edit that moves every weight of a site a little, or as much the other way."""
    generator = torch.Generator().manual_seed(7)
    linears = {}
    for layer in site.layers:
        w = weight_of(model.get_submodule(layer.name))
        change = sign * 1e-4 * torch.randn(w.shape, generator=generator)
        linears[layer.name] = Compressed.of(parse_format("fp32"), {"weight": w + change})
    return Edit(linears)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_first_order_terms_are_the_slope_of_the_loss(arch):
    """Against central differences of the whole model's loss, for a small change of each site's weights and for several batches."""
    model = tiny_model(arch)
    structure = describe(model)
    batches = [tiny_tokens(2, 12, seed) for seed in range(2)]
    sites = structure.in_block(1)
    edits = {sign: {site.name: moved(model, site, sign) for site in sites} for sign in (1, -1)}
    found = first_order(
        model,
        structure,
        batches,
        lambda site: iter([("moved", edits[1][site.name])] if site in sites else []),
        lambda site: None,
        Loss(),
    )
    assert found[structure.sites[0].name] == {}
    with Installer(model, structure) as installer:
        for site in sites:
            losses = {}
            for sign in (1, -1):
                installer.install(site.name, edits[sign][site.name])
                losses[sign] = torch.stack([text_loss(model, ids) for ids in batches])
            installer.install(site.name, None)
            slopes = (losses[1] - losses[-1]) / 2
            samples = found[site.name]["moved"]
            if not site.shares_input:
                samples = samples * 2**-0.5  # one sample a batch of two sequences
            else:
                samples = samples.view(2, 2).mean(1)
            assert torch.allclose(samples, slopes, rtol=0.02, atol=4e-6)


def small_llama():
    """Two blocks with weights few enough for their whole Hessian."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded(1):
        config = LlamaConfig(
            vocab_size=23,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def dense_top_eigenvalue(model, layers, ids):
    """From all second derivatives of the layers' weights, in fp64."""
    shapes = {layer: model.get_submodule(layer).weight.shape for layer in layers}
    flat = torch.cat([model.get_submodule(layer).weight.flatten() for layer in layers])

    def loss(vector):
        parts, start = {}, 0
        for layer, shape in shapes.items():
            parts[f"{layer}.weight"] = vector[start : start + shape.numel()].view(shape)
            start += shape.numel()
        logits = torch.func.functional_call(model, parts, (ids,), {"use_cache": False}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat, vectorize=False)
    values = torch.linalg.eigvalsh(hessian.double())
    return float(values[values.abs().argmax()])


def test_top_eigenvalues_are_those_of_the_dense_hessian():
    model = small_llama()
    structure = describe(model)
    batches = [torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    groups = {
        "k": ["model.layers.0.self_attn.k_proj"],
        "o": ["model.layers.1.self_attn.o_proj"],
        "k and v": ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"],
    }
    found = top_eigenvalues(model, structure, batches, groups, steps=400, tolerance=1e-6)
    for name, layers in groups.items():
        expected = [dense_top_eigenvalue(model, layers, ids) for ids in batches]
        assert found[name].each == pytest.approx(expected, rel=0.01)
        mean = sum(expected) / 2
        deviation = math.sqrt(sum((value - mean) ** 2 for value in expected))
        assert found[name].sharpness == pytest.approx(abs(mean) + deviation, rel=0.02)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_eigenvalues_of_every_site_on_experts_and_transposed_layers():
    for arch in ("qwen3-moe", "gpt2"):
        model = tiny_model(arch)
        structure = describe(model)
        before = logits_of(model, tiny_tokens(1, 6))
        found = top_eigenvalues(model, structure, [tiny_tokens(1, 6)], steps=3)
        assert set(found) == {site.name for site in structure.sites}
        assert all(math.isfinite(item.mean) and item.std == 0 for item in found.values())
        assert any(item.mean for item in found.values())
        assert torch.equal(logits_of(model, tiny_tokens(1, 6)), before)


def test_groups_across_blocks_are_refused():
    model = tiny_model("llama")
    layers = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]
    with pytest.raises(ValueError, match=r"group 'both' lies in blocks \[0, 1\]; give linears of one block"):
        top_eigenvalues(model, describe(model), [tiny_tokens()], {"both": layers})


D_IN = 48
LAYERS = (LayerSpec("gate", "gate", 0, D_IN, 7), LayerSpec("up", "up", 0, D_IN, 5))
SITE = Site("gate+up", "gate", 0, LAYERS, norm="norm")


def site_with_stats():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, D_IN, generator=generator) * torch.rand(D_IN, generator=generator)
    weights = {layer.name: torch.randn(layer.d_out, D_IN, generator=generator) for layer in LAYERS}
    norm = NormView("norm", torch.rand(D_IN, generator=generator).add(0.5).bfloat16(), None, 0.0)
    stats = Stats(200, hessian=x.T @ x / 200, abs_max=x.abs().amax(0), sample=x)
    return SiteView(SITE, weights, norm), dict.fromkeys(weights, stats), x


@pytest.mark.parametrize(("method", "fmt"), [("rtn", "w4a16-g16"), ("rtn", "w8a8-token"), ("smoothquant", "w4a8-g16")])
def test_edit_errors_are_shares_of_the_dense_energy(method, fmt):
    from methods import catalogue

    view, stats, x = site_with_stats()
    edit = catalogue.apply(view, stats, Decision.of(method, format=fmt))
    found = edit_error(view, stats, edit)
    w = torch.cat(list(view.weights.values()))
    gain = edit.tensors.get("norm.weight", view.norm.weight).float() / view.norm.weight.float()
    dense = torch.cat([edit.linears[name].dense for name in view.weights])
    q = dense * gain
    assert found.weight == pytest.approx(float((q - w).square().sum() / w.square().sum()), rel=1e-4)
    assert found.output == pytest.approx(float(((q - w) @ x.T).square().sum() / (w @ x.T).square().sum()), rel=1e-4)
    y = quantize_activation(x * gain, parse_format(fmt)) @ dense.T
    assert found.rounded == pytest.approx(float((y - x @ w.T).square().sum() / (x @ w.T).square().sum()), rel=1e-4)
    assert method == "rtn" or float((gain - 1).abs().max()) > 0.1


def test_format_errors_let_the_least_be_taken():
    view, stats, _ = site_with_stats()
    found = format_errors(view, stats, ["w2a16-g16-asym", "w4a16-g16", "w8a8-token"])
    assert found["w2a16-g16-asym"].output > found["w4a16-g16"].output > found["w8a8-token"].output
    assert found["w8a8-token"].rounded > found["w8a8-token"].output
    assert found["w4a16-g16"].rounded == pytest.approx(found["w4a16-g16"].output, rel=1e-4)
    alone = {name: Stats(200, hessian=own.hessian) for name, own in stats.items()}
    assert math.isnan(format_errors(view, alone, ["w4a16-g16"])["w4a16-g16"].rounded)
    with pytest.raises(ValueError, match="does not divide"):
        format_errors(view, stats, ["w4a16-g32"])


def test_site_views_of_a_model_take_part():
    """The errors of a real site's edit are those that its inputs see."""
    model = tiny_model("llama")
    structure = describe(model)
    site = structure.sites[-1]
    view = site_view(model, structure, site)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, site.d_in, generator=generator)
    stats = {layer.name: Stats(60, hessian=x.T @ x / 60, sample=x) for layer in site.layers}
    found = format_errors(view, stats, ["w3a16-g32", "w8a16"])
    assert 0 < found["w8a16"].output < 1e-3 < found["w3a16-g32"].output < 0.2
