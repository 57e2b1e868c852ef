"""Export as an ordinary checkpoint: the decoded weights, for any tool that reads transformers' folders. It saves no memory.

Weights that the checkpoint's dtype cannot hold exactly make the whole folder fp32, so that nothing is rounded a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from methods.checkpoint import narrow
from methods.formats.format import Format
from methods.formats.numerics import DTYPES
from methods.method import Edit
from methods.model.describe import describe
from methods.model.experts import stock_state_dict
from methods.model.structure import LayerSpec, Site, Structure
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export.experts import checkpoint_state
from search.export.serving import transformers_entry
from search.export.verification import EXACT, UNJUDGED, Verification, compare, inputs_alone, policy_formats

if TYPE_CHECKING:
    from methods.model.load import LoadedModel


def supports(fmt: Format, site: Site) -> str | None:
    """None: there is no format that cannot be exported. Rounded activations are lost, which `losses.json` says."""
    return None


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises nothing: what transformers loaded, it loads again."""


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes the folder; `edits`, errors: as in `search.export.compressed_tensors.export`, but for every format."""
    structure = loaded.structure
    output.check(structure, file, edits, supports, grid=False)
    layers = {layer.name: layer for _, layer in structure.layers()}
    replaced: dict[str, Tensor] = {}
    for edit in edits.values():
        replaced.update(_weight(layers[name], compressed.dense) for name, compressed in edit.linears.items())
        replaced.update(edit.tensors)
    state = stock_state_dict(loaded.model, replaced)
    if structure.tied:
        state.pop(f"{structure.head}.weight", None)
    dtype = _dtype(state, structure)
    config = output.config_of(loaded, dtype)
    serve = {"transformers": transformers_entry(dtype)}
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in checkpoint_state(loaded.model, state).items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    output.write_folder(folder, loaded, file, tensors, config, serve, _losses(edits, structure, dtype))


def _weight(layer: LayerSpec, dense: Tensor) -> tuple[str, Tensor]:
    return f"{layer.name}.weight", dense.T if layer.transposed else dense


def _dtype(state: Mapping[str, Tensor], structure: Structure) -> str:
    exact = all(
        not t.is_floating_point() or narrow(t, structure.dtype).dtype == DTYPES[structure.dtype] for t in state.values()
    )
    return structure.dtype if exact else "fp32"


def _losses(edits: Mapping[str, Edit], structure: Structure, dtype: str) -> list[dict[str, str]]:
    formats = [c.format for edit in edits.values() for c in edit.linears.values()]
    rounded = [fmt for fmt in formats if fmt.act_bits < 16]
    losses = [{"lost": "memory", "why": f"{len(formats)} compressed linears are stored in {dtype}"}] if formats else []
    if dtype != structure.dtype:
        losses.append(
            {"lost": "dtype", "why": f"{structure.dtype} cannot hold the decoded weights, so that all tensors are {dtype}"}
        )
    if rounded:
        losses.append({"lost": "activations", "why": f"the inputs of {len(rounded)} linears are not rounded"})
    return losses


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Loads the folder with transformers and compares; `reference`, `ids` as in `search.export.compressed_tensors.verify`.

    Weights have to be equal bit for bit. What it predicts is judged, as exact, only where no rounding of activations was lost.
    """
    lost = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    tolerance = UNJUDGED if any(loss["lost"] == "activations" for loss in lost) else EXACT
    with inputs_alone(reference):
        structure = describe(reference)
    return compare(folder, reference, ids, list(policy_formats(folder, structure)), tolerance)
