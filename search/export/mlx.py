"""Export as the `quantization` of MLX's configuration, a bits and group size for every linear; not load-tested, and without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from methods.formats.format import Format
from methods.method import Edit
from methods.model.structure import Site
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export import plan
from search.export.auto_round import commonest
from search.export.verification import Verification

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

GROUPS = (32, 64, 128)
_DEFAULTS = ("group_size", "bits", "mode")


def supports(fmt: Format, site: Site) -> str | None:
    """Why MLX's affine grids are not the format at the site, or None."""
    if fmt.dense:
        return "MLX leaves dense weights as they are; leave the site out of the policy"
    if not fmt.plain or fmt.act_bits != 16:
        return f"{fmt.name} is not exported; use integers with bf16 scales, inputs left alone"
    if fmt.symmetric:
        return f"MLX fits an offset to every group; use {fmt.name}-asym"
    if fmt.group not in GROUPS:
        return f"group={fmt.group} is not one of {GROUPS}"
    if site.kind.startswith("expert") or any(layer.transposed for layer in site.layers):
        return "only plain linears are exported to MLX, no experts and none stored transposed (Conv1D)"
    return None if fmt.divides(site.d_in) else f"group={fmt.group} does not divide {site.d_in} inputs"


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for a model with experts."""
    output.check_no_experts(loaded.structure, "mlx")


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes `config.json` with the table; `edits`, errors: as in `search.export.compressed_tensors.export`."""
    formats = plan.formats_of(loaded, file, edits, supports, "mlx")
    dense = [*output.uncompressed(loaded.model, formats), loaded.structure.embedding]
    config = output.config_of(loaded, loaded.structure.dtype)
    # Both names are read, by different versions.
    config["quantization"] = config["quantization_config"] = quantization(formats, dense)
    config["isolatency"] = plan.label(loaded, file)
    plan.write(folder, loaded, file, {"config.json": config}, "mlx")


def quantization(formats: Mapping[str, Format], dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization` of linears with formats (by module name) among modules left alone; `from_config` reads it back."""
    entries: dict[str, Any] = {name: _entry(fmt) for name, fmt in formats.items()}
    return {**_entry(commonest(formats)), **entries, **dict.fromkeys(dense, False)}


def _entry(fmt: Format) -> dict[str, Any]:
    return {"group_size": fmt.group, "bits": fmt.bits, "mode": "affine"}


def from_config(config: Mapping[str, Any]) -> dict[str, Format]:
    """The formats, by module name, of a `config.json` that `export` wrote; raises ValueError for any other."""
    table = config.get("quantization")
    if not isinstance(table, dict):
        raise ValueError("config.json has no quantization; it is not MLX's")
    formats = {}
    for name, entry in table.items():
        if name in _DEFAULTS or entry is False:
            continue
        if entry.get("mode") != "affine":
            raise ValueError(f"{name}: mode={entry.get('mode')!r} is not affine")
        formats[name] = Format(int(entry["bits"]), int(entry["group_size"]), symmetric=False)
    return formats


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Whether the configuration reads back as the folder's policy; `ids` is not used, because nothing is loaded."""
    return plan.verified(folder, "config.json", reference, from_config)
