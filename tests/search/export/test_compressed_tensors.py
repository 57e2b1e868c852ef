"""The compressed-tensors export: stock transformers loads exactly the weights that were evaluated, or the comparison says so."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.apply import Installer
from methods.formats.format import parse_format
from methods.method import Edit
from methods.model.load import LoadedModel
from methods.model.structure import LayerSpec, Site
from methods.policy import Policy
from methods.policy_file import PolicyFile, expanded_digest, read
from search.export.compressed_tensors import export, from_config, quantization_config, supports, verify
from search.export.registry import EXPORTERS, exporter
from search.export.verification import Verification
from spaces.runtimes import DEFAULT_FORMATS, runtime
from tests.edits import edits_of, loaded_tiny, minmax
from tests.tiny import tiny_tokens

IDS = tiny_tokens(2, 40)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    folder, known = tmp_path_factory.mktemp("models"), {}

    def get(arch: str) -> LoadedModel:
        if arch not in known:
            dtype = torch.float16 if arch == "mistral" else torch.bfloat16
            known[arch] = loaded_tiny(folder, arch, dtype)
        return known[arch]

    return get


def _compressed(
    loaded: LoadedModel, formats: tuple[str, ...] = ("w4a16-g32", "w8a16", "w8a8-token")
) -> tuple[PolicyFile, dict[str, Edit]]:
    """A format a block, with the last block's last site left dense."""
    sites = loaded.structure.sites[:-1]
    policy, edits = edits_of(loaded.model, loaded.structure, {site.name: formats[site.block % len(formats)] for site in sites})
    return PolicyFile(policy, id="mixed"), edits


def _verified(folder: Path, loaded: LoadedModel, edits: Mapping[str, Edit]) -> Verification:
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        return verify(folder, loaded.model, IDS)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "neox", "mistral", "gemma"])
def test_loads_as_what_was_evaluated(tmp_path: Path, models: Callable[[str], LoadedModel], arch: str) -> None:
    loaded = models(arch)
    file, edits = _compressed(loaded)
    export(tmp_path / "ct", loaded, file, edits)
    result = _verified(tmp_path / "ct", loaded, edits)
    assert result.ok, result.message
    assert result.max_weight_diff == 0.0
    assert result.n_linears == sum(len(edit.linears) for edit in edits.values())
    assert read(tmp_path / "ct" / "policy.yaml", loaded.structure) == file


def test_weight_only_losses_are_equal(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    file, edits = _compressed(loaded, ("w4a16-g32", "w4a16", "w8a16-g32"))
    export(tmp_path / "ct", loaded, file, edits)
    result = _verified(tmp_path / "ct", loaded, edits)
    assert result.ok and abs(result.nll_loaded - result.nll_reference) < 1e-5


def test_replaced_parameters_are_exported(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    file, edits = _compressed(loaded, ("w4a16-g32",))
    site = loaded.structure.sites[0]
    name = f"{site.norm}.weight"
    folded = (loaded.model.get_parameter(name) * 1.7).to(torch.bfloat16)
    edits[site.name] = Edit(edits[site.name].linears, {name: folded})
    export(tmp_path / "ct", loaded, file, edits)
    assert torch.equal(load_file(tmp_path / "ct" / "model.safetensors")[name], folded)
    assert _verified(tmp_path / "ct", loaded, edits).ok
    edits[site.name] = Edit(edits[site.name].linears, {name: folded.float() * 1.7})
    with pytest.raises(ValueError, match="cannot be stored in bf16 without loss"):
        export(tmp_path / "lossy", loaded, file, edits)
    assert not (tmp_path / "lossy").exists()


def test_files_say_what_engines_need(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    file, edits = _compressed(loaded)
    export(tmp_path / "ct", loaded, file, edits)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["policy_digest"] == expanded_digest(file.policy, loaded.structure)
    assert quantization["format"] == "mixed-precision"
    dense = loaded.structure.sites[-1].layers[0].name
    assert set(quantization["ignore"]) == {"lm_head", dense}
    assert json.loads((tmp_path / "ct" / "losses.json").read_text()) == []
    serve = json.loads((tmp_path / "ct" / "serve.json").read_text())
    assert serve["vllm"]["command"][:3] == ["vllm", "serve", "."]
    assert "vllm-cpu" not in serve
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    site = loaded.structure.sites[0]
    layer = site.layers[1]
    assert tensors[f"{layer.name}.weight_packed"].shape == (layer.d_out, layer.d_in * 4 // 32)
    codes = edits[site.name].linears[layer.name].payload["codes"]
    first = int(tensors[f"{layer.name}.weight_packed"][5, 2])
    assert [(first >> (4 * i)) & 15 for i in range(8)] == codes[5, 16:24].tolist()
    assert tensors[f"{layer.name}.weight_scale"].dtype == torch.bfloat16
    assert "lm_head.weight" not in tensors


def test_the_config_reads_back() -> None:
    formats = {
        f"layers.{i}": parse_format(f) for i, f in enumerate(("w8a8-token", "w4a16-g64", "w8a16", "w4a16-g64", "w8a16-g32"))
    }
    config = quantization_config(formats, ["lm_head"], "sha256:0")
    assert from_config(json.loads(json.dumps(config))) == formats
    single = quantization_config({"a": parse_format("w4a16")}, [], "")
    assert single["format"] == "pack-quantized" == single["config_groups"]["group_0"]["format"]
    with pytest.raises(ValueError, match="is not compressed-tensors"):
        from_config({"quant_method": "gptq"})
    config["config_groups"]["group_1"]["targets"].append("layers.0")
    with pytest.raises(ValueError, match=r"layers\.0 is in two groups"):
        from_config(config)
    config["config_groups"]["group_0"]["weights"]["type"] = "float"
    with pytest.raises(ValueError, match="are not a format of this project"):
        from_config(config)


def _drop_status(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["quantization_status"]
    path.write_text(json.dumps(config))


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _swap_scales(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = (f"model.layers.{block}.mlp.up_proj.weight_scale" for block in (1, 2))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    _edit_tensors(folder, swap)


def _one_code(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.k_proj.weight_packed"][7, 3] ^= 1

    _edit_tensors(folder, change)


def _untouched(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][5] *= 1.01

    _edit_tensors(folder, change)


def _lost(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.down_proj.weight_scale"]

    _edit_tensors(folder, drop)


def _twos_complement(folder: Path) -> None:
    """Codes as they are without the offset that makes them unsigned."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_packed"):
                tensors[name] ^= -0x77777778

    _edit_tensors(folder, change)


def _swap_codes(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        k, v = (f"model.layers.0.self_attn.{name}_proj.weight_packed" for name in "kv")
        tensors[k], tensors[v] = tensors[v], tensors[k]

    _edit_tensors(folder, swap)


@pytest.mark.parametrize("damage", [_drop_status, _swap_scales, _swap_codes, _one_code, _twos_complement, _untouched, _lost])
def test_a_damaged_export_fails_the_comparison(
    tmp_path: Path, models: Callable[[str], LoadedModel], damage: Callable[[Path], None]
) -> None:
    loaded = models("llama")
    file, edits = _compressed(loaded, ("w4a16-g32",))
    export(tmp_path / "ct", loaded, file, edits)
    damage(tmp_path / "ct")
    result = _verified(tmp_path / "ct", loaded, edits)
    assert not result.ok
    assert "differs from the evaluated weights" in result.message or "missing keys" in result.message
    assert "\n" not in result.message


def test_another_reference_fails_the_comparison(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    file, edits = _compressed(loaded, ("w4a16-g32",))
    export(tmp_path / "ct", loaded, file, edits)
    assert not verify(tmp_path / "ct", loaded.model, IDS).ok


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        ("w4a16-g32-asym", "asymmetric grids"),
        ("w3a16-g32", "3-bit codes have no kernel"),
        ("w2a16-g32", "2-bit codes have no kernel"),
        ("w4a8-g32", "activation scales a group"),
        ("w8a8-g32", "activation scales a group"),
        ("w4a8-token", "8-bit activations go with 8-bit weights"),
        ("w8a8-token-g32", "8-bit activations go with 8-bit weights"),
        ("w4a16-g48", "group=48 is not one of"),
        ("bf16", "leave the site out"),
    ],
)
def test_refuses_what_does_not_load_alike_everywhere(
    tmp_path: Path, models: Callable[[str], LoadedModel], fmt: str, reason: str
) -> None:
    loaded = models("llama")
    site = loaded.structure.sites[0]
    assert reason in str(supports(parse_format(fmt), site))
    if fmt != "bf16":
        policy, edits = edits_of(loaded.model, loaded.structure, {site.name: fmt})
        with pytest.raises(ValueError, match=rf"q_proj has {fmt}: .*{reason}"):
            export(tmp_path / "ct", loaded, PolicyFile(policy), edits)
    assert not (tmp_path / "ct").exists()


def test_refuses_shapes_and_layers_that_do_not_fit(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    def site(d_in: int, kind: str = "down", transposed: bool = False) -> Site:
        return Site("x", kind, 0, (LayerSpec("x", kind, 0, d_in, 64, transposed=transposed),))

    assert supports(parse_format("w4a16-g64"), site(576)) is None
    assert "does not divide 576" in str(supports(parse_format("w4a16-g128"), site(576)))
    assert "do not fill words" in str(supports(parse_format("w4a16"), site(100)))
    assert supports(parse_format("w8a8-token"), site(100)) is None
    assert "stored transposed" in str(supports(parse_format("w4a16"), site(96, transposed=True)))
    assert supports(parse_format("w4a16"), site(96, "expert_down")) is None
    assert "experts" in str(supports(parse_format("w8a8-token"), site(96, "expert_down")))
    loaded = models("gpt2")
    policy, edits = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w4a16-g32"})
    with pytest.raises(ValueError, match="stored transposed"):
        export(tmp_path / "ct", loaded, PolicyFile(policy), edits)
    with pytest.raises(ValueError, match="compresses nothing"):
        export(tmp_path / "ct", loaded, PolicyFile(Policy()), {})


def test_refuses_a_site_whose_layers_disagree(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    file, edits = _compressed(loaded, ("w4a16-g32",))
    site = loaded.structure.sites[0]
    key = site.layers[1].name
    weight = loaded.model.get_submodule(key).weight
    edits[site.name] = Edit({**edits[site.name].linears, key: minmax(weight, parse_format("w8a16"))})
    with pytest.raises(ValueError, match="the policy decides"):
        export(tmp_path / "ct", loaded, file, edits)


def test_what_a_runtime_runs_its_export_can_write() -> None:
    layer = LayerSpec("x", "o", 0, 256, 512)
    site = Site("x", "o", 0, (layer,))
    for name in ("transformers", "vllm", "vllm-cpu"):
        writer = exporter(runtime(name).export)
        assert [writer.supports(parse_format(fmt), site) for fmt in DEFAULT_FORMATS[name]] == [None] * len(
            DEFAULT_FORMATS[name]
        )


def test_the_registry_knows_its_formats() -> None:
    for name in EXPORTERS:
        module = exporter(name)
        assert all(callable(getattr(module, verb)) for verb in ("supports", "export", "verify"))
    with pytest.raises(
        ValueError, match="unknown export format 'onnx'; use one of compressed-tensors, auto-round, gptq, torchao"
    ):
        exporter("onnx")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3-moe"])
def test_dense_export_holds_the_decoded_weights(tmp_path: Path, models: Callable[[str], LoadedModel], arch: str) -> None:
    dense = exporter("dense")
    loaded = models(arch)
    policy, edits = edits_of(loaded.model, loaded.structure, {site.name: "w3a16-g16-asym" for site in loaded.structure.sites})
    dense.export(tmp_path / "hf", loaded, PolicyFile(policy), edits)
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        result = dense.verify(tmp_path / "hf", loaded.model, IDS)
    assert result.ok, result.message
    assert result.max_weight_diff == 0.0
    assert {loss["lost"] for loss in json.loads((tmp_path / "hf" / "losses.json").read_text())} == {"memory", "dtype"}
    assert not dense.verify(tmp_path / "hf", loaded.model, IDS).ok


def test_dense_export_says_what_it_loses(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    dense = exporter("dense")
    loaded = models("llama")
    site = loaded.structure.sites[0].name
    policy, edits = edits_of(loaded.model, loaded.structure, {site: "w4a8-g32"})
    dense.export(tmp_path / "hf", loaded, PolicyFile(policy), edits)
    lost = [loss["lost"] for loss in json.loads((tmp_path / "hf" / "losses.json").read_text())]
    assert lost == ["memory", "dtype", "activations"]
    plain = tmp_path / "plain"
    dense.export(plain, loaded, PolicyFile(Policy()), {})
    assert json.loads((plain / "losses.json").read_text()) == []
    assert json.loads((plain / "config.json").read_text())["dtype"] == "bfloat16"
    assert dense.verify(plain, loaded.model, IDS).ok
