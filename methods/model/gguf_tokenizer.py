"""A GGUF's tokenizer as transformers builds it: what of the metadata that leaves out is put right, or told."""

from __future__ import annotations

from typing import Any

from methods.model.gguf_header import Header

SPLITS_OF_GPT2 = ("gpt-2", "default", "phi-2", "mpt", "olmo", "smollm", "starcoder", "refact", "command-r", "codeshell")
"""Pre-tokenizers that cut as GPT-2's does, transformers' own default, but for digits, which no merge of such a vocabulary joins."""

SPACE = "▁"
"""What stands for a space in SentencePiece's vocabularies."""


def follow_(tokenizer: Any, header: Header) -> list[str]:
    """Makes the tokenizer follow the file's flag for a first space, in place; returns what it does not follow, in plain words."""
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _first_space(tokenizer, header.metadata.get("tokenizer.ggml.add_space_prefix"))
    return _splits(header.metadata.get("tokenizer.ggml.pre")) if kind == "gpt2" else []


def _first_space(tokenizer: Any, wanted: bool | None) -> list[str]:
    from tokenizers import decoders, pre_tokenizers

    if wanted is None or wanted == _has_first_space(tokenizer):
        return []
    backend = tokenizer.backend_tokenizer
    if not wanted and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
        # transformers' decoder takes a first space away, which is now one of the text.
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if wanted == _has_first_space(tokenizer):
        return []
    return [
        f"the file's tokenizer says add_space_prefix={wanted}, which transformers does not follow: a text's first token may differ"
    ]


def _has_first_space(tokenizer: Any) -> bool:
    return any(token.startswith(SPACE) for token in tokenizer.tokenize("a")[:1])


def _splits(pre: str | None) -> list[str]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre is None or pre in GGUF_PRE_TOKENIZER_SPLITS or pre in SPLITS_OF_GPT2:
        return []
    return [
        f"the file's pre-tokenizer {pre!r} is not one that transformers knows: texts may be cut into other tokens than meant"
    ]
