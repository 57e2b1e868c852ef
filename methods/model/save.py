"""Saving a model as a stock Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from methods.atomic import new_folder, seal, write_text
from methods.formats.numerics import DTYPES
from methods.model.experts import stock_state_dict
from methods.model.tokenizer import write_tokenizer

CONFIG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def save(model: Any, tokenizer: Any, folder: Path, dtype: str, texts: Mapping[str, str] | None = None) -> None:
    """Writes model and tokenizer so that stock transformers loads them, and their checksums: all of the folder or nothing.

    dtype: what the weights are stored in (`bf16`, `fp16`, `fp32`). texts: further files by name.
    Experts are written fused, the model itself is left alone.
    Raises FileExistsError where the folder holds something already.
    """
    with new_folder(folder) as staging:
        model.save_pretrained(staging, state_dict=_converted(stock_state_dict(model), dtype))
        write_tokenizer(tokenizer, staging)
        for name, text in (texts or {}).items():
            write_text(staging / name, text)
        config = staging / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["dtype"] = CONFIG_NAMES[dtype]
        write_text(config, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        seal(staging)


def _converted(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors in the storage dtype; those that are tied stay one tensor, or they would be written twice."""
    done: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tuple(tensor.shape)
        if key not in done:
            done[key] = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        result[name] = done[key]
    return result
