"""AutoRound's and GPTQ's exports: tensors by the layout's definition, loaded by auto-round's kernels, and every silent damage noticed."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from methods.formats.format import parse_format
from methods.method import Edit
from methods.model.load import LoadedModel
from methods.model.structure import LayerSpec, Site
from methods.policy import Policy
from methods.policy_file import PolicyFile, expanded_digest, read
from search.export import auto_round, gptq, gptq_tensors
from tests.edits import edits_of, loaded_tiny
from tests.search.export.wide import HIDDEN, INNER, added, compressed, damaged, swapped, verified, wide_model

MIXED = {auto_round: ("w4a16-g32", "w8a16", "w2a16-g32", "w3a16-g64"), gptq: ("w4a16-g32", "w8a16", "w8a16-g32", "w4a16-g64")}
EXPORTERS = pytest.mark.parametrize("module", [auto_round, gptq], ids=["auto-round", "gptq"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return wide_model(tmp_path_factory.mktemp("wide"))


@EXPORTERS
def test_loads_as_what_was_evaluated(tmp_path: Path, model: LoadedModel, module: Any) -> None:
    file, edits = compressed(model, MIXED[module])
    module.export(tmp_path / "out", model, file, edits)
    result = verified(module, tmp_path / "out", model, edits)
    assert result.ok and result.load_tested, result.message
    assert result.max_weight_diff == 0.0 and abs(result.nll_loaded - result.nll_reference) < 1e-5
    assert result.n_linears == sum(len(edit.linears) for edit in edits.values()) == 20
    assert read(tmp_path / "out" / "policy.yaml", model.structure) == file
    assert json.loads((tmp_path / "out" / "losses.json").read_text()) == []


@EXPORTERS
def test_fp16_checkpoints_load_too(tmp_path: Path, module: Any) -> None:
    loaded = wide_model(tmp_path / "model", torch.float16)
    file, edits = compressed(loaded, MIXED[module][:2])
    module.export(tmp_path / "out", loaded, file, edits)
    assert verified(module, tmp_path / "out", loaded, edits).ok
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_tensors_are_what_the_layout_says(tmp_path: Path, model: LoadedModel) -> None:
    """Each field read by hand: bits of the codes along the inputs, zero points less one along the outputs."""
    file, edits = compressed(model, ("w4a16-g32", "w3a16-g64"))
    auto_round.export(tmp_path / "out", model, file, edits)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for site, bits in ((model.structure.sites[0], 4), (model.structure.sites[1], 3)):
        name = site.layers[0].name
        payload = edits[site.name].linears[name].payload
        d_out, d_in = payload["codes"].shape
        assert tensors[f"{name}.qweight"].shape == (d_in * bits // 32, d_out)
        assert tensors[f"{name}.qzeros"].shape == (payload["scale"].shape[1], d_out * bits // 32)
        assert tensors[f"{name}.scales"].dtype == torch.float16
        assert torch.equal(tensors[f"{name}.scales"].float().T, payload["scale"].float())
        assert f"{name}.g_idx" not in tensors
        column = "".join(f"{int(word) & 0xFFFFFFFF:032b}"[::-1] for word in tensors[f"{name}.qweight"][:, 5])
        assert [int(column[i * bits : (i + 1) * bits][::-1], 2) for i in range(d_in)] == payload["codes"][5].tolist()
        zeros = "".join(f"{int(word) & 0xFFFFFFFF:032b}"[::-1] for word in tensors[f"{name}.qzeros"][1])
        assert {int(zeros[i * bits : (i + 1) * bits][::-1], 2) for i in range(d_out)} == {2 ** (bits - 1) - 1}
    assert int(tensors[f"{model.structure.sites[0].layers[0].name}.qzeros"][0, 0]) == 0x77777777


def test_gptq_names_the_group_of_every_input(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, ("w4a16-g32", "w8a16"))
    gptq.export(tmp_path / "out", model, file, edits)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.g_idx"].tolist() == [i // 32 for i in range(HIDDEN)]
    assert tensors["model.layers.0.self_attn.o_proj.g_idx"].tolist() == [0] * HIDDEN


def test_auto_round_names_every_linear(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, MIXED[auto_round])
    auto_round.export(tmp_path / "out", model, file, edits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["packing_format"]) == ("auto-round", "auto_round:auto_gptq")
    assert config["block_name_to_quantize"] == "model.layers"
    assert config["policy_digest"] == expanded_digest(file.policy, model.structure)
    formats = {name: c.format for edit in edits.values() for name, c in edit.linears.items()}
    assert auto_round.from_config(config) == formats
    dense = {name for name, entry in config["extra_config"].items() if entry["bits"] == 16}
    assert dense == {"lm_head", "model.layers.2.mlp.down_proj"}
    config["extra_config"]["model.layers.0.mlp.up_proj"]["sym"] = False
    with pytest.raises(ValueError, match="sym=false is not a format"):
        auto_round.from_config(config)
    with pytest.raises(ValueError, match="quant_method='gptq'"):
        auto_round.from_config({**config, "quant_method": "gptq"})


def test_gptq_rules_cover_fused_names_and_read_back(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, MIXED[gptq])
    gptq.export(tmp_path / "out", model, file, edits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    formats = {name: c.format for edit in edits.values() for name, c in edit.linears.items()}
    names = [layer.name for _, layer in model.structure.layers()]
    assert gptq.from_config(config, names) == formats
    for block in range(3):
        for parent, fused, member in (("self_attn", "qkv_proj", "v_proj"), ("mlp", "gate_up_proj", "up_proj")):
            whole, single = f"model.layers.{block}.{parent}.{fused}", f"model.layers.{block}.{parent}.{member}"
            assert gptq.from_config(config, [whole]) == {whole: formats[single]}
    patterns = [rule[2:] for rule in config["dynamic"]]
    assert all(sum(bool(re.match(pattern, name)) for pattern in patterns) == 1 for name in names)
    assert not any(re.match(pattern, "model.layers.10.self_attn.q_proj") for pattern in patterns)
    down = "model.layers.2.mlp.down_proj"
    assert gptq.from_config(config, [down]) == {}
    del config["dynamic"][next(rule for rule in config["dynamic"] if rule.startswith("-:"))]
    assert gptq.from_config(config, [down]) == {down: parse_format("w4a16-g32")}
    with pytest.raises(ValueError, match="desc_act"):
        gptq.from_config({**config, "desc_act": True}, names)


def test_fused_members_share_one_format(tmp_path: Path, model: LoadedModel) -> None:
    four, eight = parse_format("w4a16-g32"), parse_format("w8a16-g32")
    with pytest.raises(ValueError, match=r"engines fuse these linears.*'m\.k_proj': 'w8a16-g32'"):
        gptq.quantization_config({"m.q_proj": four, "m.k_proj": eight}, [["m.q_proj", "m.k_proj"]], "")
    with pytest.raises(ValueError, match=r"'m\.k_proj': 'dense'"):
        gptq.quantization_config({"m.q_proj": four}, [["m.q_proj", "m.k_proj"]], "")
    file, edits = compressed(model, ("w4a16-g32",))
    _, other = compressed(model, ("w8a16",))
    site = model.structure.sites[0]
    key = site.layers[1].name
    edits[site.name] = Edit({**edits[site.name].linears, key: other[site.name].linears[key]})
    for module in (auto_round, gptq):
        with pytest.raises(ValueError, match="the policy decides"):
            module.export(tmp_path / "out", model, file, edits)
    odd = Site("x", "qkv", 0, tuple(LayerSpec(f"m.{leaf}", leaf, 0, 64, 64) for leaf in ("left", "right")))
    assert "what engines call left+right" in str(gptq.supports(four, odd))
    assert auto_round.supports(four, odd) is None


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        ("w4a16-g32-asym", "zero points are whole numbers"),
        ("w4a8-g32", "inputs are left alone"),
        ("w8a8-token", "inputs are left alone"),
        ("w4a16-g48", "group=48 is not one of"),
        ("w5a16", "w5a16 is not exported"),
        ("nf4", "nf4 is not exported"),
        ("bf16", "leave the site out"),
    ],
)
def test_refuses_what_is_not_exact(model: LoadedModel, fmt: str, reason: str) -> None:
    for module in (auto_round, gptq):
        assert reason in str(module.supports(parse_format(fmt), model.structure.sites[0]))


def test_refuses_shapes_dtypes_and_what_stands_beside_the_grid(tmp_path: Path, model: LoadedModel) -> None:
    def site(d_in: int, d_out: int = 64, kind: str = "down", transposed: bool = False) -> Site:
        return Site("x", kind, 0, (LayerSpec("x", kind, 0, d_in, d_out, transposed=transposed),))

    four = parse_format("w4a16-g64")
    for module in (auto_round, gptq):
        assert module.supports(four, site(576)) is None
        assert "does not divide 576" in str(module.supports(parse_format("w4a16-g128"), site(576)))
        assert "48 inputs or outputs of a linear are no multiple of 32" in str(module.supports(four, site(64, 48)))
        assert "stored transposed" in str(module.supports(four, site(64, transposed=True)))
        assert "experts" in str(module.supports(four, site(64, kind="expert_down")))
        with pytest.raises(ValueError, match="compresses nothing"):
            module.export(tmp_path / "out", model, PolicyFile(Policy()), {})
    assert auto_round.supports(parse_format("w3a16-g32"), site(64)) is None
    assert "3-bit codes have no kernel" in str(gptq.supports(parse_format("w3a16-g32"), site(64)))
    wide = loaded_tiny(tmp_path, "opt", torch.float32)
    policy, edits = edits_of(wide.model, wide.structure, {wide.structure.sites[0].name: "w4a16-g32"})
    with pytest.raises(ValueError, match="the model is stored in fp32"):
        auto_round.export(tmp_path / "out", wide, PolicyFile(policy), edits)
    file, edits = compressed(model, ("w4a16-g32",))
    first = model.structure.sites[0]
    linears = dict(edits[first.name].linears)
    name, held = next(iter(linears.items()))
    linears[name] = type(held)(held.dense, {**held.payload, "lowrank.left": torch.zeros(1)}, held.format)
    with pytest.raises(ValueError, match=r"lowrank\.left beside the grid"):
        auto_round.export(tmp_path / "out", model, file, {**edits, first.name: Edit(linears)})
    assert not (tmp_path / "out").exists()


def test_scales_and_biases_beyond_fp16_are_refused(tmp_path: Path) -> None:
    loaded = wide_model(tmp_path / "model")
    bias = loaded.model.get_parameter("model.layers.0.self_attn.q_proj.bias")
    before = float(bias[0])
    bias[0] = torch.tensor(1.23e-7).bfloat16().float()
    file, edits = compressed(loaded, ("w4a16-g32",))
    with pytest.raises(ValueError, match=r"q_proj\.bias cannot be stored in fp16"):
        auto_round.export(tmp_path / "out", loaded, file, edits)
    bias[0] = before
    weight = loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight *= 1e-6
    file, edits = compressed(loaded, ("w4a16-g32",))
    with pytest.raises(ValueError, match=r"up_proj\.scales cannot be stored in fp16"):
        auto_round.export(tmp_path / "out", loaded, file, edits)


def _config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return apply


def _other_version(tensors: dict[str, torch.Tensor]) -> None:
    """Zero points as GPTQ's second version stores them."""
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] += 0x11111111


def _packed_the_other_way(tensors: dict[str, torch.Tensor]) -> None:
    """A square weight's codes with inputs and outputs confused."""
    name = "model.layers.0.self_attn.q_proj"
    codes = gptq_tensors._fields(tensors[f"{name}.qweight"].T, 4, (HIDDEN, HIDDEN))
    tensors[f"{name}.qweight"] = gptq_tensors._words(codes.T.contiguous(), 4).T.contiguous()


def _lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.down_proj.qzeros"]


def _one_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.self_attn.k_proj.qweight"][7, 3] ^= 16


DAMAGE = {
    "scales of two layers": swapped("model.layers.1.mlp.up_proj.scales", "model.layers.2.mlp.up_proj.scales"),
    "scales of gate and up": swapped("model.layers.1.mlp.up_proj.scales", "model.layers.1.mlp.gate_proj.scales"),
    "codes of two layers": swapped("model.layers.0.self_attn.k_proj.qweight", "model.layers.0.self_attn.v_proj.qweight"),
    "one code": damaged(_one_code),
    "zero points of the other version": damaged(_other_version),
    "inputs and outputs confused": damaged(_packed_the_other_way),
    "a norm": added("model.norm.weight", (5,), 0.01),
    "a bias": added("model.layers.1.self_attn.q_proj.bias", (3,), 0.25),
    "a missing tensor": damaged(_lost),
}


@EXPORTERS
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_fails_the_comparison(tmp_path: Path, model: LoadedModel, module: Any, damage: str) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    module.export(tmp_path / "out", model, file, edits)
    assert _damaged_result(module, tmp_path / "out", model, edits, DAMAGE[damage])


def _damaged_result(
    module: Any, folder: Path, model: LoadedModel, edits: dict[str, Edit], damage: Callable[[Path], None]
) -> str:
    """What `verify` objects to."""
    damage(folder)
    result = verified(module, folder, model, edits)
    assert not result.ok and "\n" not in result.message
    return result.message


def test_the_groups_of_inputs_are_compared_where_the_runtime_ignores_them(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    gptq.export(tmp_path / "out", model, file, edits)
    name = "model.layers.0.self_attn.o_proj"
    message = _damaged_result(gptq, tmp_path / "out", model, edits, added(f"{name}.g_idx", (slice(0, 32),), 1))
    assert (
        message
        == f"the tensors of {name} do not decode to the evaluated weights; all tensors are equal, 20 of them compressed linears"
    )


def test_a_changed_configuration_fails_the_comparison(tmp_path: Path, model: LoadedModel) -> None:
    """A linear that falls to the default, or to dense, is another model, whether or not its tensors would still load."""
    file, edits = compressed(model, ("w4a16-g32", "w4a16"))
    auto_round.export(tmp_path / "ar", model, file, edits)
    name = "model.layers.1.mlp.down_proj"
    said = _damaged_result(
        auto_round, tmp_path / "ar", model, edits, _config(lambda c: c["extra_config"][name].update(bits=16, data_type="float"))
    )
    assert "missing keys" in said
    gptq.export(tmp_path / "gptq", model, file, edits)

    def dense(config: dict[str, Any]) -> None:
        rule = next(rule for rule in config["dynamic"] if re.match(rule[2:], name))
        config["dynamic"] = {f"-:{old[2:]}" if old == rule else old: new for old, new in config["dynamic"].items()}

    assert "missing keys" in _damaged_result(gptq, tmp_path / "gptq", model, edits, _config(dense))


@EXPORTERS
def test_another_reference_fails_the_comparison(tmp_path: Path, model: LoadedModel, module: Any) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    module.export(tmp_path / "out", model, file, edits)
    assert not verified(module, tmp_path / "out", model, {}).ok


@EXPORTERS
def test_without_the_runtime_nothing_is_called_verified(
    tmp_path: Path, model: LoadedModel, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, edits = compressed(model, ("w4a16-g32",))
    module.export(tmp_path / "out", model, file, edits)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cpuinfo" else found(name))
    with pytest.raises(ValueError, match=r"needs the packages auto-round and py-cpuinfo \(cpuinfo is missing\)"):
        verified(module, tmp_path / "out", model, edits)


def test_serving_says_which_engines_have_kernels(tmp_path: Path, model: LoadedModel) -> None:
    def engines(module: Any, *formats: str) -> list[str]:
        file, edits = compressed(model, formats)
        folder = tmp_path / f"{module.__name__}-{'-'.join(formats)}"
        module.export(folder, model, file, edits)
        return list(json.loads((folder / "serve.json").read_text()))

    assert engines(auto_round, "w4a16-g32") == ["transformers", "vllm", "vllm-cpu"]
    assert engines(auto_round, "w4a16-g32", "w8a16") == ["transformers", "vllm"]
    assert engines(auto_round, "w4a16-g32", "w3a16-g32") == ["transformers"]
    assert engines(gptq, "w4a16-g32") == ["vllm", "vllm-cpu"]
    assert engines(gptq, "w8a16") == ["vllm"]
    assert INNER % 64 == 0
