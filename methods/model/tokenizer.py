"""A model's tokenizer: beside the weights, or absent; everything but text works without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.tiktoken")


def read_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a model folder, None where it holds no tokenizer's files; raises as transformers does where they are bad."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def write_tokenizer(tokenizer: Any | None, folder: Path) -> None:
    """Writes the tokenizer's files, none where there is no tokenizer."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
