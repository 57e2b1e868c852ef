"""The safetensors files that hold a model folder's weights: those that transformers reads, and no other that lies beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from methods.errors import InputError
from methods.typed import read_json

WEIGHT_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class LoadError(InputError):
    """A model that cannot be loaded: what it is, why, and the way out, in one line."""


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor. dtype: safetensors' word for it (`BF16`, …)."""

    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The files of the folder's weights, each of which exists: `model.safetensors`, or those that its index lists.

    settings: of config.json, which may name another file (`transformers_weights`). Raises LoadError where there are none.
    """
    named = settings.get("transformers_weights")
    candidates = [str(named)] if named else [SINGLE, INDEX]
    found = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if found is None:
        raise LoadError(_none(folder, candidates[0]))
    if not found.name.endswith(".index.json"):
        return [found]
    files = [folder / name for name in listed(found)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise LoadError(f"{found} lists {missing[0]}, which is missing ({len(missing)} of {len(files)} files); fetch it again")
    return files


def _none(folder: Path, wanted: str) -> str:
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    others = [path.name for path in sorted(folder.glob("*.safetensors"))]
    found = "holds no weights"
    if pickles:
        found = f"holds {pickles[0]}, a pickle, which can run code"
    elif others:
        found = f"holds {others[0]}, but no {wanted} and no index that lists it"
    return f"{folder}: {found}; safetensors or GGUF only (convert with model.save_pretrained, which writes safetensors)"


class Index(TypedDict):
    """Which file holds each tensor."""

    weight_map: Mapping[str, str]


def listed(index: Path) -> list[str]:
    """The files of an index, each once, in the order of their names; raises InputError where it names none."""
    names = sorted(set(read_json(Index, index, "fetch it again")["weight_map"].values()))
    if not names:
        raise LoadError(f"{index}: weight_map names no files; fetch it again")
    return names


def headers(files: Sequence[Path]) -> dict[str, Header]:
    """What the files say of every tensor, by its name; reads no weights. Raises LoadError for a file that is damaged."""
    from safetensors import SafetensorError, safe_open

    held: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    view = tensors.get_slice(name)
                    held[name] = Header(str(view.get_dtype()), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise LoadError(
                f"{file}: not a readable safetensors file ({_line(error)}); it may be cut short, fetch it again"
            ) from error
    return held


def stored_dtype(folder: Path, held: Mapping[str, Header]) -> str:
    """The dtype of most weights, of `WEIGHT_DTYPES`; raises LoadError where most are something else."""
    counts: Counter[str] = Counter()
    for header in held.values():
        counts[header.dtype] += torch.Size(header.shape).numel()
    kind = counts.most_common(1)[0][0] if counts else "nothing"
    if kind not in WEIGHT_DTYPES:
        raise LoadError(f"{folder}: most weights are {kind}; give a checkpoint in {', '.join(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[kind]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
