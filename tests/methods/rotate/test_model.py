"""A rotated model computes what it did, with other weights; architectures that do not allow it are left as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from methods.apply import Installer
from methods.checkpoint import load_dense, write
from methods.model.describe import describe
from methods.model.load import load
from methods.model.save import save
from methods.model.weights import is_norm_like, norm_view
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile, parse, render
from methods.rotate.model import RotationRefused, transform_model
from methods.rotate.rotation import Rotations, fused, random_rotations, rotated
from methods.rotate.wiring import wiring
from tests.edits import edits_of, loaded_tiny
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

ROTATED = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen2-moe", "qwen3-moe", "phi3"]
REFUSED = {
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "opt-post-norm": "its residual stream passes through norms",
    **dict.fromkeys(["gpt2", "opt", "neox", "neox-sequential", "phi", "falcon", "stablelm"], "subtracts the mean"),
}
QUAROT = Decision.of("quarot")


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_architecture_is_rotated_or_refused() -> None:
    assert sorted([*ROTATED, *REFUSED]) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("arch", ROTATED)
@torch.no_grad()
def test_computes_what_it_did(arch: str) -> None:
    model, ids = tiny_model(arch), tiny_tokens()
    before, logits, structure = parameters(model), model(ids).logits, describe(model)
    result = transform_model(model, structure, [QUAROT])
    assert (model(ids).logits - logits).abs().max() < 1e-4
    assert result == describe(model) and not result.tied
    after = model.state_dict()
    layers = [f"{layer.name}.weight" for _, layer in structure.layers()]
    for name in [*layers, f"{structure.embedding}.weight", f"{structure.head}.weight"]:
        assert (after[name] - before[name]).norm() > 0.3 * before[name].norm()
    for norm in wiring(model, result).readers:
        view = norm_view(model, norm)
        assert torch.equal(view.weight + view.unit_offset, torch.ones(structure.d_model))


def in_fp64(model: Any) -> Any:
    """The model in fp64, its norms too, which transformers' own compute in fp32."""
    for name, module in list(model.named_modules()):
        if is_norm_like(module):
            offset, eps = norm_view(model, name).unit_offset, getattr(module, "variance_epsilon", None) or module.eps

            def forward(x: torch.Tensor, m: Any = module, offset: float = offset, eps: float = eps) -> torch.Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (m.weight + offset)

            module.forward = forward
    return model.double()


@pytest.mark.parametrize("arch", [arch for arch in ROTATED if "moe" not in arch and arch != "mixtral"])
@pytest.mark.parametrize("heads", [True, False])
@torch.no_grad()
def test_is_an_identity_in_fp64(arch: str, heads: bool) -> None:
    model, ids = in_fp64(tiny_model(arch)), tiny_tokens()
    logits, structure = model(ids).logits, describe(model)
    assert logits.dtype == torch.float64
    transform_model(model, structure, [Decision.of("quarot", seed=3, heads=heads)])
    assert (model(ids).logits - logits).abs().max() < 1e-8


@pytest.mark.parametrize("arch", REFUSED)
def test_refused_models_are_left_as_they_were(arch: str) -> None:
    model = tiny_model(arch)
    before, structure = parameters(model), describe(model)
    with pytest.raises(RotationRefused, match=REFUSED[arch]):
        transform_model(model, structure, [QUAROT])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_heads_are_turned_in_value_and_output_only() -> None:
    models = {heads: tiny_model("qwen2") for heads in (True, False)}
    structure = describe(models[True])
    for heads, model in models.items():
        transform_model(model, structure, [Decision.of("quarot", heads=heads)])
    with_heads, without = (models[heads].state_dict() for heads in (True, False))
    changed = {".".join(name.split(".")[-2:]) for name in without if not torch.equal(with_heads[name], without[name])}
    assert changed == {"v_proj.weight", "v_proj.bias", "o_proj.weight"}


@torch.no_grad()
def test_every_kv_head_has_a_rotation_of_its_own_and_its_group_shares_it() -> None:
    """The slow way: heads one at a time, each query head with the rotation of its group."""
    model = tiny_model("llama-untied")
    structure = describe(model)
    found, rotations = wiring(model, structure), random_rotations(structure, 5, heads=True)
    assert rotations.heads is not None and rotations.heads.shape == (3, 3, 16, 16)
    assert not torch.equal(rotations.heads[0, 0], rotations.heads[0, 1])
    state = fused(model, structure, found)
    identity = Rotations(torch.eye(96, dtype=torch.float64), rotations.heads)
    turned, d = rotated(state, structure, found, identity), 16
    value, output = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"
    for head in range(3):
        rows = slice(head * d, head * d + d)
        r2 = rotations.heads[1, head]
        assert torch.allclose(turned[f"{value}.weight"][rows], r2.T @ state[f"{value}.weight"][rows])
        assert torch.allclose(turned[f"{value}.bias"][rows], state[f"{value}.bias"][rows] @ r2)
        for query in (2 * head, 2 * head + 1):
            columns = slice(query * d, query * d + d)
            assert torch.allclose(turned[f"{output}.weight"][:, columns], state[f"{output}.weight"][:, columns] @ r2)


@torch.no_grad()
def test_seeds_differ_and_one_seed_is_one_model() -> None:
    weights = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        transform_model(model, describe(model), [Decision.of("quarot", seed=seed)])
        weights.append(model.get_parameter("lm_head.weight").clone())
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-2)


@torch.no_grad()
def test_heads_behind_which_something_stands_are_refused() -> None:
    model, ids = tiny_model("llama"), tiny_tokens()
    gate = torch.linspace(0.5, 2, 96)
    model.get_submodule("model.layers.1.self_attn.o_proj").register_forward_pre_hook(lambda _m, args: (args[0] * gate,))
    structure, logits = describe(model), model(ids).logits
    with pytest.raises(RotationRefused, match="heads=false"):
        transform_model(model, structure, [QUAROT])
    transform_model(model, structure, [Decision.of("quarot", heads=False)])
    assert (model(ids).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ([Decision.of("rtn", format="w8a16")], "no method 'rtn' for a model as a whole"),
        ([Decision.of("quarot", r3=True)], "unknown knob 'r3'; allowed are seed, heads"),
        ([Decision.of("quarot", heads=1)], "heads=1 is not allowed; use true or false"),
        ([QUAROT, Decision.of("spinquant")], "choose one"),
    ],
)
def test_wrong_decisions_are_errors(decisions: list[Decision], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        transform_model(model, describe(model), decisions)


def test_no_decision_changes_nothing() -> None:
    model = tiny_model("llama")
    before, structure = parameters(model), describe(model)
    assert transform_model(model, structure, []) == structure
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_an_outlier_channel_is_spread() -> None:
    """What rotations are for: rounding a token's channels to 8 bits costs less once no single one sets their scale."""
    model = tiny_model("llama")
    embedding = model.get_parameter("model.embed_tokens.weight")
    embedding.data[:, 7] *= 60
    structure = describe(model)
    peaks = {}
    for name in ("before", "after"):
        x = embedding[tiny_tokens()]
        peaks[name] = float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).median())
        if name == "before":
            transform_model(model, structure, [QUAROT])
            embedding = model.get_parameter("model.embed_tokens.weight")
    assert peaks["before"] > 8 and peaks["after"] < 4


@pytest.mark.parametrize("arch", ["llama", "gemma", "qwen3-moe"])
@torch.no_grad()
def test_stock_transformers_loads_it(arch: str, tmp_path: Path) -> None:
    loaded = loaded_tiny(tmp_path, arch)
    structure = transform_model(loaded.model, loaded.structure, [QUAROT])
    logits = loaded.model(tiny_tokens()).logits
    save(loaded.model, loaded.tokenizer, tmp_path / "out", "fp32")
    back = load(str(tmp_path / "out"), tmp_path / "cache")
    assert (back.structure.tied, back.structure.sites) == (False, structure.sites)
    assert torch.equal(back.model(tiny_tokens()).logits, logits)


@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_a_compressed_checkpoint_comes_back_bit_for_bit(arch: str, dtype: str, tmp_path: Path) -> None:
    from dataclasses import replace

    loaded = loaded_tiny(tmp_path, arch)
    loaded = replace(loaded, structure=transform_model(loaded.model, loaded.structure, [QUAROT], dtype=dtype))
    policy, edits = edits_of(loaded.model, loaded.structure, {site.name: "w4a16-g16" for site in loaded.structure.sites[:4]})
    file = PolicyFile(Policy(policy.sites, (QUAROT,)))
    write(tmp_path / "ckpt", loaded, file, edits)
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        expected = parameters(loaded.model)
    back = load_dense(tmp_path / "ckpt")
    state = back.model.state_dict()
    assert back.structure == loaded.structure and not back.structure.tied
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    if dtype:
        from safetensors.torch import load_file

        assert {t.dtype for t in load_file(tmp_path / "ckpt" / "model.safetensors").values()} == {torch.bfloat16}


def test_policy_files_say_what_was_done_to_the_model() -> None:
    structure = describe(tiny_model("llama"))
    decision = Decision.of("quarot", seed=4, heads=False)
    file = PolicyFile(Policy({structure.sites[0].name: (Decision.of("rtn", format="w4a16-g16"),)}, (decision,)))
    text = render(file, structure)
    assert parse(text, structure) == file
    plain = render(PolicyFile(Policy(file.policy.sites)), structure)
    digests = [line for shown in (text, plain) for line in shown.splitlines() if line.startswith("expanded_digest")]
    assert digests[0] != digests[1]
    with pytest.raises(ValueError, match="no method 'quarrot' for a model as a whole"):
        parse(text.replace("quarot", "quarrot"), structure)
    with pytest.raises(ValueError, match="expanded_digest"):
        parse(text.replace("seed=4", "seed=5"), structure)


def test_parameters_can_be_replaced_without_touching_the_model() -> None:
    model = tiny_model("llama")
    structure = describe(model)
    state = rotated(
        fused(model, structure, wiring(model, structure)),
        structure,
        wiring(model, structure),
        random_rotations(structure, 0, heads=True),
    )
    own = {name: tensor.float() for name, tensor in state.items()}
    out = functional_call(model, own, kwargs={"input_ids": tiny_tokens()}, tie_weights=False)
    assert (out.logits - model(tiny_tokens()).logits).abs().max() < 1e-4
