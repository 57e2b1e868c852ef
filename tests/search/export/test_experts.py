"""Experts in exports: by the names and in the parts of checkpoints on the hub, equal to what was judged, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.apply import Installer
from methods.method import Edit
from methods.model.load import LoadedModel, load
from methods.policy_file import PolicyFile
from search.export import compressed_tensors, dense, experts
from search.export.registry import exporter
from search.export.verification import Verification
from tests.edits import edits_of, loaded_tiny
from tests.tiny import tiny_model, tiny_tokens

MIXTURES = ["mixtral-even", "qwen2-moe-even", "qwen3-moe-even"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    folder, known = tmp_path_factory.mktemp("models"), {}

    def get(arch: str) -> LoadedModel:
        if arch not in known:
            known[arch] = loaded_tiny(folder, arch)
        return known[arch]

    return get


def _edits(loaded: LoadedModel, expert: str | None, other: str | None) -> tuple[PolicyFile, dict[str, Edit]]:
    chosen = {site.name: expert if site.kind.startswith("expert") else other for site in loaded.structure.sites}
    policy, edits = edits_of(loaded.model, loaded.structure, {name: fmt for name, fmt in chosen.items() if fmt})
    return PolicyFile(policy), edits


def _verified(name: str, folder: Path, loaded: LoadedModel, edits: Mapping[str, Edit]) -> Verification:
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        return exporter(name).verify(folder, loaded.model, tiny_tokens(2, 24))


@pytest.mark.parametrize(
    ("expert", "other"), [("w4a16-g32", "w4a16-g32"), ("w8a16-g32", "w8a8-token"), ("w4a16", None), (None, "w8a16")]
)
@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("name", ["compressed-tensors", "dense"])
def test_loads_as_what_was_evaluated(
    tmp_path: Path, models: Callable[[str], LoadedModel], name: str, arch: str, expert: str | None, other: str | None
) -> None:
    loaded = models(arch)
    file, edits = _edits(loaded, expert, other)
    exporter(name).export(tmp_path / "out", loaded, file, edits)
    result = _verified(name, tmp_path / "out", loaded, edits)
    assert result.ok, result.message
    assert (result.max_weight_diff, result.n_linears) == (0.0, sum(len(edit.linears) for edit in edits.values()))


@pytest.mark.parametrize(
    ("arch", "prefix", "names"),
    [
        ("mixtral-even", "model.layers.1.block_sparse_moe.experts.2", ("w1", "w3", "w2")),
        ("qwen3-moe-even", "model.layers.1.mlp.experts.2", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_names_and_rows_are_those_of_checkpoints(
    tmp_path: Path, models: Callable[[str], LoadedModel], arch: str, prefix: str, names: tuple[str, str, str]
) -> None:
    loaded = models(arch)
    file, edits = _edits(loaded, "w4a16-g32", None)
    compressed_tensors.export(tmp_path / "ct", loaded, file, edits)
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    whole = {layer: c for edit in edits.values() for layer, c in edit.linears.items()}
    gate_up, down = (whole[f"model.layers.1.mlp.experts.2.{leaf}"] for leaf in ("gate_up_proj", "down_proj"))
    inner = gate_up.dense.shape[0] // 2
    gate, up, out = names
    assert torch.equal(stored[f"{prefix}.{gate}.weight_scale"], gate_up.payload["scale"][:inner])
    assert torch.equal(stored[f"{prefix}.{up}.weight_scale"], gate_up.payload["scale"][inner:])
    assert torch.equal(stored[f"{prefix}.{out}.weight_scale"], down.payload["scale"])
    first = int(stored[f"{prefix}.{up}.weight_packed"][3, 1])
    assert [(first >> (4 * i)) & 15 for i in range(8)] == gate_up.payload["codes"][inner + 3, 8:16].tolist()
    assert not [name for name in stored if name.endswith("gate_up_proj") or ".experts.2.gate_up" in name]
    groups = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["config_groups"]
    (targets,) = (group["targets"] for group in groups.values())
    assert len(targets) == 3 and all(target.startswith("re:") and r"experts\.\d+" in target for target in targets)
    assert [loss["lost"] for loss in json.loads((tmp_path / "ct" / "losses.json").read_text())] == ["experts"]
    assert list(json.loads((tmp_path / "ct" / "serve.json").read_text())) == ["transformers"]


def test_a_dense_export_has_the_names_of_checkpoints(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("mixtral-even")
    file, edits = _edits(loaded, "w4a16-g32", None)
    dense.export(tmp_path / "out", loaded, file, edits)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    whole = next(
        edit.linears["model.layers.0.mlp.experts.1.down_proj"] for edit in edits.values() if "down" in next(iter(edit.linears))
    )
    assert torch.equal(stored["model.layers.0.block_sparse_moe.experts.1.w2.weight"].float(), whole.dense)
    again = load(str(tmp_path / "out"), tmp_path / "cache").model
    assert torch.equal(again.model.layers[0].mlp.experts[1].down_proj.weight, whole.dense)


@pytest.mark.parametrize(
    ("arch", "expert", "reason"),
    [
        ("mixtral-even", "w8a8-token", "reads experts whose inputs are left alone only"),
        ("granite-moe", "w4a16-g32", "keep experts in one tensor"),
    ],
)
def test_what_transformers_does_not_read_is_refused(
    tmp_path: Path, models: Callable[[str], LoadedModel], arch: str, expert: str, reason: str
) -> None:
    loaded = models(arch)
    file, edits = _edits(loaded, expert, None)
    with pytest.raises(ValueError, match=reason):
        compressed_tensors.export(tmp_path / "ct", loaded, file, edits)
    assert not (tmp_path / "ct").exists()


def test_experts_that_differ_are_refused(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("mixtral-even")
    sites = [site.name for site in loaded.structure.sites if site.kind.startswith("expert")]
    for formats, told in (
        (dict.fromkeys(sites[:-1], "w4a16"), "dense, w4a16"),
        ({**dict.fromkeys(sites, "w4a16"), sites[0]: "w8a16"}, "w4a16, w8a16"),
    ):
        policy, edits = edits_of(loaded.model, loaded.structure, formats)
        with pytest.raises(ValueError, match=f"the experts have {told}, and transformers reads one format"):
            compressed_tensors.export(tmp_path / "ct", loaded, PolicyFile(policy), edits)
    assert not (tmp_path / "ct").exists()


def _one_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.1.up_proj.weight_packed"][3, 2] ^= 1


def _swapped_experts(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.0.mlp.experts.{index}.gate_proj.weight_scale" for index in (0, 2))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _swapped_halves(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("weight_packed", "weight_scale"):
        a, b = (f"model.layers.1.mlp.experts.0.{half}_proj.{part}" for half in ("gate", "up"))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def _scale_beyond_rounding(tensors: dict[str, torch.Tensor]) -> None:
    """A change that the decoded weights, rounded to bf16, need not show."""
    name = "model.layers.1.mlp.experts.0.down_proj.weight_scale"
    tensors[name] = tensors[name].float() * (1 + 2**-12)


@pytest.mark.parametrize("damage", [_one_code, _swapped_experts, _swapped_halves, _scale_beyond_rounding])
def test_a_damaged_export_fails_the_comparison(
    tmp_path: Path, models: Callable[[str], LoadedModel], damage: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    loaded = models("qwen3-moe-even")
    file, edits = _edits(loaded, "w4a16-g32", "w4a16-g32")
    compressed_tensors.export(tmp_path / "ct", loaded, file, edits)
    path = tmp_path / "ct" / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    result = _verified("compressed-tensors", tmp_path / "ct", loaded, edits)
    assert not result.ok and "do not decode to the evaluated weights" in result.message and "\n" not in result.message


def test_parts_cover_every_row_once() -> None:
    rows: dict[str, list[float]] = {}
    for part in experts.parts(tiny_model("mixtral")):
        rows.setdefault(part.layer, []).extend((part.start, part.stop))
    assert len(rows) == 3 * 4 * 2
    assert {tuple(sorted(shares)) for shares in rows.values()} == {(0.0, 0.5, 0.5, 1.0), (0.0, 1.0)}
    assert experts.pattern("a.12.b.3.w1") == r"a\.\d+\.b\.\d+\.w1$"
