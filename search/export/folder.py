"""What every exported folder has besides its weights, and the checks before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from methods import atomic, policy_file
from methods.checkpoint import check_edits, narrow
from methods.formats.format import Format
from methods.formats.numerics import DTYPES
from methods.method import Edit
from methods.model.structure import Site, Structure
from methods.model.tokenizer import write_tokenizer
from methods.policy_file import PolicyFile

if TYPE_CHECKING:
    from methods.model.load import LoadedModel


def check(
    structure: Structure, file: PolicyFile, edits: Mapping[str, Edit], supports: Callable[[Format, Site], str | None]
) -> None:
    """Raises ValueError where the edits are not the policy's or a site has a format that the export cannot express."""
    check_edits(file.policy, structure, edits)
    for name, edit in edits.items():
        for layer, compressed in edit.linears.items():
            reason = supports(compressed.format, structure.site(name))
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


def write_folder(
    folder: Path,
    loaded: LoadedModel,
    file: PolicyFile,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    serve: Mapping[str, Any],
    losses: Sequence[Mapping[str, str]],
) -> None:
    """Writes the folder in one step; raises FileExistsError where it holds something.

    serve: by engine, the command and environment that run the folder; losses: what the format could not express, `lost` and `why`.
    """
    from safetensors.torch import save_file

    structure = loaded.structure
    digest = policy_file.expanded_digest(file.policy, structure)
    with atomic.new_folder(folder) as staging:
        write_tokenizer(loaded.tokenizer, staging)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(staging)
        save_file(dict(state), staging / "model.safetensors", metadata={"format": "pt", "policy_digest": digest})
        atomic.write_text(staging / "policy.yaml", policy_file.render(file, structure))
        for name, content in (("config.json", config), ("serve.json", serve), ("losses.json", list(losses))):
            atomic.write_text(staging / name, json.dumps(content, indent=2) + "\n")
