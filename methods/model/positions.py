"""How many positions a model has: those of a table that it looks them up in, and those that it was trained for."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_TABLE = re.compile(r"(^|_)(wpe|pos|position|positions)(_|$)")
"""Words in the name of a table of positions: `wpe`, `embed_positions`, `position_embeddings`, …"""

_COMPUTED_ONCE = {"mpt": "max_seq_len", "ctrl": "n_positions"}
"""By architecture, the setting up to which it computes positions once, into what is neither an embedding nor a buffer."""


def learned_positions(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that a model with a table of positions can read; None where positions are computed (rotary, ALiBi).

    Behind the table's end is nothing: reading on is an error, or an access beyond its memory.
    """
    config: Any = model.config
    words = model.get_input_embeddings()  # type: ignore[operator]
    found = [int(getattr(config, name)) for kind, name in _COMPUTED_ONCE.items() if config.model_type == kind]
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not words and _TABLE.search(leaf):
            found.append(module.num_embeddings - _unused(module))
        # GPT-J and CodeGen compute the table once, up to its end.
        found += [len(table) for own, table in module.named_buffers(recurse=False) if own == "embed_positions"]
    return min(found, default=None)


def _unused(table: nn.Embedding) -> int:
    """Rows at a table's beginning that stand for no position: a fixed offset (OPT, BART), or those up to the padding's (RoBERTa)."""
    padding = table.padding_idx
    return int(getattr(table, "offset", 0 if padding is None else padding + 1))


def trained_positions(config: Any) -> int | None:
    """Positions that a configuration says the model is for; None where it says nothing."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(found) if found else None
