"""Experts as plain linears compute what the fused module computed, and go back to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.model.experts import UnsupportedModel, experts_per_token, fuse_experts, stock_state_dict, unfuse_experts
from methods.model.trace import logits_of
from tests.tiny import tiny_model, tiny_tokens

MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe"]


@pytest.mark.parametrize("arch", MIXTURES)
def test_unfusing_keeps_the_function(arch):
    model = tiny_model(arch, stock=True)
    expected = logits_of(model, tiny_tokens())
    assert unfuse_experts(model) == 3
    assert isinstance(model.get_submodule("model.layers.1.mlp.experts.2.down_proj"), nn.Linear)
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    assert torch.allclose(logits_of(model, tiny_tokens()), expected, atol=1e-5)
    assert unfuse_experts(model) == 0


def test_each_expert_is_its_own():
    """Silencing one expert's output changes those tokens alone that were routed to it."""
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(4, 96)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])  # 4 of 4 experts is none: a masked choice
    share = torch.rand(4, 2)
    before = experts(x, index, share)
    experts[1].down_proj.weight.data.zero_()
    changed = (experts(x, index, share) - before).abs().amax(1) > 0
    assert changed.tolist() == [True, True, False, False]


@pytest.mark.parametrize("arch", MIXTURES)
def test_fusing_is_the_inverse(arch):
    stock, model = tiny_model(arch, stock=True), tiny_model(arch)
    state = stock_state_dict(model)
    assert {name: tuple(t.shape) for name, t in state.items()} == {n: tuple(t.shape) for n, t in stock.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in stock.state_dict().items())
    assert fuse_experts(model) == 3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())
    assert torch.equal(logits_of(model, tiny_tokens()), logits_of(stock, tiny_tokens()))


def test_an_edit_of_one_expert_is_in_the_fused_tensor():
    model = tiny_model("qwen3-moe")
    model.get_submodule("model.layers.2.mlp.experts.3.gate_up_proj").weight.data = torch.full((96, 96), 0.5)
    fused = stock_state_dict(model)["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(fused[3], torch.full((96, 96), 0.5))
    assert not torch.equal(fused[2], fused[3])


def test_another_layout_is_refused_before_anything_changes():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    modules = dict(model.named_modules())
    with pytest.raises(UnsupportedModel, match=r"mlp\.experts: GptOssExperts"):
        unfuse_experts(model)
    assert dict(model.named_modules()) == modules


def test_another_computation_is_refused():
    model = tiny_model("mixtral", stock=True)
    experts = model.model.layers[1].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    experts.forward = type(model.model.layers[0].mlp.experts).forward.__wrapped__.__get__(experts)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts"):
        unfuse_experts(model)


def test_experts_per_token_are_counted_where_the_configuration_has_another_name_for_them():
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    sizes = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 16,
        "num_key_value_heads": 3, "num_experts": 5, "moe_topk": [3, 3], "pad_token_id": 0,
    }  # fmt: skip
    model = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**sizes)).eval()
    unfuse_experts(model)
    assert experts_per_token(model, tiny_tokens(1, 9) % 64) == 3
    assert experts_per_token(tiny_model("mixtral"), tiny_tokens(1, 9)) == 2
    assert experts_per_token(tiny_model("llama"), tiny_tokens(1, 9)) == 0


def test_tensors_that_stand_in_are_fused_too():
    model = tiny_model("mixtral")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    replaced = stock_state_dict(model, {name: torch.full((96, 160), 0.25)})
    assert torch.equal(replaced["model.layers.1.mlp.experts.down_proj"][2], torch.full((96, 160), 0.25))
    assert torch.equal(replaced["model.layers.1.mlp.experts.down_proj"][1], model.get_parameter(name.replace(".2.", ".1.")))
