"""The project's own checkpoint of a compressed model: packed codes beside the tensors that were left alone.

A folder holds `config.json` and the tokenizer's files, `model.safetensors` (tensors that no edit replaced), `payload.safetensors`
(the parts of every payload, codes packed, and replaced parameters), `policy.yaml`, and last `isolatency.json`, which describes and hashes
the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from methods import atomic, catalogue, policy_file
from methods.errors import InputError
from methods.formats.format import parse_format
from methods.formats.numerics import DTYPES, Compressed
from methods.formats.stored import packed, unpacked
from methods.method import Edit
from methods.model.describe import describe
from methods.model.experts import unfuse_experts
from methods.model.load import MARKER, LoadedModel
from methods.model.quiet import quiet
from methods.model.settings import settle_, untie_
from methods.model.structure import Structure
from methods.model.tokenizer import read_tokenizer, write_tokenizer
from methods.model.weights import digest_of
from methods.policy import Policy
from methods.policy_file import PolicyFile
from methods.policy_text import Plain, plain
from methods.typed import Count, WrongValue, json_of
from methods.typed import read as read_typed

SCHEMA = "isolatency-checkpoint/1"
_FIRST_PARTS = ("weight", "codes", "scale", "offset")
_AGAIN = "write the checkpoint again"
_TENSORS, _PAYLOAD, _POLICY = "model.safetensors", "payload.safetensors", "policy.yaml"


class CorruptCheckpoint(InputError):
    """A checkpoint folder that is not what was written: another schema, a missing or changed file."""


class LinearEntry(TypedDict):
    """A compressed linear: its format, the shape of its dense weight, and the names of its payload's parts."""

    format: str
    shape: tuple[Count, Count]
    parts: NotRequired[list[str]]


class SiteEntry(TypedDict):
    """The compressed linears of a site by name, and the names of the parameters that were replaced with them."""

    linears: Mapping[str, LinearEntry]
    tensors: list[str]


class Marker(TypedDict):
    """`isolatency.json`; files: the SHA-256 of the others by name; digest: of the rest of it; meta: the writer's."""

    schema: str
    dtype: Literal["bf16", "fp16", "fp32"]
    policy: Mapping[str, str]
    structure: str
    sites: Mapping[str, SiteEntry]
    meta: Mapping[str, Any]
    files: Mapping[str, str]
    digest: str


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds: tensors by full name (one of two that are tied) and the edits by site, as they were written.

    marker: `isolatency.json`; its `meta` is the writer's. The policy is `policy_file.parse(policy_text, structure)`.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    edits: Mapping[str, Edit]
    policy_text: str
    marker: Marker

    @property
    def dtype(self) -> str:
        """The dtype that the model's weights were stored in, of `DTYPES`."""
        return self.marker["dtype"]


def structure_digest(structure: Structure) -> str:
    """The SHA-256, in hex, of a structure's canonical JSON, but for what feeds its sites, which earlier versions did not see."""
    described = dataclasses.asdict(structure)
    for site in described["sites"]:
        del site["feed"]
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_edits(policy: Policy, structure: Structure, edits: Mapping[str, Edit]) -> None:
    """Raises ValueError unless the edits are exactly what the policy decides: at each site its format, in every layer."""
    for name in {*policy.sites, *edits}:
        site = structure.site(name)
        named = [fmt for d in policy.at(name) if (fmt := catalogue.format_of(d)) is not None]
        linears = edits[name].linears if name in edits else {}
        found = {layer: compressed.format.name for layer, compressed in linears.items()}
        wanted = {layer.name: named[-1] for layer in site.layers} if named else {}
        if found != wanted:
            raise ValueError(
                f"{name}: the policy decides {wanted or 'no format'}, but its edit holds {found or 'no compressed linear'}"
            )


def narrow(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in a storage dtype where that loses nothing, as it is otherwise; integers and booleans stay too."""
    if not tensor.is_floating_point():
        return tensor.contiguous()
    small = tensor.to(DTYPES[dtype])
    return (small if torch.equal(small.to(tensor.dtype), tensor) else tensor).contiguous()


def remaining_tensors(model: Any, structure: Structure, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
    """The model's tensors that no edit replaces, by full name, in the storage dtype where that is exact; a tied head only once.

    The edits may be installed in the model or not.
    """
    replaced = {f"{layer}.weight" for edit in edits.values() for layer in edit.linears}
    replaced |= {name for edit in edits.values() for name in edit.tensors}
    if structure.tied:
        replaced.add(f"{structure.head}.weight")
    return {name: narrow(tensor, structure.dtype) for name, tensor in model.state_dict().items() if name not in replaced}


def write(
    folder: Path,
    loaded: LoadedModel,
    file: PolicyFile,
    edits: Mapping[str, Edit],
    meta: Mapping[str, Plain] | None = None,
) -> None:
    """Writes a checkpoint in one step: `folder` appears whole or not at all.

    edits: by site, exactly what the policy decides (`check_edits`); they may be installed in the model or not.
    Raises FileExistsError where `folder` holds something, ValueError for a policy or edits that do not fit the model, and where what
    was written does not read back as the same.
    """
    from safetensors.torch import save_file

    structure = loaded.structure
    check_edits(file.policy, structure, edits)
    rest = remaining_tensors(loaded.model, structure, edits)
    marker: dict[str, Any] = {
        "schema": SCHEMA,
        "dtype": structure.dtype,
        "policy": {"key": file.policy.key(), "expanded_digest": policy_file.expanded_digest(file.policy, structure)},
        "structure": structure_digest(structure),
        "sites": {name: _site_entry(edit) for name, edit in sorted(edits.items())},
        "meta": plain(meta or {}, "meta"),
    }
    if loaded.left_out:
        marker["left_out"] = loaded.left_out
    with atomic.new_folder(folder) as staging:
        loaded.model.config.save_pretrained(staging)
        write_tokenizer(loaded.tokenizer, staging)
        atomic.write_text(staging / _POLICY, policy_file.render(file, structure))
        save_file(rest, staging / _TENSORS, metadata={"format": "pt"})
        save_file(dict(_payload(edits)), staging / _PAYLOAD, metadata={"format": "pt"})
        marker["files"] = {path.name: atomic.sha256(path) for path in sorted(staging.iterdir())}
        marker["digest"] = _marker_digest(marker)
        atomic.write_text(staging / MARKER, json.dumps(marker, indent=1, sort_keys=True) + "\n")
        problem = _misread(staging, structure, rest, edits)
        if problem:
            raise ValueError(f"{folder}: the checkpoint does not read back as what was evaluated: {problem}")


def _misread(folder: Path, structure: Structure, rest: Mapping[str, Tensor], edits: Mapping[str, Edit]) -> str:
    """What a checkpoint that was just written gives back otherwise than it was, "" where nothing; without a second model in memory."""
    if not _holds(folder / _TENSORS, rest.items()):
        return f"{_TENSORS} holds other tensors"
    if not _holds(folder / _PAYLOAD, _payload(edits)):
        return f"{_PAYLOAD} holds other tensors"
    changed = next(_decoded_otherwise(folder, edits), "")
    if changed:
        return f"{changed} decodes to other weights"
    with torch.device("meta"):
        model = _untrained(folder)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if (head is embedding) != structure.tied:
        return f"its config.json makes the head {'the embedding' if head is embedding else 'a tensor of its own'}"
    found = {*rest, *(name for edit in edits.values() for name in edit.tensors)}
    found |= {f"{name}.weight" for edit in edits.values() for name in edit.linears}
    wanted = set(model.state_dict()) - ({f"{structure.head}.weight"} if structure.tied else set())
    # Fused experts have other names, and unfusing them takes a model that computes.
    experts = tuple(site.name.partition("*")[0] for site in structure.sites if "*" in site.name)
    differing = sorted(name for name in found ^ wanted if not name.startswith(experts))
    return f"{differing[0]} is in the {'files' if differing[0] in found else 'model of config.json'} alone" if differing else ""


def _decoded_otherwise(folder: Path, edits: Mapping[str, Edit]) -> Iterator[str]:
    """The linears that a checkpoint gives back with other weights than their edits hold."""
    from safetensors import safe_open

    marker = _read_marker(folder)
    with safe_open(folder / _PAYLOAD, framework="pt") as file:
        for site, edit in edits.items():
            for name, compressed in edit.linears.items():
                entry = marker["sites"][site]["linears"][name]
                payload = {f"{name}.{part}": file.get_tensor(f"{name}.{part}") for part in entry["parts"]}
                if not torch.equal(_read_linear(name, entry, payload).dense, compressed.dense):
                    yield name


def _holds(path: Path, expected: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether a file holds these tensors and no others, bit for bit, NaN included."""
    from safetensors import safe_open

    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    with safe_open(path, framework="pt") as file:
        left = set(file.keys())
        for name, tensor in expected:
            if name not in left:
                return False
            left.remove(name)
            found = file.get_tensor(name)
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape) or not torch.equal(raw(found), raw(tensor)):
                return False
    return not left


def problem(folder: Path, edits: Mapping[str, Edit]) -> str:
    """Why a folder is not the checkpoint of these edits: damaged, or other weights; "" where it is."""
    try:
        marker = _read_marker(folder)
    except CorruptCheckpoint as error:
        return str(error).partition("; write")[0]
    stored = {name: entry["format"] for site in marker["sites"].values() for name, entry in site["linears"].items()}
    wanted = {name: compressed.format.name for edit in edits.values() for name, compressed in edit.linears.items()}
    whole = stored == wanted and _holds(folder / _PAYLOAD, _payload(edits))
    return "" if whole else f"{folder} holds other weights than those that were evaluated"


def _site_entry(edit: Edit) -> dict[str, Any]:
    linears = {
        name: {"format": c.format.name, "shape": list(c.dense.shape), "parts": sorted(c.payload)}
        for name, c in sorted(edit.linears.items())
    }
    return {"linears": linears, "tensors": sorted(edit.tensors)}


def _payload(edits: Mapping[str, Edit]) -> Iterator[tuple[str, Tensor]]:
    for edit in edits.values():
        for layer, compressed in edit.linears.items():
            for part, tensor in compressed.payload.items():
                yield f"{layer}.{part}", packed(compressed.format, part, tensor)
        for name, tensor in edit.tensors.items():
            yield name, tensor.contiguous()


def _marker_digest(marker: Mapping[str, Any]) -> str:
    body = {name: value for name, value in marker.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(folder: Path) -> Stored:
    """The contents of a checkpoint, every file checked against its hash; raises CorruptCheckpoint in one line otherwise."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        marker = _read_marker(folder)
        payload = load_file(folder / _PAYLOAD)
        edits = {name: _read_edit(entry, payload) for name, entry in marker["sites"].items()}
        text = (folder / _POLICY).read_text(encoding="utf-8")
        return Stored(folder, load_file(folder / _TENSORS), edits, text, marker)
    except CorruptCheckpoint:
        raise
    except WrongValue as error:
        raise CorruptCheckpoint(str(error)) from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{folder}: its files do not hold what {MARKER} says ({error}); {_AGAIN}") from error


def _read_marker(folder: Path) -> Marker:
    path = folder / MARKER
    if not path.is_file():
        raise CorruptCheckpoint(f"{folder} is not a compressed checkpoint: it has no {MARKER}")
    marker = json_of(path.read_bytes(), path, _AGAIN)
    schema = marker.get("schema") if isinstance(marker, dict) else None
    if schema != SCHEMA:
        raise CorruptCheckpoint(f"{path}: schema={schema!r}; this version reads {SCHEMA} only")
    if marker.get("digest") != _marker_digest(marker):
        raise CorruptCheckpoint(f"{path} was changed after it was written; write the checkpoint again")
    found = read_typed(Marker, marker, path, _AGAIN)
    for name, digest in found["files"].items():
        if not (folder / name).is_file():
            raise CorruptCheckpoint(f"{folder / name} is missing; write the checkpoint again")
        if atomic.sha256(folder / name) != digest:
            raise CorruptCheckpoint(f"{folder / name} was changed after it was written; write the checkpoint again")
    return found


def _read_edit(entry: SiteEntry, payload: Mapping[str, Tensor]) -> Edit:
    linears = {name: _read_linear(name, e, payload) for name, e in entry["linears"].items()}
    return Edit(linears, {name: payload[name] for name in entry["tensors"]})


def _read_linear(name: str, entry: LinearEntry, payload: Mapping[str, Tensor]) -> Compressed:
    fmt = parse_format(entry["format"])
    # Without a list of parts the checkpoint is of an earlier version, which knew these alone.
    parts = entry.get("parts") or [part for part in _FIRST_PARTS if f"{name}.{part}" in payload]
    return Compressed.of(fmt, {part: unpacked(fmt, part, payload[f"{name}.{part}"], entry["shape"]) for part in parts})


def load_dense(folder: Path) -> LoadedModel:
    """The checkpoint as a model in fp32 and eval mode, with the decoded weights installed: the reference for its weights.

    Activations are left alone; `methods.apply.Installer` with `read(folder).edits` adds their rounding. The digest is over fp32.
    Raises CorruptCheckpoint as `read` does, and where the model's structure is not the one that was written.
    """
    stored = read(folder)
    model, tokenizer = _build(folder)
    structure = describe(model, stored.dtype)
    head = stored.tensors.get(f"{structure.head}.weight")
    if structure.tied and head is not None:  # a tied head is never stored, whatever the configuration says
        structure = untie_(model, structure, head.float())
    settle_(model)
    if structure_digest(structure) != stored.marker["structure"]:
        raise CorruptCheckpoint(f"{folder}: this version sees another structure in the model than the one that wrote it did")
    model.load_state_dict(_dense_state(stored, structure), strict=True)
    left_out = str(stored.marker.get("left_out", ""))
    notes = (f"weights decoded from {len(stored.edits)} compressed sites", *([left_out] if left_out else []))
    digest = digest_of(model, "fp32")
    return LoadedModel(model, tokenizer, structure, str(folder.resolve()), folder.resolve().name, digest, notes, left_out)


def _build(folder: Path) -> tuple[Any, Any]:
    """The model of the folder's configuration with random weights, experts unfused, and the tokenizer."""
    with torch.random.fork_rng(devices=[]):
        model = _untrained(folder)
    with quiet():
        tokenizer = read_tokenizer(folder)
    unfuse_experts(model)
    return model.eval().requires_grad_(False), tokenizer


def _untrained(folder: Path) -> Any:
    """The model of the folder's configuration, as transformers makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]


def _dense_state(stored: Stored, structure: Structure) -> dict[str, Tensor]:
    """All tensors of the model by full name, as the evaluated model has them."""
    transposed = {layer.name for _, layer in structure.layers() if layer.transposed}
    state = dict(stored.tensors)
    for edit in stored.edits.values():
        state.update(edit.tensors)
        for name, compressed in edit.linears.items():
            state[f"{name}.weight"] = compressed.dense.T if name in transposed else compressed.dense
    if structure.tied:
        state[f"{structure.head}.weight"] = state[f"{structure.embedding}.weight"]
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
