"""Exports of a configuration alone, for ModelOpt and MLX: they read back as the policy's table and say that nothing loaded them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from methods.formats.format import parse_format
from methods.model.load import LoadedModel
from methods.model.structure import LayerSpec, Site
from search.export import mlx, modelopt
from search.export.plan import STATUS
from search.export.registry import exporter
from tests.search.export.wide import compressed, verified, wide_model

MIXED = {mlx: ("w4a16-g32-asym", "w8a16-g64-asym", "w3a16-g64-asym"), modelopt: ("w4a16-g64", "w8a16")}
FILES = {mlx: "config.json", modelopt: "hf_quant_config.json"}
MODULES = pytest.mark.parametrize("module", [mlx, modelopt], ids=["mlx", "modelopt"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return wide_model(tmp_path_factory.mktemp("wide"))


def _exported(folder: Path, model: LoadedModel, module: Any, cache: str = "") -> dict[str, Any]:
    file, edits = compressed(model, MIXED[module], cache)
    module.export(folder, model, file, edits)
    config: dict[str, Any] = json.loads((folder / FILES[module]).read_text())
    formats = {name: c.format for edit in edits.values() for name, c in edit.linears.items()}
    assert module.from_config(config) == formats
    result = verified(module, folder, model, edits)
    assert result.ok and not result.load_tested and result.n_linears == 20
    assert math.isnan(result.max_weight_diff) and math.isnan(result.nll_loaded)
    assert result.summary == "not load-tested; the configuration of 20 linears reads back"
    return config


@MODULES
def test_it_reads_back_and_is_labelled(tmp_path: Path, model: LoadedModel, module: Any) -> None:
    config = _exported(tmp_path / "out", model, module)
    label = config["isolatency"] if module is mlx else config["producer"]
    assert label["status"] == STATUS == "not load-tested"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert json.loads((tmp_path / "out" / "serve.json").read_text()) == {}
    lost = {loss["lost"]: loss["why"] for loss in json.loads((tmp_path / "out" / "losses.json").read_text())}
    assert set(lost) == {"weights", "verification"} and "not load-tested" in lost["verification"]


@MODULES
def test_a_cache_that_is_not_expressed_is_a_loss(tmp_path: Path, model: LoadedModel, module: Any) -> None:
    _exported(tmp_path / "out", model, module, cache="kv-fp8")
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert "kv-fp8" in next(loss["why"] for loss in losses if loss["lost"] == "cache")


def test_mlx_says_what_is_left_alone(tmp_path: Path, model: LoadedModel) -> None:
    config = _exported(tmp_path / "out", model, mlx)
    table = config["quantization"]
    assert table == config["quantization_config"]
    assert {name for name, entry in table.items() if entry is False} == {
        "lm_head",
        "model.embed_tokens",
        "model.layers.2.mlp.down_proj",
    }
    assert table["model.layers.0.self_attn.q_proj"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert {"group_size", "bits", "mode"} <= set(table)
    table["model.layers.0.self_attn.q_proj"]["mode"] = "mxfp4"
    with pytest.raises(ValueError, match="mode='mxfp4' is not affine"):
        mlx.from_config(config)
    with pytest.raises(ValueError, match="has no quantization"):
        mlx.from_config({})


def test_modelopt_names_the_algorithm_of_every_layer(tmp_path: Path, model: LoadedModel) -> None:
    config = _exported(tmp_path / "out", model, modelopt)["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION" and config["kv_cache_quant_algo"] is None
    assert config["exclude_modules"] == ["model.layers.2.mlp.down_proj", "lm_head"]
    assert config["quantized_layers"]["model.layers.0.self_attn.k_proj"] == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": False,
    }
    table = {f"layer.{index}": parse_format(name) for index, name in enumerate(modelopt.ALGORITHMS)}
    assert modelopt.from_config({"quantization": modelopt.quantization(table, [])}) == table
    with pytest.raises(ValueError, match="is not a format of this project"):
        modelopt.from_config({"quantization": {"quantized_layers": {"a": {"quant_algo": "FP8"}}}})
    with pytest.raises(ValueError, match="no quantized_layers"):
        modelopt.from_config({})


@MODULES
def test_a_changed_table_fails(tmp_path: Path, model: LoadedModel, module: Any) -> None:
    file, edits = compressed(model, MIXED[module])
    module.export(tmp_path / "out", model, file, edits)
    path = tmp_path / "out" / FILES[module]
    text = path.read_text()
    config = json.loads(text)
    table = config["quantization"] if module is mlx else config["quantization"]["quantized_layers"]
    name, other = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    table[name] = table[other]
    path.write_text(json.dumps(config))
    result = verified(module, tmp_path / "out", model, edits)
    first, second = MIXED[module][:2]
    assert not result.ok and result.message == f"{FILES[module]} says {second} of {name}, and the policy {first}"
    del table[name]
    path.write_text(json.dumps(config))
    assert f"says dense of {name}" in verified(module, tmp_path / "out", model, edits).message


@pytest.mark.parametrize(
    ("name", "fmt", "reason"),
    [
        ("mlx", "w4a16-g32", "MLX fits an offset to every group; use w4a16-g32-asym"),
        ("mlx", "w4a16-asym", "group=-1 is not one of"),
        ("mlx", "w4a8-g32-asym", "is not exported"),
        ("modelopt", "w4a16-g32", "no algorithm of ModelOpt computes w4a16-g32"),
        ("modelopt", "w8a8-token", "no algorithm of ModelOpt computes w8a8-token"),
        ("modelopt", "bf16", "leave the site out"),
    ],
)
def test_refuses_what_is_not_meant(model: LoadedModel, name: str, fmt: str, reason: str) -> None:
    assert reason in str(exporter(name).supports(parse_format(fmt), model.structure.sites[0]))


def test_refuses_shapes_and_layers_that_do_not_fit() -> None:
    for name, fmt in (("mlx", "w4a16-g128-asym"), ("modelopt", "w4a16-g128")):
        supports = exporter(name).supports
        for kind, transposed, d_in, reason in (
            ("down", False, 576, "does not divide 576"),
            ("down", True, 256, "Conv1D"),
            ("expert_down", False, 256, "experts"),
        ):
            site = Site("x", kind, 0, (LayerSpec("x", kind, 0, d_in, 64, transposed=transposed),))
            assert reason in str(supports(parse_format(fmt), site))
