"""`Bank`: what every (site, decision) became, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from methods.atomic import write_bytes
from methods.errors import InputError
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed
from methods.formats.stored import packed, unpacked
from methods.method import Edit
from methods.policy import Decision
from methods.typed import Count, json_of, read

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = "1"

_FILES = "*/[!.]*.safetensors"
"""A bank's files, by the pattern of their paths in it: hidden ones are being written."""


class MissingEdit(KeyError):
    """An edit that a bank does not hold."""


class DamagedEdit(InputError):
    """A bank's file that does not hold what was put there. path: of the file; without it, the edit counts as never made."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is damaged ({problem}); delete it and compute it again")
        self.path = path


class Bank:
    """Edits on disk, one safetensors file a (site, decision), codes packed; what `get` returns equals what was `put` bit for bit.

    A bank belongs to one model and one calibration: give each its own folder. Writes are atomic, so that several processes may share it.
    A file's time of change is when it was last written or read: whoever has to make room begins with the oldest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, site: str, decision: Decision) -> bool:
        """Whether there is a file for the pair; only `get` reads it."""
        return self.path(site, decision).exists()

    def get(self, site: str, decision: Decision) -> Edit:
        """The edit; raises MissingEdit where there is none, and DamagedEdit where the file is damaged or is another one's."""
        path = self.path(site, decision)
        if not path.exists():
            raise MissingEdit(f"the bank {self._folder} holds no {decision.label} of {site}")
        described, tensors = read_edit(path)
        with contextlib.suppress(OSError):  # a bank that may only be read serves as well
            os.utime(path)
        if (described.site, described.decision) != (site, decision.label):
            raise DamagedEdit(path, f"it holds {described.decision} of {described.site}")
        try:
            linears = {name: _unpacked(name, layer, tensors) for name, layer in described.linears.items()}
        except (ValueError, LookupError, RuntimeError) as error:
            raise DamagedEdit(path, f"it does not hold what it says: {error}") from error
        return Edit(linears, {name.removeprefix("tensor/"): t for name, t in tensors.items() if name.startswith("tensor/")})

    def put(self, site: str, decision: Decision, edit: Edit) -> None:
        """Stores an edit, in place of an earlier one."""
        from safetensors.torch import save

        tensors = {f"tensor/{name}": tensor.contiguous() for name, tensor in edit.tensors.items()}
        linears = {}
        for name, compressed in edit.linears.items():
            linears[name] = {"format": compressed.format.name, "shape": list(compressed.dense.shape)}
            for part, tensor in compressed.payload.items():
                tensors[f"linear/{name}/{part}"] = packed(compressed.format, part, tensor)
        spec = json.dumps({"site": site, "decision": decision.label, "linears": linears})
        metadata = {"version": _VERSION, "edit": spec, "sha256": tensors_digest(spec, tensors)}
        write_bytes(self.path(site, decision), save(tensors, metadata))

    def size_bytes(self) -> int:
        """Bytes of all files of the bank."""
        return sum(path.stat().st_size for path in self._folder.glob(_FILES))

    def clear(self) -> None:
        """Deletes the bank's files, and nothing else that may lie in its folder."""
        for path in self._folder.glob(_FILES):
            path.unlink()

    def path(self, site: str, decision: Decision) -> Path:
        """The file of a pair: readable names, each made unique by a part of its hash."""
        return self._folder / _file_name(site) / f"{_file_name(decision.label)}.safetensors"


@dataclass(frozen=True)
class Linear:
    """A compressed linear of a bank's file: its format and the shape of its dense weight."""

    format: str
    shape: tuple[Count, Count]


@dataclass(frozen=True)
class Described:
    """What a bank's file says that it holds: the edit of a site by a decision, given by its label."""

    site: str
    decision: str
    linears: Mapping[str, Linear]


class Kept(Mapping[str, Edit]):
    """A policy's edits by site, each read from a bank when it is asked for, so that no second model of decoded weights is held.

    Raises MissingEdit and DamagedEdit as `Bank.get` does, when an edit is read.
    """

    def __init__(self, bank: Bank, decisions: Mapping[str, Decision]) -> None:
        self._bank, self._decisions = bank, decisions

    def __getitem__(self, site: str) -> Edit:
        return self._bank.get(site, self._decisions[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)


def read_edit(path: Path) -> tuple[Described, dict[str, Tensor]]:
    """What a bank's file says that it holds, and its tensors; raises DamagedEdit where the file is damaged or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
    except SafetensorError as error:
        raise DamagedEdit(path, str(error)) from error
    spec = metadata.get("edit", "")
    if metadata.get("version") != _VERSION or metadata.get("sha256") != tensors_digest(spec, tensors):
        raise DamagedEdit(path, "its checksum does not fit, or it is of another version")
    try:
        return read(Described, json_of(spec, path), path), tensors
    except InputError as error:
        raise DamagedEdit(path, str(error).removeprefix(f"{path}: ")) from error


def damaged_files(folder: Path) -> list[Path]:
    """The files of a bank that are not what was put there; reads all of them."""
    damaged = []
    for path in sorted(folder.glob(_FILES)):
        try:
            read_edit(path)
        except DamagedEdit:
            damaged.append(path)
    return damaged


def _file_name(text: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.+=-]', '_', text)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def tensors_digest(spec: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, dtype, shape and bytes."""
    import torch

    digest = hashlib.sha256(spec.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpacked(name: str, layer: Linear, tensors: Mapping[str, Tensor]) -> Compressed:
    fmt = parse_format(layer.format)
    prefix = f"linear/{name}/"
    parts = {part.removeprefix(prefix): tensor for part, tensor in tensors.items() if part.startswith(prefix)}
    return Compressed.of(fmt, {part: unpacked(fmt, part, tensor, layer.shape) for part, tensor in parts.items()})
