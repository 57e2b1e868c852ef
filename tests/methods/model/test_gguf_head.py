"""Output projections stored apart: tied again where they are the embedding rounded otherwise, left alone where they are not."""

from __future__ import annotations

import gguf
import pytest
import torch

from methods.model.gguf_head import equal_within_grids
from methods.model.load import load
from methods.model.trace import logits_of
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model, tiny_tokens

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16", "F16")


def _rounded(weight, kind):
    stored = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).copy())


def _matrix(seed):
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_two_roundings_of_one_matrix_are_equal(first, second):
    weight = _matrix(0)
    assert equal_within_grids(_rounded(weight, first), _rounded(weight, second), (first, second))


@pytest.mark.parametrize(("kinds", "noise"), [(("Q4_0", "Q8_0"), 0.08), (("Q8_0", "Q8_0"), 0.02), (("F16", "F16"), 0.001)])
def test_a_head_that_was_trained_on_is_another_matrix(kinds, noise):
    """Noise of some percent is told apart, the finer the grids the less."""
    weight = _matrix(0)
    other = weight + noise * _matrix(1)
    assert not equal_within_grids(_rounded(weight, kinds[0]), _rounded(other, kinds[1]), kinds)


@pytest.mark.parametrize(("embedding", "head"), [("Q4_0", "Q8_0"), ("Q8_0", "Q4_0"), ("F16", "F16")])
def test_an_equal_head_is_tied_again(embedding, head, tmp_path):
    kinds = {"token_embd.weight": embedding, "output.weight": head}
    model = tiny_model("qwen2")
    original = model.model.embed_tokens.weight.data.clone()
    output = original.numpy().copy()
    write_gguf(tmp_path / "tiny.gguf", model, lambda name: kinds.get(name, "F16"), tensors={"output.weight": output})
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert loaded.structure.tied
    assert loaded.model.config.tie_word_embeddings is True
    assert loaded.structure.n_parameters == sum(p.numel() for p in model.parameters())
    (note,) = loaded.notes
    assert f"embedding ({embedding})" in note
    assert f"output projection ({head})" in note
    assert "12,288 parameters" in note
    finer = max(embedding, head, key=KINDS.index)
    assert torch.equal(loaded.model.get_input_embeddings().weight, _rounded(original, finer).half().float())


def test_a_head_of_its_own_stays(tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen3"), lambda name: "F32")
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert not loaded.structure.tied
    assert loaded.notes == ()
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), logits_of(model, tiny_tokens()), atol=1e-5)
