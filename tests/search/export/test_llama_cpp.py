"""What llama.cpp is asked: probabilities of the step that is meant, also where the likeliest token is a part of a character."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.apply import Installer
from methods.model.load import load
from search.export.gguf import export
from search.export.gguf_layout import MODEL
from search.export.gguf_verify import verify
from search.export.llama_cpp import LlamaCpp
from search.export.verification import predictions
from tests.search.export.wide import compressed
from tests.tiny import seeded, tiny_config

N_VOCAB = 272
STARTS = range(0xC2, 0xF5)
"""Bytes that begin a character of two to four bytes."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def _bytes_tokenizer() -> Any:
    """Byte-level BPE over all 256 bytes, as published models have it: `tiny_tokenizer` knows ASCII alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the rain in the plain and the fox again and again"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _save(folder: Path) -> set[int]:
    """A Llama, tied by its configuration, whose file holds a head of its own that likes bytes which begin a character; their ids."""
    from transformers import AutoModelForCausalLM

    tokenizer = _bytes_tokenizer()
    # A byte-level vocabulary writes these bytes as Latin-1 does.
    starts = {token for token in range(3, 259) if tokenizer.backend_tokenizer.id_to_token(token) in map(chr, STARTS)}
    config = tiny_config("llama")
    config.vocab_size = N_VOCAB
    with seeded(0):
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    head[sorted(starts)] *= 1.25
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return starts


def test_the_likeliest_token_may_begin_a_character(tmp_path: Path) -> None:
    starts = _save(tmp_path / "model")
    assert len(starts) == len(STARTS)
    loaded = load(str(tmp_path / "model"), tmp_path / "cache")
    assert not loaded.structure.tied
    file, edits = compressed(loaded, ("w8a16-g32",))
    export(tmp_path / "gguf", loaded, file, edits)
    ids = torch.randint(3, N_VOCAB, (2, 33), generator=torch.Generator().manual_seed(1))
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        log_p = predictions(loaded.model, ids[:1])[0].log_softmax(-1)
        checked = verify(tmp_path / "gguf", loaded.model, ids)
    assert checked.ok, checked.message
    assert "llama.cpp of" in checked.message

    likeliest = [int(token) for token in log_p.argmax(-1)]
    assert 8 < sum(token in starts for token in likeliest) < len(likeliest)
    found = LlamaCpp(tmp_path / "gguf" / MODEL, 64, N_VOCAB).predictions(ids[0].tolist())
    for expected, own in zip(log_p, found, strict=True):
        # Two steps are nats apart; rounded inputs, keys and values are not.
        assert max(abs(float(expected[token]) - value) for token, value in own.items()) < 0.5
