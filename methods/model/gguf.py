"""GGUF files: converted once into a cached safetensors folder, off any low-bit grid that they lie on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from methods.atomic import sha256
from methods.model.baseline import detect_grid, leave_grid_
from methods.model.describe import describe
from methods.model.experts import unfuse_experts
from methods.model.quiet import quiet
from methods.model.save import save
from methods.model.weights import digest_of, not_finite

RECIPE = "v1"
"""Changes whenever the conversion does, so that no old cache is mistaken for a new one."""

ORIGIN = "origin.json"
"""Beside a converted model: `label`, `notes` and the `digest` of its weights."""

FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


class UnreadableGGUF(ValueError):
    """A GGUF file that cannot be loaded; says why."""


def convert(path: Path, cache: Path, log: Callable[[str], None]) -> Path:
    """The safetensors folder of a GGUF file, under `cache/models`, made on the first call (tens of seconds), whole or not at all.

    Weights on a grid of at most 8 bits are moved off it (see `methods.model.baseline`) and stored in bf16; `origin.json`
    says so. Raises UnreadableGGUF for corrupt files, those without a tokenizer and architectures that transformers cannot read.
    """
    folder = cache / "models" / f"{sha256(path)[:16]}-{RECIPE}"
    if (folder / ORIGIN).exists():
        return folder
    log(f"converting {path.name} to {folder} (once)")
    stored = _stored_type(path)
    with quiet():
        model, tokenizer = _read(path)
        damaged = not_finite(model)
        if damaged:
            raise UnreadableGGUF(f"{path}: {damaged} holds NaN or infinite values; the file is damaged, use another")
        unfuse_experts(model)
        notes = _off_grid(model, stored)
        label = re.sub(rf"[.-]{stored}\w*$", "", path.stem, flags=re.IGNORECASE)
        dtype = FLOATS.get(stored, "bf16")
        shown = label if stored in FLOATS else f"{label}, dequantised from {stored}"
        origin = {"label": shown, "notes": notes, "digest": digest_of(model, dtype)}
        try:
            save(model, tokenizer, folder, dtype, {ORIGIN: json.dumps(origin, indent=2) + "\n"})
        except OSError:
            # Another process converting the same file may have been first; its folder is as good.
            if not (folder / ORIGIN).exists():
                raise
    return folder


def gguf_configuration(path: Path) -> tuple[Any, str]:
    """Configuration and weight dtype of a GGUF file, from its metadata; raises UnreadableGGUF as `convert` does."""
    from transformers import AutoConfig

    stored = _stored_type(path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError, TypeError) as error:
        raise UnreadableGGUF(
            f"{path}: transformers cannot read this GGUF as a causal language model ({_line(error)})"
        ) from error
    return config, FLOATS.get(stored, "bf16")


def _off_grid(model: Any, stored: str) -> list[str]:
    structure = describe(model)
    grid = detect_grid(model, structure)
    if grid is None:
        return []
    failed = leave_grid_(model, structure)
    return [
        f"the file holds {grid.share:.0%} of the linears on a {grid.bits}-bit grid ({stored}), which a {grid.bits}-bit format could "
        "reproduce without loss; channels were permuted and value heads rotated (the same function, seed 0) so that no result is "
        "flattered, and losses are against this model, not against the original weights",
        *failed,
    ]


def _stored_type(path: Path) -> str:
    """The type of most weights (`Q4_1`, `F16`, …); checks that the file is whole and has a tokenizer."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UnreadableGGUF(
            f"{path}: not a readable GGUF file ({_line(error)}); it may be cut short, download it again"
        ) from error
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise UnreadableGGUF(f"{path}: the GGUF holds no tokenizer; use one that does, or a folder with tokenizer files")
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    if not counts:
        raise UnreadableGGUF(f"{path}: the GGUF holds no weight matrices; is it a vocabulary only?")
    return counts.most_common(1)[0][0]


def _read(path: Path) -> tuple[Any, Any]:
    """Model (fp32, random generator untouched) and tokenizer.

    Takes transformers' reader of GGUF tensors rather than `from_pretrained`, which wants a further package and leaves a
    quantizer on the model that then refuses to be saved.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    try:
        config = AutoConfig.from_pretrained(**place)
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(**place)
        lost = _fill(model, read["tensors"])
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        raise UnreadableGGUF(
            f"{path}: transformers cannot read this GGUF as a causal language model ({_line(error)})"
        ) from error
    if lost:
        raise UnreadableGGUF(f"{path}: weights for {', '.join(lost[:3])} are missing from the GGUF, {len(lost)} in all")
    return model.eval().requires_grad_(False), tokenizer


def _fill(model: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Loads the tensors; names of those that nothing filled, a tied head counting as filled. RuntimeError for a wrong shape."""
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    model.tie_weights()
    state = model.state_dict()
    filled = {state[name].data_ptr() for name in tensors if name in state}
    return [name for name in missing if state[name].data_ptr() not in filled]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
