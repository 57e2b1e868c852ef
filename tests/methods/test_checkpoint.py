"""Compressed checkpoints: everything comes back bit for bit, and nothing that was damaged is loaded."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import checkpoint, policy_file
from methods.apply import Installer
from methods.checkpoint import CorruptCheckpoint, load_dense, read
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed
from methods.formats.sides import columns
from methods.method import Edit
from methods.model.load import CompressedCheckpoint, LoadedModel, load
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from methods.quant.minmax import minmax as fit
from methods.quant.nearest import nearest
from tests.edits import edits_of, loaded_tiny, minmax
from tests.tiny import tiny_tokens

FORMATS = ("w4a8-g16-asym", "w3a16-g16", "w8a8-token", "w2a8-g16-asym", "w4a16")


def _compressed(loaded: LoadedModel) -> tuple[PolicyFile, dict[str, Edit]]:
    """All formats in turn, every fifth site left dense, and one site with a replaced norm."""
    sites = [site for index, site in enumerate(loaded.structure.sites) if index % 5 != 4]
    formats = {site.name: FORMATS[index % len(FORMATS)] for index, site in enumerate(sites)}
    policy, edits = edits_of(loaded.model, loaded.structure, formats)
    first = next(site for site in sites if site.norm)
    norm = loaded.model.get_parameter(f"{first.norm}.weight")
    edits[first.name] = Edit(edits[first.name].linears, {f"{first.norm}.weight": norm.data * 1.2345678})
    return PolicyFile(policy, id="test", provenance={"seed": 0}), edits


def _same(a: Edit, b: Edit) -> bool:
    if a.linears.keys() != b.linears.keys() or a.tensors.keys() != b.tensors.keys():
        return False
    pairs = [(a.tensors[name], b.tensors[name]) for name in a.tensors]
    for name, compressed in a.linears.items():
        other = b.linears[name]
        if compressed.format != other.format or compressed.payload.keys() != other.payload.keys():
            return False
        pairs.append((compressed.dense, other.dense))
        pairs += [(compressed.payload[part], other.payload[part]) for part in compressed.payload]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("arch", ["llama", "llama-untied", "neox", "gpt2", "qwen3-moe"])
def test_comes_back_bit_for_bit(tmp_path: Path, arch: str) -> None:
    loaded = loaded_tiny(tmp_path, arch)
    file, edits = _compressed(loaded)
    ids = tiny_tokens()
    folder = tmp_path / "out" / "ckpt"
    with Installer(loaded.model, loaded.structure) as installer, torch.inference_mode():
        for site, edit in edits.items():
            installer.install(site, edit)
        expected = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        logits = loaded.model(ids).logits
        checkpoint.write(folder, loaded, file, edits, {"commit": "abc"})

    stored = read(folder)
    assert stored.edits.keys() == edits.keys()
    assert all(_same(edits[site], stored.edits[site]) for site in edits)
    assert stored.marker["meta"] == {"commit": "abc"}

    back = load_dense(folder)
    assert back.structure == loaded.structure
    assert policy_file.parse(stored.policy_text, back.structure) == file
    state = back.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not back.model.training
    with Installer(back.model, back.structure) as installer, torch.inference_mode():
        for site, edit in stored.edits.items():
            installer.install(site, edit)
        assert torch.equal(back.model(ids).logits, logits)
    assert back.tokenizer("the quick fox")["input_ids"] == loaded.tokenizer("the quick fox")["input_ids"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def folder(tmp_path: Path, tiny: LoadedModel) -> Path:
    file, edits = _compressed(tiny)
    checkpoint.write(tmp_path / "ckpt", tiny, file, edits)
    return tmp_path / "ckpt"


def test_other_grids_and_what_stands_beside_them_come_back(tmp_path: Path, tiny: LoadedModel) -> None:
    names = itertools.cycle(["nvfp4a4", "nf4a16-g16-dq", "lut3a16", "bcq2a16-g16-asym", "w4a16-g16-u6", "e4m3a16-b16x16"])
    formats = {site.name: name for site, name in zip(tiny.structure.sites, names, strict=False)}
    edits = {}
    for site in tiny.structure.sites:
        fmt, linears = parse_format(formats[site.name]), {}
        for layer in site.layers:
            weight = tiny.model.get_parameter(f"{layer.name}.weight").data.float()
            kept = columns(weight, torch.tensor([1, 5]))
            linears[layer.name] = Compressed.of(fmt, {**nearest(weight, fmt, fit(weight, fmt)), **kept})
        edits[site.name] = Edit(linears)
    policy = Policy({name: (Decision.of("rtn", format=text),) for name, text in formats.items()})
    checkpoint.write(tmp_path / "ckpt", tiny, PolicyFile(policy), edits)
    stored = read(tmp_path / "ckpt")
    assert all(_same(edits[site], stored.edits[site]) for site in edits)
    assert policy_file.parse(stored.policy_text, tiny.structure).policy == policy


def test_payload_takes_the_bits_of_its_formats(tmp_path: Path, tiny: LoadedModel) -> None:
    sites = {site.name: "w3a16-g32" for site in tiny.structure.sites}
    policy, edits = edits_of(tiny.model, tiny.structure, sites)
    checkpoint.write(tmp_path / "ckpt", tiny, PolicyFile(policy), edits)
    size = (tmp_path / "ckpt" / "payload.safetensors").stat().st_size
    fmt = parse_format("w3a16-g32")
    bits = sum(fmt.bits_per_weight(layer.d_in) * layer.d_in * layer.d_out for _, layer in tiny.structure.layers())
    n_entries = 2 * sum(1 for _ in tiny.structure.layers())
    assert 0 < size - bits / 8 < 150 * n_entries
    rest = (tmp_path / "ckpt" / "model.safetensors").stat().st_size
    n_rest = tiny.structure.n_parameters - sum(layer.d_in * layer.d_out for _, layer in tiny.structure.layers())
    assert n_rest * 2 < rest < n_rest * 2 + 4000


def test_a_tensor_that_the_dtype_cannot_hold_is_kept_as_it_is() -> None:
    exact, inexact = torch.tensor([1.5, -2.0]), torch.tensor([1.0 + 2**-12, 0.0])
    assert checkpoint.narrow(exact, "bf16").dtype == torch.bfloat16
    assert torch.equal(checkpoint.narrow(inexact, "bf16"), inexact)
    assert checkpoint.narrow(torch.arange(3), "bf16").dtype == torch.int64


@pytest.mark.parametrize("name", ["model.safetensors", "payload.safetensors", "policy.yaml", "config.json", "tokenizer.json"])
def test_a_changed_or_missing_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=f"{name} was changed after it was written") as error:
        load_dense(folder)
    assert "\n" not in str(error.value)
    (folder / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{name} is missing"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda marker: marker["meta"].update(x=1), "was changed after it was written"),
        (lambda marker: marker["sites"].popitem(), "was changed after it was written"),
        (lambda marker: marker.update(schema="isolatency-checkpoint/2"), "this version reads isolatency-checkpoint/1 only"),
        (lambda marker: marker.clear(), "schema=None"),
    ],
)
def test_a_changed_marker_is_refused(folder: Path, change: object, reason: str) -> None:
    path = folder / checkpoint.MARKER
    marker = json.loads(path.read_text())
    change(marker)  # type: ignore[operator]
    path.write_text(json.dumps(marker))
    with pytest.raises(CorruptCheckpoint, match=reason):
        read(folder)


def test_a_foreign_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"is not a compressed checkpoint: it has no isolatency\.json"):
        read(tmp_path)
    (folder / checkpoint.MARKER).write_text("{")
    with pytest.raises(CorruptCheckpoint, match="not JSON"):
        read(folder)
    with pytest.raises(CompressedCheckpoint):
        load(str(folder), tmp_path)


def test_another_structure_is_refused(folder: Path) -> None:
    path = folder / checkpoint.MARKER
    marker = json.loads(path.read_text())
    marker["structure"] = "0" * 64
    marker["digest"] = checkpoint._marker_digest(marker)
    path.write_text(json.dumps(marker))
    with pytest.raises(CorruptCheckpoint, match="another structure"):
        load_dense(folder)


def test_edits_have_to_be_what_the_policy_decides(tmp_path: Path, tiny: LoadedModel) -> None:
    file, edits = _compressed(tiny)
    site = tiny.structure.sites[0]
    layer = site.layers[1].name
    weight = edits[site.name].linears[layer].dense
    other = Edit({**edits[site.name].linears, layer: minmax(weight, parse_format("w8a16"))})
    partial = Edit({name: c for name, c in edits[site.name].linears.items() if name != layer})
    missing = {name: edit for name, edit in edits.items() if name != site.name}
    for wrong in ({**edits, site.name: other}, {**edits, site.name: partial}, missing):
        with pytest.raises(ValueError, match="the policy decides"):
            checkpoint.write(tmp_path / "ckpt", tiny, file, wrong)
    with pytest.raises(ValueError, match="the policy decides no format"):
        checkpoint.write(tmp_path / "ckpt", tiny, dataclasses.replace(file, policy=Policy()), edits)
    assert not (tmp_path / "ckpt").exists()


def test_all_or_nothing(tmp_path: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    file, edits = _compressed(tiny)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path / "out" / "ckpt", tiny, file, edits)
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_overwritten(folder: Path, tiny: LoadedModel) -> None:
    before = sorted(path.name for path in folder.iterdir())
    file, edits = _compressed(tiny)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        checkpoint.write(folder, tiny, file, edits)
    assert sorted(path.name for path in folder.iterdir()) == before
    read(folder)


def test_a_checkpoint_that_does_not_read_back_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_tiny(tmp_path, "llama")
    file, edits = _compressed(loaded)
    read_linear = checkpoint._read_linear

    def other(*arguments: Any) -> Compressed:
        found = read_linear(*arguments)
        return dataclasses.replace(found, dense=found.dense + 1)

    with monkeypatch.context() as changed:
        changed.setattr(checkpoint, "_read_linear", other)
        with pytest.raises(ValueError, match=r"does not read back as what was evaluated: .* decodes to other weights"):
            checkpoint.write(tmp_path / "out", loaded, file, edits)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    checkpoint.write(tmp_path / "out", loaded, file, edits)


@pytest.mark.parametrize("arch", ["llama", "llama-untied"])
def test_a_checkpoint_whose_config_ties_otherwise_is_not_there(tmp_path: Path, arch: str) -> None:
    """It could not be opened again: the head would be another one than the judged."""
    loaded = loaded_tiny(tmp_path, arch)
    file, edits = _compressed(loaded)
    loaded.model.config.tie_word_embeddings = not loaded.structure.tied
    with pytest.raises(ValueError, match=r"its config\.json makes the head (a tensor of its own|the embedding)"):
        checkpoint.write(tmp_path / "out", loaded, file, edits)
    assert [path.name for path in tmp_path.iterdir()] == [arch]


def test_only_a_sound_checkpoint_of_the_same_weights_is_one(tmp_path: Path) -> None:
    loaded = loaded_tiny(tmp_path, "llama")
    file, edits = _compressed(loaded)
    folder = tmp_path / "out"
    checkpoint.write(folder, loaded, file, edits)
    assert checkpoint.problem(folder, edits) == ""
    name, edit = next((name, edit) for name, edit in edits.items() if edit.linears)
    layer, compressed = next(iter(edit.linears.items()))
    nudged = {**compressed.payload, "scale": compressed.payload["scale"] * 2}
    other = {**edits, name: Edit({**edit.linears, layer: Compressed.of(compressed.format, nudged)}, edit.tensors)}
    assert "holds other weights" in checkpoint.problem(folder, other)
    (folder / "config.json").unlink()
    assert checkpoint.problem(folder, edits) == f"{folder / 'config.json'} is missing"
    assert "is not a compressed checkpoint" in checkpoint.problem(tmp_path, edits)
