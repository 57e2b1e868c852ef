"""GGUF files: read right, converted once, moved off their grid; damaged ones refused."""

from __future__ import annotations

import json

import gguf
import pytest
import torch

from methods.model.baseline import detect_grid, float_offset_error
from methods.model.describe import describe
from methods.model.gguf import UnreadableGGUF, convert
from methods.model.load import load
from methods.model.trace import logits_of
from methods.model.weights import weight_of
from tests.gguf_names import gguf_name
from tests.tiny import tiny_model, tiny_tokenizer, tiny_tokens


def _interleaved(rows, n_heads):
    """The order in which llama.cpp keeps the rows of q and k: the halves of each head interleaved, for its kind of rotation."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, arch="llama", kind=gguf.GGMLQuantizationType.Q4_1, tokenizer=True, damage=None, without=()):
    """Writes a tiny model; returns it with the weights as the file holds them."""
    model = tiny_model(arch)
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2" if arch == "qwen2" else "llama")
    writer.add_name(f"tiny {arch}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        _add_tokenizer(writer)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        value = parameter.data.numpy().copy()
        if name == damage:
            value.flat[7] = float("nan")
        linear = value.ndim == 2 and "layers" in name
        stored = gguf.quants.quantize(value, kind) if linear else value
        parameter.data = torch.from_numpy(gguf.quants.dequantize(stored, kind).copy() if linear else value.copy())
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            stored = _interleaved(stored, heads)
        if name not in without and not (tied and name == "lm_head.weight"):
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if linear else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer):
    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in data["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_function_is_that_of_the_file(arch, tmp_path):
    """Stored as floats there is no grid to leave: logits are those of the weights that were written."""
    model = write_gguf(tmp_path / "tiny.F32.gguf", arch, gguf.GGMLQuantizationType.F32)
    loaded = load(str(tmp_path / "tiny.F32.gguf"), tmp_path / "cache")
    assert (loaded.label, loaded.notes, loaded.structure.dtype) == ("tiny", (), "fp32")
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(model, tiny_tokens()), atol=1e-5)
    text = "the quick fox"
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == tiny_tokenizer()(text).input_ids


@pytest.mark.parametrize(("arch", "kind"), [("llama", "Q4_1"), ("llama", "Q4_0"), ("llama", "Q8_0"), ("qwen2", "Q4_1")])
def test_low_bit_files_leave_their_grid(arch, kind, tmp_path):
    model = write_gguf(tmp_path / f"tiny.{kind}.gguf", arch, gguf.GGMLQuantizationType[kind])
    grid = detect_grid(model, describe(model))
    assert grid is not None
    loaded = load(str(tmp_path / f"tiny.{kind}.gguf"), tmp_path / "cache")
    assert loaded.label == f"tiny, dequantised from {kind}"
    assert f"{grid.bits}-bit grid ({kind})" in loaded.notes[0]
    assert loaded.structure.dtype == "bf16"
    errors = [float_offset_error(weight_of(loaded.model.get_submodule(layer.name))) for _, layer in loaded.structure.layers()]
    assert min(errors) > 0.07
    expected = logits_of(model, tiny_tokens())
    # All that is left is the rounding to bf16.
    assert (logits_of(loaded.model, tiny_tokens()) - expected).abs().max() < 0.03 * expected.abs().max()


def test_it_is_converted_once_and_silently(tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    capfd.readouterr()
    log: list[str] = []
    first = load(str(path), tmp_path / "cache", log=log.append)
    again = load(str(path), tmp_path / "cache", log=log.append)
    assert len(log) == 1
    assert capfd.readouterr() == ("", "")
    assert first.digest == again.digest
    assert first.notes == again.notes != ()
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_damage_is_found(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
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
            {"without": ("model.layers.2.mlp.up_proj.weight",)},
            r"weights for model\.layers\.2\.mlp\.up_proj\.weight are missing",
        ),
    ],
)
def test_incomplete_files_are_refused(options, message, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(UnreadableGGUF, match=message) as refusal:
        convert(tmp_path / "tiny.gguf", tmp_path / "cache", str)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("cache/models/*"))


def test_an_unknown_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "rwkv6")
    _add_tokenizer(writer)
    writer.add_tensor("token_embd.weight", torch.zeros(128, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnreadableGGUF, match="rwkv6"):
        convert(tmp_path / "new.gguf", tmp_path / "cache", str)
