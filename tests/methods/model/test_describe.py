"""`describe` on every architecture: the sites found, norms that really fold, refusals that name the part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.model.describe import UnsupportedModel, describe
from methods.model.trace import folds, logits_of, probe_tokens, trace
from methods.model.weights import norm_view, set_weight, weight_of
from tests.tiny import ARCHITECTURES, HIDDEN, INNER, tiny_model, tiny_tokens

SPLIT = ["qkv:q+k+v", "o:o", "gate_up:gate+up", "down:down"]
PLAIN = ["qkv:qkv", "o:o", "up:up", "down:down"]
SPLIT_PLAIN = ["qkv:q+k+v", "o:o", "up:up", "down:down"]
EXPERTS = ["expert_gate_up", "expert_down"]

EXPECTED: dict[str, list[str]] = {
    **dict.fromkeys(["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "stablelm"], SPLIT),
    **dict.fromkeys(["gpt2", "neox", "neox-sequential", "falcon"], PLAIN),
    **dict.fromkeys(["opt", "opt-post-norm", "phi"], SPLIT_PLAIN),
    "phi3": ["qkv:qkv", "o:o", "gate_up:gate_up", "down:down"],
    "mixtral": ["qkv:q+k+v", "o:o", "expert_gate_up:4", "expert_down:4"],
    "qwen2-moe": [*SPLIT, "expert_gate_up:5", "expert_down:5"],
    "qwen3-moe": ["qkv:q+k+v", "o:o", "expert_gate_up:5", "expert_down:5"],
}
"""The sites of a block: their kind, then the kinds of their layers or the number of experts."""

FOLDABLE = {
    **dict.fromkeys(ARCHITECTURES, ("qkv", "gate_up", "up")),
    # One norm feeds attention and MLP, the norm's output is the residual itself, or a router and a gate read it too.
    **dict.fromkeys(["phi", "falcon", "opt-post-norm"], ()),
    **dict.fromkeys(["mixtral", "qwen2-moe", "qwen3-moe"], ("qkv",)),
}


def _summary(site):
    kinds = [layer.kind for layer in site.layers]
    return f"{site.kind}:{len(kinds) if site.kind in EXPERTS else '+'.join(kinds)}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sites_and_norms_of_every_architecture(arch):
    model = tiny_model(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = describe(model, "fp16")
    assert len(structure.blocks) == 3
    for block in range(3):
        assert [_summary(site) for site in structure.in_block(block)] == EXPECTED[arch]
    assert {site.kind for site in structure.sites if site.norm} == set(FOLDABLE[arch]) & {site.kind for site in structure.sites}
    assert len({site.name for site in structure.sites}) == len(structure.sites)
    for site, layer in structure.layers():
        module = model.get_submodule(layer.name)
        assert tuple(weight_of(module).shape) == (layer.d_out, layer.d_in)
        assert layer.d_in == site.d_in
        assert layer.bias == (module.bias is not None)
        assert layer.transposed == (arch == "gpt2")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shape_of_the_whole_model(arch):
    model = tiny_model(arch)
    structure = describe(model, "fp16")
    n_kv = {"gpt2": 6, "opt": 6, "opt-post-norm": 6, "neox": 6, "neox-sequential": 6, "falcon": 1}.get(arch, 3)
    assert (structure.n_heads, structure.n_kv_heads, structure.head_dim) == (6, n_kv, 16)
    assert (structure.d_model, structure.n_vocab, structure.dtype) == (HIDDEN, 128, "fp16")
    assert structure.tied == bool(model.config.tie_word_embeddings)
    assert model.get_submodule(structure.head) is model.get_output_embeddings()
    assert model.get_submodule(structure.embedding) is model.get_input_embeddings()
    assert structure.n_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ["llama-untied", "gemma3", "gpt2", "opt", "neox", "stablelm"])
def test_a_scale_folds_into_the_norm_that_is_named(arch):
    """The definition, on the weights: new gain (w + c) / s - c and bias / s, columns times s, equal logits."""
    model = tiny_model(arch)
    structure = describe(model)
    ids = tiny_tokens()
    expected = logits_of(model, ids)
    generator = torch.Generator().manual_seed(1)
    for site in structure.sites:
        if site.norm is None:
            continue
        view = norm_view(model, site.norm)
        scale = torch.rand(site.d_in, generator=generator) + 0.5
        norm = model.get_submodule(site.norm)
        norm.weight.data = (view.weight + view.unit_offset) / scale - view.unit_offset
        if view.bias is not None:
            norm.bias.data = view.bias / scale
        for layer in site.layers:
            module = model.get_submodule(layer.name)
            set_weight(module, weight_of(module) * scale)
    assert torch.allclose(logits_of(model, ids), expected, atol=1e-4)
    assert not torch.equal(logits_of(model, ids), expected)


def test_the_fold_check_sees_what_no_module_reads():
    """Post-norm OPT adds the norm's output to the residual outside of any module: only the logits tell."""
    model = tiny_model("opt-post-norm")
    ids = probe_tokens(128)
    seen = trace(model, ids, describe(model).blocks)
    layer = "model.decoder.layers.1"
    assert not folds(model, ids, seen.logits, {f"{layer}.self_attn_layer_norm": [f"{layer}.fc1"]})
    pre_norm = tiny_model("opt")
    assert folds(pre_norm, ids, logits_of(pre_norm, ids), {f"{layer}.final_layer_norm": [f"{layer}.fc1"]})


def test_names_of_sites():
    names = [site.name for site in describe(tiny_model("qwen2-moe")).in_block(1)]
    assert names == [
        "model.layers.1.self_attn.q_proj+k_proj+v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.shared_expert.gate_proj+up_proj",
        "model.layers.1.mlp.shared_expert.down_proj",
        "model.layers.1.mlp.experts.*.gate_up_proj",
        "model.layers.1.mlp.experts.*.down_proj",
    ]


def test_experts_do_not_share_their_input():
    sites = describe(tiny_model("mixtral")).in_block(0)
    assert [site.shares_input for site in sites] == [True, True, False, False]
    assert [layer.name for layer in sites[3].layers][:2] == [f"model.layers.0.mlp.experts.{e}.down_proj" for e in (0, 1)]


def test_unknown_leaf_names_become_other():
    model = tiny_model("llama")
    for block in model.model.layers:
        mlp = block.mlp
        mlp.sesame, mlp.open = mlp.gate_proj, mlp.up_proj
        del mlp.gate_proj, mlp.up_proj
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(torch.nn.functional.silu(mlp.sesame(x)) * mlp.open(x))
    site = describe(model).in_block(2)[2]
    assert (site.kind, [layer.kind for layer in site.layers]) == ("other", ["other", "other"])
    assert site.name == "model.layers.2.mlp.sesame+open"
    assert site.norm == "model.layers.2.post_attention_layernorm"


def test_fused_experts_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts.*unfuse_experts"):
        describe(tiny_model("mixtral", stock=True))


def test_strange_weights_in_a_block_are_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.mixer = nn.Module()
    model.model.layers[1].mlp.mixer.A_log = nn.Parameter(torch.zeros(HIDDEN, 4))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.mixer"):
        describe(model)


def test_linears_that_never_run_are_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.spare = nn.Linear(HIDDEN, INNER)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.spare.*no part"):
        describe(model)


def test_blocks_that_are_not_a_plain_stack_are_refused():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].forward = lambda hidden, **kwargs: layers[1](layers[1](hidden, **kwargs), **kwargs)
    with pytest.raises(UnsupportedModel, match="once each, in order"):
        describe(model)


def test_models_of_another_kind_are_refused():
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    with pytest.raises(UnsupportedModel, match="attention"):
        describe(MambaForCausalLM(MambaConfig(**sizes)))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        describe(T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16)))
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    with pytest.raises(UnsupportedModel, match="no list of like decoder blocks"):
        describe(model)


def test_a_headless_model_is_refused():
    with pytest.raises(UnsupportedModel, match="not a causal language model"):
        describe(tiny_model("llama").model)
