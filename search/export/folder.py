"""What every exported folder has besides its weights, and the checks before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods import atomic, policy_file
from methods.checkpoint import check_edits, narrow, remaining_tensors
from methods.formats.format import Format
from methods.formats.numerics import DTYPES, Compressed
from methods.formats.sides import plain
from methods.lift import Lifted
from methods.method import Edit
from methods.model.experts import UnfusedExperts
from methods.model.structure import Site, Structure
from methods.model.tokenizer import write_tokenizer
from methods.policy_file import PolicyFile
from search.export.serving import with_cache
from search.generate import cache_format

if TYPE_CHECKING:
    from methods.model.load import LoadedModel


def check(
    structure: Structure,
    file: PolicyFile,
    edits: Mapping[str, Edit],
    supports: Callable[[Format, Site], str | None],
    grid: bool = True,
) -> None:
    """Raises ValueError where the edits are not the policy's or a site has a format that the export cannot express.

    grid: the export writes codes and scales, and so has no place for what may stand beside them.
    """
    check_edits(file.policy, structure, edits)
    for name, edit in edits.items():
        for layer, compressed in edit.linears.items():
            reason = supports(compressed.format, structure.site(name))
            if reason is None and grid and not plain(compressed.payload):
                parts = ", ".join(sorted(part for part in compressed.payload if "." in part))
                kept = edits.kept.get(name) if isinstance(edits, Lifted) else None
                reason = f"{parts} beside the grid cannot be expressed{f' ({kept})' if kept else ''}; export to the format 'dense' instead"
            if reason:
                raise ValueError(f"{layer} has {compressed.format.name}: {reason}")


def in_storage_dtype(tensors: Iterable[tuple[str, Tensor]], dtype: str) -> dict[str, Tensor]:
    """The tensors in the checkpoint's dtype; raises ValueError for one that would lose something, so that nothing is rounded silently."""
    state = {name: narrow(tensor, dtype) for name, tensor in tensors}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != DTYPES[dtype]:
            raise ValueError(
                f"{name} cannot be stored in {dtype} without loss; export to the format 'dense' or 'isolatency' instead"
            )
    return state


def config_of(loaded: LoadedModel, dtype: str) -> dict[str, Any]:
    """The model's `config.json`, with transformers 4's spellings of the dtype and of the rotary base beside those of 5."""
    config: dict[str, Any] = loaded.model.config.to_dict()
    name = str(DTYPES[dtype]).removeprefix("torch.")
    config |= {"architectures": [type(loaded.model).__name__], "dtype": name, "torch_dtype": name}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {name: value for name, value in rope.items() if name != "rope_theta"})
    return config


def check_no_experts(structure: Structure, runtime: str) -> None:
    """Raises ValueError for a model with experts, which runtimes name in ways of their own."""
    if any(site.kind.startswith("expert") for site in structure.sites):
        raise ValueError(
            f"{structure.architecture} has experts, which {runtime} names in its own way; use the runtime isolatency"
        )


def linears(edits: Mapping[str, Edit]) -> dict[str, Compressed]:
    """The compressed linears by name; raises ValueError where there are none."""
    table = {layer: compressed for edit in edits.values() for layer, compressed in edit.linears.items()}
    if not table:
        raise ValueError("the policy compresses nothing; export to the format 'dense' instead")
    return table


def formats_of(table: Mapping[str, Compressed]) -> dict[str, Format]:
    """The formats of compressed linears, by name."""
    return {layer: compressed.format for layer, compressed in table.items()}


def uncompressed(model: Any, compressed: Iterable[str]) -> list[str]:
    """The model's other linears, the head among them and experts not: engines have to be told of what they should leave alone."""
    left = set(compressed)
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, UnfusedExperts))
    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in linears if name not in left and not name.startswith(experts)]


def rest(loaded: LoadedModel, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
    """What no compressed linear replaces, in the checkpoint's dtype, as edits changed it; raises as `in_storage_dtype`."""
    tensors = remaining_tensors(loaded.model, loaded.structure, edits)
    for edit in edits.values():
        tensors.update(edit.tensors)
    return in_storage_dtype(tensors.items(), loaded.structure.dtype)


def write_folder(
    folder: Path,
    loaded: LoadedModel,
    file: PolicyFile,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    serve: Mapping[str, Any],
    losses: Sequence[Mapping[str, str]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes the folder in one step; raises FileExistsError where it holds something.

    serve: by engine, the command and environment that run the folder, to which the flags of the policy's key/value cache are added;
    losses: what the format could not express, `lost` and `why`; metadata: of the safetensors file, beside what is always there.
    """
    from safetensors.torch import save_file

    structure = loaded.structure
    serve, lost = with_cache(serve, cache_format(file.policy, structure), structure.dtype)
    header = {**metadata, "format": "pt", "policy_digest": policy_file.expanded_digest(file.policy, structure)}
    with atomic.new_folder(folder) as staging:
        write_tokenizer(loaded.tokenizer, staging)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(staging)
        save_file(dict(state), staging / "model.safetensors", metadata=header)
        write_texts(staging, loaded, file, {"config.json": config, "serve.json": serve, "losses.json": [*losses, *lost]})


def write_texts(staging: Path, loaded: LoadedModel, file: PolicyFile, contents: Mapping[str, Any]) -> None:
    """Writes `policy.yaml` and JSON files by name into a folder that is being filled.

    To `losses.json` comes what the model's own checkpoint held beside it.
    """
    atomic.write_text(staging / "policy.yaml", policy_file.render(file, loaded.structure))
    losses = [{"lost": "tensors", "why": loaded.left_out}] if loaded.left_out else []
    for name, content in {**contents, "losses.json": [*contents["losses.json"], *losses]}.items():
        atomic.write_text(staging / name, json.dumps(content, indent=2) + "\n")
