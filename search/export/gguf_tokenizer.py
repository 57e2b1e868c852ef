"""A tokenizer as GGUF metadata: byte-level BPE, which llama.cpp splits into words by the name of a rule and not by a pattern."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""`llama_token_type`s."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_LETTERS}\p{{N}}{_REST}"
LLAMA3 = rf"{_LETTERS}\p{{N}}{{1,3}}{_REST}"
"""The patterns by which the tokenizers of these families split words, digits one by one or by three."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF holds of a tokenizer.

    pre: the name of the word-splitting rule; tokens, types: one for every row of the embedding; merges: pairs joined by a space;
    special: token ids by role (`bos`, `eos`, `unk`, `pad`); starts, ends: whether encoding adds `bos` and `eos`.
    """

    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    special: Mapping[str, int]
    starts: bool
    ends: bool
    chat_template: str | None


def vocabulary(tokenizer: Any, n_vocab: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer for an embedding of `n_vocab` rows; rows without a token become unused ones.

    Raises ValueError, with the reason, for a tokenizer that llama.cpp could not repeat: other than byte-level BPE, or with a rule
    for words that it does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("a GGUF holds the tokenizer, and this model has no fast one; add tokenizer.json to its folder")
    description = json.loads(backend.to_str())
    pre = _rule(description)
    ids = tokenizer.get_vocab()
    tokens = [f"[PAD{index}]" for index in range(n_vocab)]
    types = [UNUSED] * n_vocab
    for token, index in ids.items():
        if index >= n_vocab:
            raise ValueError(f"token {token!r} has the id {index}, but the model has {n_vocab} embeddings")
        tokens[index], types[index] = token, NORMAL
    for entry in description["added_tokens"]:
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    special = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    around = tokenizer("a")["input_ids"]
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        pre,
        tokens,
        types,
        [pair if isinstance(pair, str) else " ".join(pair) for pair in description["model"]["merges"]],
        {role: index for role, index in special.items() if index is not None},
        around[0] == special["bos"],
        around[-1] == special["eos"],
        template if isinstance(template, str) else (template or {}).get("default"),
    )


def _rule(description: Mapping[str, Any]) -> str:
    """The name of the rule by which a tokenizer's description splits words."""
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']} with bytes as a fallback" if model.get("byte_fallback") else model["type"]
        raise ValueError(f"the tokenizer is {kind}; only byte-level BPE is written to GGUF here")
    steps = description["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    name = _known(steps)
    # llama.cpp's rule for Llama 3 takes a word that is a token as it is, the others always merge.
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe") or normalizer not in (None, {"type": "NFC"}):
        kinds = " + ".join(step["type"] for step in steps)
        raise ValueError(
            f"llama.cpp knows no rule that splits text as this tokenizer does ({kinds}); such a GGUF would read other tokens"
        )
    return name


def _known(steps: Sequence[Mapping[str, Any]]) -> str | None:
    first, last = steps[0], steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        return None
    if len(steps) == 1:
        return "gpt-2" if last["use_regex"] else None
    if first["type"] == "Digits":
        return "smollm" if first["individual_digits"] and last["use_regex"] else None
    if first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"] and not last["use_regex"]:
        return {QWEN2: "qwen2", LLAMA3: "llama-bpe"}.get(first["pattern"].get("Regex", ""))
    return None


_TEXTS = (
    "The quick brown fox didn't jump over 12 lazy dogs, did it?",
    "  two  spaces,   three; a-b_c/d (e) [f] {g} 3.14159 = x**2",
    "I'LL we've HE'S they're CamelCase snake_case 1234567890",
    "for i in range(10):\n\tprint(i)\n\n",
    "Größe, naïve café, Ελληνικά, русский, 中文字符, 日本語, ไทย",
    "🙂 👩‍💻 ½ ™ … “quotes” ‘single’ — dash",
)


def probes(tokenizer: Any) -> dict[str, list[int]]:
    """Texts with the ids that the tokenizer makes of them, its own special tokens among them; those with unknown tokens are left out.

    Raises ValueError where fewer than three are left: too little to tell one tokenizer from another.
    """
    ends = getattr(tokenizer, "eos_token", None)
    texts = (*_TEXTS, f"user{ends}assistant") if ends else _TEXTS
    found = {text: [int(index) for index in tokenizer(text)["input_ids"]] for text in texts}
    unknown = getattr(tokenizer, "unk_token_id", None)
    kept = {text: ids for text, ids in found.items() if unknown is None or unknown not in ids}
    if len(kept) < 3:
        raise ValueError(f"the tokenizer knows all of {len(kept)} of {len(texts)} plain texts; its GGUF could not be checked")
    return kept
