"""Rows that feed a site: found in every layout, and only where a scale of theirs divides out exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from methods.checkpoint import structure_digest
from methods.model.describe import describe
from methods.model.structure import Feed
from methods.model.trace import folds, logits_of, probe_tokens
from methods.model.weights import bias_of, set_weight, weight_of
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

DOWN = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "stablelm"], ("up_proj", 0)),
    **dict.fromkeys(["llama-untied"], ("up_proj", 0)),
    **dict.fromkeys(["opt", "opt-post-norm"], ("fc1", 0)),  # ReLU
    "phi3": ("gate_up_proj", 160),
    "qwen2-moe": ("up_proj", 0),  # of the shared expert
}
"""What feeds down; behind GELU, and in experts, nothing does."""

FUSED = {
    "gpt2": Feed("c_attn", 192, 16, 16),
    "neox": Feed("query_key_value", 32, 16, 48),
    "neox-sequential": Feed("query_key_value", 32, 16, 48),
    "phi3": Feed("qkv_proj", 144, 16, 16, 2),
    "falcon": Feed("query_key_value", 112, 16, 16, 6),
}
"""What feeds o where it is fused: behind queries and keys, or head by head."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_feeds_the_sites_of_every_architecture(arch: str) -> None:
    structure = describe(tiny_model(arch))
    shared = structure.n_heads // structure.n_kv_heads
    for site in structure.sites:
        leaf = None if site.feed is None else replace(site.feed, layer=site.feed.layer.rpartition(".")[2])
        if site.kind == "o":
            assert leaf == FUSED.get(arch, Feed("v_proj", 0, 16, 16, shared))
        elif site.kind == "down" and arch in DOWN:
            layer, first = DOWN[arch]
            assert leaf == Feed(layer, first, site.d_in, site.d_in)
        else:
            assert leaf is None


@pytest.mark.parametrize("arch", ["llama-untied", "phi3", "gpt2", "opt", "neox", "falcon"])
def test_a_scale_of_the_rows_divides_out(arch: str) -> None:
    """The definition, on the weights: rows and their biases times s, columns divided by the s of the row that writes them."""
    model = tiny_model(arch)
    structure, ids = describe(model), tiny_tokens()
    expected = logits_of(model, ids)
    for index, site in enumerate(site for site in structure.sites if site.feed):
        source, linear = model.get_submodule(site.feed.layer), model.get_submodule(site.layers[0].name)
        n, rows = weight_of(source).shape[0], site.feed.rows(site.d_in)
        scale = torch.ones(n)
        scale[rows] = torch.rand(n, generator=torch.Generator().manual_seed(index))[rows] + 0.5
        set_weight(source, weight_of(source) * scale[:, None])
        if bias_of(source) is not None:
            bias_of(source).mul_(scale)
        set_weight(linear, weight_of(linear) / scale[rows])
    assert torch.allclose(logits_of(model, ids), expected, atol=1e-4)
    assert not torch.equal(logits_of(model, ids), expected)


class _Through(nn.Module):
    """A gated MLP whose up passes through something else in between."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).tanh())
        return result


def test_one_block_that_is_wired_otherwise_is_told_from_the_others() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = _Through(model.model.layers[1].mlp)
    fed = {site.name for site in describe(model).sites if site.feed}
    assert fed == {
        *(f"model.layers.{block}.self_attn.o_proj" for block in range(3)),
        *(f"model.layers.{block}.mlp.down_proj" for block in (0, 2)),
    }


def test_gates_and_wrong_heads_do_not_feed() -> None:
    model = tiny_model("llama")
    ids = probe_tokens(128)
    logits = logits_of(model, ids)
    o, down, v = (f"model.layers.1.{name}" for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.v_proj"))
    assert folds(model, ids, logits, {}, {o: Feed(v, 0, 16, 16, 2), down: Feed(down.replace("down", "up"), 0, 160, 160)})
    assert not folds(model, ids, logits, {}, {down: Feed(down.replace("down", "gate"), 0, 160, 160)})
    assert not folds(model, ids, logits, {}, {o: Feed(v.replace("v_", "k_"), 0, 16, 16, 2)})

    class Alternating(Feed):
        """Heads take turns at the values, instead of side by side."""

        def rows(self, d_in: int) -> list[int]:
            return [j // 16 % 3 * 16 + j % 16 for j in range(d_in)]

    assert not folds(model, ids, logits, {}, {o: Alternating(v, 0, 16, 16, 2)})


def test_a_norm_in_between_ends_it() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _module, args: (args[0] / args[0].norm(dim=-1, keepdim=True),))
    fed = {site.name for site in describe(model).sites if site.feed and site.kind == "o"}
    assert fed == {f"model.layers.{block}.self_attn.o_proj" for block in (1, 2)}


def test_checkpoints_of_versions_without_feeds_are_the_same_structure() -> None:
    structure = describe(tiny_model("llama"))
    assert structure_digest(structure) == "783224cf3a17dec8c0e47ae5391356eb4a414f998e84c9bc9e1f93fa24cd98e7"
