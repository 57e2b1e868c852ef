"""What exports of a configuration alone share: a table of formats in another tool's words, which no runtime has loaded here.

Such a folder holds no weights: the tool quantises the original model by it anew, so that nothing that was measured holds for the result.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import atomic, policy_file
from methods.formats.format import Format
from methods.method import Edit
from methods.model.describe import describe
from methods.model.structure import Site
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export.serving import with_cache
from search.export.verification import Verification, inputs_alone, not_loaded, policy_formats, read_config, storage_dtype
from search.generate import cache_format

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

STATUS = "not load-tested"


def formats_of(
    loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit], supports: Callable[[Format, Site], str | None], tool: str
) -> dict[str, Format]:
    """The formats of the compressed linears by name; raises ValueError for what the tool's configuration cannot express."""
    output.check_no_experts(loaded.structure, tool)
    table = output.linears(edits)
    # What stands beside a grid is part of the evaluated weights, and no configuration asks for it.
    output.check(loaded.structure, file, edits, supports)
    return output.formats_of(table)


def label(loaded: LoadedModel, file: PolicyFile) -> dict[str, str]:
    """Who wrote a configuration, of which policy, and that nothing loaded it."""
    return {
        "name": "isolatency",
        "version": importlib.metadata.version("isolatency"),
        "status": STATUS,
        "policy_digest": policy_file.expanded_digest(file.policy, loaded.structure),
    }


def write(folder: Path, loaded: LoadedModel, file: PolicyFile, contents: Mapping[str, Any], tool: str) -> None:
    """Writes JSON files by name, the policy, a `serve.json` of no engine, and `losses.json`; raises as `folder.write_folder` does."""
    fmt = cache_format(file.policy, loaded.structure)
    _, lost = with_cache({tool: {}}, fmt, loaded.structure.dtype)
    losses = [
        {"lost": "weights", "why": f"a configuration alone: {tool} quantises by it anew, and not to the evaluated weights"},
        {"lost": "verification", "why": f"{STATUS}: no runtime here reads it"},
        *lost,
    ]
    with atomic.new_folder(folder) as staging:
        output.write_texts(staging, loaded, file, {**contents, "serve.json": {}, "losses.json": losses})


def verified(
    folder: Path, name: str, reference: Any, read: Callable[[Mapping[str, Any]], Mapping[str, Format]]
) -> Verification:
    """Whether the folder's file `name` reads back as the table of the folder's policy, on the reference's linears.

    Weights and losses are nan: nothing is loaded.
    """
    with inputs_alone(reference):
        structure = describe(reference, storage_dtype(folder))
    expected, table = policy_formats(folder, structure), read(read_config(folder, name))
    wrong = sorted(layer for layer in {*expected, *table} if expected.get(layer) != table.get(layer))
    problem = ""
    if wrong:
        said, decided = (fmt.name if (fmt := formats.get(wrong[0])) else "dense" for formats in (table, expected))
        problem = f"{name} says {said} of {wrong[0]}, and the policy {decided}"
    return not_loaded(len(table), problem, f"the configuration of {len(table)} linears reads back")
