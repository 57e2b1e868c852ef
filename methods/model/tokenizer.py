"""A model's tokenizer: beside the weights, or absent; everything but text works without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

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


class UnknownToken(ValueError):
    """Text with a token that the model has no embedding for; says which, and how many it has."""


def beyond_embedding(tokenizer: Any, model: Any) -> str:
    """A line on a tokenizer that makes tokens without an embedding of plain text, "" where it makes none.

    Special tokens are left out (published models have some for images, say), and a note is no refusal: most text holds none of either.
    """
    rows, added = n_embeddings(model), tokenizer.added_tokens_decoder
    beyond = sorted(
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and not (index in added and added[index].special)
    )
    if not beyond:
        return ""
    index, token = beyond[0]
    return (
        f"the tokenizer has {len(beyond)} token{'s' if len(beyond) > 1 else ''} beyond the {rows} rows of the embedding, {token!r} with "
        f"the id {index} first: text that holds one of them is refused"
    )


def n_embeddings(model: Any) -> int:
    """Rows of the input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_ids(ids: Tensor, model: Any, tokenizer: Any, what: str) -> None:
    """Raises UnknownToken where token ids go beyond the model's embedding; what: where they come from, for the message."""
    rows, largest = n_embeddings(model), int(ids.max()) if ids.numel() else 0
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UnknownToken(
            f"{what} holds the token {token!r} with the id {largest}, and the model's embedding has {rows} rows; "
            "take it out, or give a model whose embedding was resized to the tokenizer"
        )


@contextlib.contextmanager
def checked_ids(model: Any, tokenizer: Any, what: str) -> Iterator[None]:
    """Inside, `check_ids` stands before the model's embedding: for text that something else turns into ids."""

    def check(_: Any, arguments: tuple[Tensor, ...]) -> None:
        check_ids(arguments[0], model, tokenizer, what)

    handle = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
