"""GGUF files: read right, converted once, moved off their grid; damaged ones refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from methods.model.baseline import detect_grids, float_offset_error
from methods.model.describe import describe
from methods.model.gguf import UnreadableGGUF, convert, label
from methods.model.gguf_header import Header
from methods.model.load import load
from methods.model.trace import logits_of
from methods.model.weights import weight_of
from search.cache import _model
from tests.gguf_files import add_tokenizer, write_gguf
from tests.tiny import seeded, tiny_model, tiny_tokenizer, tiny_tokens


def _linears(kind):
    """Matrices of the blocks in one type, embedding and head as floats."""
    return lambda name: kind if name.startswith("blk") else "F32"


def write_tiny(path, arch="llama", kind="Q4_1", damage=None, **options):
    """Writes a tiny model, with a NaN in the parameter `damage`; returns it with the weights as the file holds them."""
    model = tiny_model(arch)
    if damage:
        model.get_parameter(damage).data.view(-1)[7] = float("nan")
    return write_gguf(path, model, _linears(kind), **options)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_function_is_that_of_the_file(arch, tmp_path):
    """Stored as floats there is no grid to leave: logits are those of the weights that were written."""
    model = write_tiny(tmp_path / "tiny.F32.gguf", arch, "F32")
    loaded = load(str(tmp_path / "tiny.F32.gguf"), tmp_path / "cache")
    assert (loaded.label, loaded.notes, loaded.structure.dtype) == ("tiny", (), "fp32")
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(model, tiny_tokens()), atol=1e-5)
    text = "the quick fox"
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == tiny_tokenizer()(text).input_ids


@pytest.mark.parametrize(("arch", "kind"), [("llama", "Q4_1"), ("llama", "Q4_0"), ("llama", "Q8_0"), ("qwen2", "Q4_1")])
def test_low_bit_files_leave_their_grid(arch, kind, tmp_path):
    model = write_tiny(tmp_path / f"tiny.{kind}.gguf", arch, kind)
    (grid,) = detect_grids(model, describe(model))
    loaded = load(str(tmp_path / f"tiny.{kind}.gguf"), tmp_path / "cache")
    assert loaded.label == f"tiny, dequantised from {kind}"
    assert f"100% lie on a grid of {grid.bits} bits ({kind})" in loaded.notes[0]
    assert loaded.structure.dtype == "bf16"
    errors = [float_offset_error(weight_of(loaded.model.get_submodule(layer.name))) for _, layer in loaded.structure.layers()]
    assert min(errors) > 0.07
    expected = logits_of(model, tiny_tokens())
    # All that is left is the rounding to bf16.
    assert (logits_of(loaded.model, tiny_tokens()) - expected).abs().max() < 0.03 * expected.abs().max()


def test_it_is_converted_once_and_silently(tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    capfd.readouterr()
    log: list[str] = []
    first = load(str(path), tmp_path / "cache", log=log.append)
    again = load(str(path), tmp_path / "cache", log=log.append)
    assert len(log) == 1
    assert capfd.readouterr() == ("", "")
    assert first.digest == again.digest
    assert first.notes == again.notes != ()
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_conversion_that_was_damaged_is_made_again(name, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    log: list[str] = []
    first = load(str(path), tmp_path / "cache", log=log.append)
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    whole = (folder / name).read_bytes()
    damaged = bytearray(whole)
    damaged[-20] ^= 1
    (folder / name).write_bytes(damaged)
    assert "is damaged" in _model(folder)
    again = load(str(path), tmp_path / "cache", log=log.append)
    assert again.digest == first.digest and (folder / name).read_bytes() == whole and not _model(folder)
    assert f"{name} was changed after it was written" in log[1] and len(log) == 3
    assert list((tmp_path / "cache" / "models").iterdir()) == [folder]


def test_damage_is_found(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    (tmp_path / "noise.gguf").write_bytes(b"this is no model" * 99)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:60_000])
    (tmp_path / "header.gguf").write_bytes(path.read_bytes()[:200])
    for name in ("noise", "empty", "short", "header"):
        with pytest.raises(UnreadableGGUF, match=rf"{name}\.gguf: not a readable GGUF"):
            convert(tmp_path / f"{name}.gguf", tmp_path / "cache", str)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": False}, "no tokenizer"),
        ({"damage": "model.layers.1.input_layernorm.weight"}, r"model\.layers\.1\.input_layernorm\.weight holds NaN"),
        (
            {"without": ("blk.2.ffn_up.weight",)},
            r"weights for model\.layers\.2\.mlp\.up_proj\.weight are missing",
        ),
    ],
)
def test_incomplete_files_are_refused(options, message, tmp_path):
    write_tiny(tmp_path / "tiny.gguf", **options)
    with pytest.raises(UnreadableGGUF, match=message) as refusal:
        convert(tmp_path / "tiny.gguf", tmp_path / "cache", str)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("cache/models/*"))


def test_an_unknown_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "rwkv6")
    add_tokenizer(writer)
    writer.add_tensor("token_embd.weight", torch.zeros(128, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnreadableGGUF, match="rwkv6"):
        convert(tmp_path / "new.gguf", tmp_path / "cache", str)


MIXES = {
    # Weights of a tiny llama's linears: attention 3 * 27,648, MLP 3 * 46,080, so 37.5 % and 62.5 %; down is 20.8 %, v 6.25 %.
    "few": (
        lambda name: "Q4_0" if "attn_v" in name else "F16",
        "6% lie on a grid of 4 bits (Q4_0), which",
        "tiny, dequantised from F16+Q4_0",
    ),
    "most": (
        lambda name: "Q4_0" if "ffn" in name else "F16",
        "62% lie on a grid of 4 bits (Q4_0), which",
        "tiny, dequantised from Q4_0+F16",
    ),
    "two": (
        lambda name: "Q4_1" if "ffn_down" in name else "Q5_0" if "ffn" in name else "Q8_0",
        "21% lie on a grid of 4 bits (Q4_1), 42% on a grid of 5 bits (Q5_0), 38% on a grid of 8 bits (Q8_0), which",
        "tiny, dequantised from Q5_0+Q8_0+Q4_1",
    ),
}


@pytest.mark.parametrize("mix", MIXES)
def test_one_linear_on_a_grid_moves_all(mix, tmp_path):
    kinds, told, label = MIXES[mix]
    model = write_gguf(
        tmp_path / "tiny.gguf", tiny_model("llama"), lambda name: kinds(name) if name.startswith("blk") else "F16"
    )
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert told in loaded.notes[0]
    assert loaded.label == label
    assert loaded.structure.dtype == "bf16"
    assert detect_grids(loaded.model, loaded.structure) == ()
    names = {layer.name: layer for _, layer in loaded.structure.layers()}
    assert not any(
        torch.equal(weight_of(loaded.model.get_submodule(n)), weight_of(model.get_submodule(n)).bfloat16()) for n in names
    )


@pytest.mark.parametrize(
    ("file_type", "kinds", "told"),
    [
        (3, lambda name: "Q4_1", "Q4_1"),
        (15, lambda name: "Q8_0", "Q8_0"),
        (8, lambda name: "Q5_0" if "ffn" in name else "Q4_1", "Q5_0"),
        (3, lambda name: "Q5_0" if "ffn" in name else "Q4_1", "Q5_0+Q4_1"),
        (1, lambda name: "Q4_0" if "ffn_up" in name else "F16", "F16+Q4_0"),
        (1024, lambda name: "Q4_0", "Q4_0"),
        (777, lambda name: "Q4_0", "Q4_0"),
    ],
)
def test_the_label_names_what_is_in_the_file(file_type, kinds, told, tmp_path):
    """`general.file_type` is believed where the linears are of that type: 3 is Q4_1, 8 Q5_0, 15 Q4_K_M, 1 F16."""
    path = tmp_path / "tiny-Q4_K_M.gguf"
    changed = {"general.file_type": file_type}
    write_gguf(path, tiny_model("llama"), lambda name: kinds(name) if name.startswith("blk") else "F32", changed=changed)
    assert load(str(path), tmp_path / "cache").label == f"tiny, dequantised from {told}"


def test_a_mix_keeps_its_name_where_its_type_occurs():
    """Rows that are no multiple of 256 get other types in a Q4_K_M: it is one nevertheless."""
    header = Header(Path("small.Q4_K_M.gguf"), "llama", {"general.file_type": 15}, {}, {})
    assert label(header, Counter({"Q5_0": 72, "Q4_K": 21, "Q8_0": 7})) == "small, dequantised from Q4_K_M"
    assert label(header, Counter({"Q5_0": 93, "Q8_0": 7})) == "small, dequantised from Q5_0+Q8_0"


def test_experts_have_the_types_of_their_fused_tensors(tmp_path):
    """Gate and up are one linear of an expert, stored as two tensors: the coarser type counts."""
    sizes = {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "num_hidden_layers": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "norm_topk_prob": True}
    with seeded(0):
        model = (
            AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=128, **sizes, **experts)).eval().requires_grad_(False)
        )
    types = {"ffn_gate_exps": "Q4_1", "ffn_up_exps": "Q8_0", "ffn_down_exps": "Q5_0"}
    write_gguf(tmp_path / "tiny.gguf", model, lambda name: types.get(name.split(".")[-2], "F16"))
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    weights = Counter({"q": 6144, "kv": 6144, "o": 6144, "gate_up": 16384, "down": 8192})
    shares = [f"{weights[part] / weights.total():.0%}" for part in ("gate_up", "down")]
    assert f"{shares[0]} lie on a grid of 4 bits (Q4_1), {shares[1]} on a grid of 5 bits (Q5_0), which" in loaded.notes[0]
    assert detect_grids(loaded.model, loaded.structure) == ()
