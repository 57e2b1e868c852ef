"""Tokenizers of GGUF files: the flag for a first space is followed, a pre-tokenizer that is not known is told."""

from __future__ import annotations

import pytest

from methods.model.load import load
from tests.gguf_files import write_gguf
from tests.tiny import VOCABULARY, tiny_model

PIECES = ["<unk>", "<s>", "</s>", *"▁abc", "▁a", "▁b", "ab", "▁ab"]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES + [f"[{index}]" for index in range(VOCABULARY - len(PIECES))],
    "tokenizer.ggml.scores": [-float(index) for index in range(VOCABULARY)],
    "tokenizer.ggml.token_type": [2, 3, 3, *(VOCABULARY - 3) * [1]],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.mark.parametrize(
    ("flag", "pieces", "again"),
    [(None, ["▁ab", "▁ab"], "ab ab"), (True, ["▁ab", "▁ab"], "ab ab"), (False, ["ab", "▁ab"], "ab ab")],
)
def test_the_first_space_is_the_files(flag, pieces, again, tmp_path):
    changed = SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": flag}
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), changed=changed, tokenizer=False)
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert loaded.notes == ()
    assert loaded.tokenizer.tokenize("ab ab") == pieces
    assert loaded.tokenizer.decode(loaded.tokenizer("ab ab").input_ids) == again


def test_a_space_of_the_text_is_kept_where_none_is_added(tmp_path):
    changed = SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": False}
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), changed=changed, tokenizer=False)
    tokenizer = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache").tokenizer
    assert tokenizer.decode(tokenizer(" ab").input_ids) == " ab"


@pytest.mark.parametrize(("pre", "told"), [("smollm", False), ("qwen2", False), ("deepseek-llm", True)])
def test_a_pre_tokenizer_that_is_not_known_is_told(pre, told, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), pre=pre)
    notes = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache").notes
    assert [f"pre-tokenizer {pre!r}" in note for note in notes] == ([True] if told else [])
