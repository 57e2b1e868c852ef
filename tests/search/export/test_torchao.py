"""The torchao export: transformers with torchao loads exactly the evaluated weights, and every silent damage is noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from methods.formats.format import parse_format
from methods.model.load import LoadedModel
from methods.model.structure import LayerSpec, Site
from methods.policy_file import expanded_digest, read
from search.export import torchao
from tests.search.export.wide import HIDDEN, added, compressed, swapped, verified, wide_model

MIXED = ("w4a16-g32", "w8a16", "w3a16-g64", "w8a16-g32", "w2a16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return wide_model(tmp_path_factory.mktemp("wide"))


def test_loads_as_what_was_evaluated(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, MIXED)
    torchao.export(tmp_path / "out", model, file, edits)
    result = verified(torchao, tmp_path / "out", model, edits)
    assert result.ok, result.message
    assert result.max_weight_diff == 0.0 and abs(result.nll_loaded - result.nll_reference) < 1e-5
    assert result.n_linears == 20
    assert read(tmp_path / "out" / "policy.yaml", model.structure) == file


def test_rounded_inputs_load_within_the_tolerance(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, ("w8a8-token", "w4a16-g32"))
    torchao.export(tmp_path / "out", model, file, edits)
    result = verified(torchao, tmp_path / "out", model, edits)
    assert result.ok, result.message
    assert result.max_weight_diff == 0.0 and 0.0 < abs(result.nll_loaded - result.nll_reference) < 0.03


def test_what_is_written_is_what_torchao_writes(tmp_path: Path, model: LoadedModel) -> None:
    """Its own classes read the configuration and the metadata, and say the same when they write them."""
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
    from transformers import TorchAoConfig

    file, edits = compressed(model, (*MIXED, "w8a8-token"))
    torchao.export(tmp_path / "out", model, file, edits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["policy_digest"] == expanded_digest(file.policy, model.structure)
    read_back = TorchAoConfig.from_dict({name: value for name, value in config.items() if name != "policy_digest"})
    again = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(read_back.quant_type)}}
    formats = {name: c.format for edit in edits.values() for name, c in edit.linears.items()}
    assert torchao.from_config(config) == torchao.from_config(again) == formats
    stored = load_file(tmp_path / "out" / "model.safetensors")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    tensors, left = unflatten_tensor_state_dict(stored, header)
    assert not left
    flat, metadata = flatten_tensor_state_dict(tensors)
    assert set(flat) == set(stored) and all(torch.equal(flat[name], stored[name]) for name in flat)
    for name, text in metadata.items():
        ours, theirs = json.loads(header[name]), json.loads(text)
        assert ours == theirs or sorted(ours) == sorted(theirs) == sorted(stored_names(tensors)), name


def stored_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    return list(tensors)


def test_losses_say_that_narrow_codes_take_bytes(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, ("w4a16-g32", "w8a16"))
    torchao.export(tmp_path / "narrow", model, file, edits)
    (loss,) = json.loads((tmp_path / "narrow" / "losses.json").read_text())
    assert loss["lost"] == "memory" and loss["why"].startswith("no size gain below 8 bit on CPU: the codes of ")
    codes = load_file(tmp_path / "narrow" / "model.safetensors")["model.layers.0.self_attn.q_proj._weight_qdata"]
    assert codes.dtype == torch.int8 and codes.shape == (HIDDEN, HIDDEN) and int(codes.min()) == -8
    file, edits = compressed(model, ("w8a16", "w8a8-token"))
    torchao.export(tmp_path / "eight", model, file, edits)
    assert json.loads((tmp_path / "eight" / "losses.json").read_text()) == []


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        ("w4a16-g32-asym", "zero points are whole numbers"),
        ("w4a8-g32", "int8 inputs go with 8-bit weights"),
        ("w8a8-token-g32", "int8 inputs go with 8-bit weights"),
        ("nf4", "nf4 is not exported"),
        ("bf16", "leave the site out"),
    ],
)
def test_refuses_what_is_not_exact(model: LoadedModel, fmt: str, reason: str) -> None:
    assert reason in str(torchao.supports(parse_format(fmt), model.structure.sites[0]))


def test_refuses_shapes_and_layers_that_do_not_fit() -> None:
    def site(d_in: int, kind: str = "down", transposed: bool = False) -> Site:
        return Site("x", kind, 0, (LayerSpec("x", kind, 0, d_in, 64, transposed=transposed),))

    assert "does not divide 576" in str(torchao.supports(parse_format("w4a16-g128"), site(576)))
    assert "stored transposed" in str(torchao.supports(parse_format("w4a16"), site(96, transposed=True)))
    assert "experts" in str(torchao.supports(parse_format("w4a16"), site(96, "expert_down")))


DAMAGE = {
    "scales of two layers": swapped("model.layers.1.mlp.up_proj._weight_scale", "model.layers.2.mlp.up_proj._weight_scale"),
    "codes of two layers": swapped(
        "model.layers.0.self_attn.k_proj._weight_qdata", "model.layers.0.self_attn.v_proj._weight_qdata"
    ),
    "a zero point": added("model.layers.0.self_attn.q_proj._weight_zero_point", (3, 1), 1),
    "one code": added("model.layers.1.mlp.gate_proj._weight_qdata", (7, 3), 1),
    "a norm": added("model.norm.weight", (5,), 0.01),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_export_fails_the_comparison(tmp_path: Path, model: LoadedModel, damage: Callable[[Path], None]) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    torchao.export(tmp_path / "out", model, file, edits)
    damage(tmp_path / "out")
    result = verified(torchao, tmp_path / "out", model, edits)
    assert not result.ok and "differs from the evaluated weights" in result.message


def test_the_config_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="is not torchao's FqnToConfig"):
        torchao.from_config({"quant_method": "gptq"})
