"""What a GGUF file says of itself: its metadata by key, its tensors' types and shapes; nothing is interpreted here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.errors import InputError

ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of the rotary frequencies, which are no weights of any layer."""


class UnreadableGGUF(InputError):
    """A GGUF file that cannot be loaded; says why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: the name of its type (`Q4_K`, `F16`, …) and its shape, rows first."""

    kind: str
    shape: tuple[int, ...]

    @property
    def n_weights(self) -> int:
        """Weights of the tensor."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Header:
    """A GGUF file without its weights.

    metadata: by key, without the tokenizer's lists; divisors: those of `ROTARY_TENSORS` that the file holds.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    divisors: Mapping[str, Tensor]

    def refusal(self, key: str, why: str) -> UnreadableGGUF:
        """The error for a key of the metadata: names it, its value and the reason."""
        return UnreadableGGUF(f"{self.path}: {key} = {self.metadata.get(key)!r} {why}")


@dataclass
class Keys:
    """The architecture's own metadata, by key without the architecture's name; remembers what was taken."""

    header: Header
    _taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as used from now on."""
        self._taken.add(key)
        return self.header.metadata.get(self.full(key), default)

    def number(self, key: str, default: float, least: float = 0) -> Any:
        """`take` of a number of at least `least`; raises UnreadableGGUF for anything else."""
        value = self.take(key, default)
        if isinstance(value, list):
            raise self.refusal(key, "differs from block to block, which transformers' class does not compute")
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise self.refusal(key, f"is no number of at least {least}; the file is damaged or written wrongly")
        return value

    def full(self, key: str) -> str:
        """The key as the file writes it."""
        return f"{self.header.architecture}.{key}"

    def refusal(self, key: str, why: str) -> UnreadableGGUF:
        """`Header.refusal` for a key of the architecture."""
        return self.header.refusal(self.full(key), why)

    def left(self) -> dict[str, Any]:
        """The keys that the file holds and nobody took."""
        prefix = f"{self.header.architecture}."
        own = {key.removeprefix(prefix): value for key, value in self.header.metadata.items() if key.startswith(prefix)}
        return {key: value for key, value in own.items() if key not in self._taken}


def read_header(path: Path) -> Header:
    """The header of a file that is whole; raises UnreadableGGUF for damaged files and those without a tokenizer or weights."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        metadata = {key: _value(entry) for key, entry in reader.fields.items() if not _is_list_of_tokens(key, entry)}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UnreadableGGUF(
            f"{path}: not a readable GGUF file ({first_line(error)}); it may be cut short, download it again"
        ) from error
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise UnreadableGGUF(f"{path}: the GGUF holds no tokenizer; use one that does, or a folder with tokenizer files")
    tensors = {t.name: StoredTensor(t.tensor_type.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors}
    if not any(len(tensor.shape) > 1 for tensor in tensors.values()):
        raise UnreadableGGUF(f"{path}: the GGUF holds no weight matrices; is it a vocabulary only?")
    divisors = {
        t.name: torch.from_numpy(np.array(t.data, dtype=np.float64)) for t in reader.tensors if t.name in ROTARY_TENSORS
    }
    return Header(path, str(metadata.get("general.architecture")), metadata, tensors, divisors)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_list_of_tokens(key: str, entry: Any) -> bool:
    from gguf import GGUFValueType

    return key.startswith("tokenizer.") and entry.types[:1] == [GGUFValueType.ARRAY]


def _value(entry: Any) -> Any:
    """The entry's value: an fp32 number as its shortest decimal, a list of equal values as that value."""
    from gguf import GGUFValueType

    value = entry.contents()
    if entry.types[:1] == [GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))
    if isinstance(value, list) and value and all(other == value[0] for other in value):
        return value[0]
    return value
