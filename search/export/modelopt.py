"""Export as ModelOpt's `hf_quant_config.json` of mixed precision, which TensorRT-LLM reads; not load-tested, and without weights.

Only algorithms that compute what the format says: those that fix the scales of inputs by calibration (FP8, NVFP4, W8A8_SQ_PER_CHANNEL)
are no format of a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from methods.formats.format import Format, parse_format
from methods.method import Edit
from methods.model.structure import Site
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export import plan
from search.export.verification import Verification

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

_INT4 = {"quant_algo": "W4A16_AWQ", "has_zero_point": False, "pre_quant_scale": False}
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "fp8-token": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "mxfp8a8": {"quant_algo": "MXFP8", "group_size": 32},
    "nvfp4a16": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "w4a16-g128": {**_INT4, "group_size": 128},
    "w4a16-g64": {**_INT4, "group_size": 64},
    "w8a16": {"quant_algo": "W8A16"},
}
"""What a layer's entry says, by format."""

FILE = "hf_quant_config.json"


def supports(fmt: Format, site: Site) -> str | None:
    """Why no algorithm of ModelOpt is the format at the site, or None."""
    if fmt.dense:
        return "ModelOpt leaves dense weights as they are; leave the site out of the policy"
    if fmt.name not in ALGORITHMS:
        return f"no algorithm of ModelOpt computes {fmt.name}; use one of {', '.join(ALGORITHMS)}"
    if site.kind.startswith("expert") or any(layer.transposed for layer in site.layers):
        return "only plain linears are exported to ModelOpt, no experts and none stored transposed (Conv1D)"
    return None if fmt.divides(site.d_in) else f"group={fmt.group} does not divide {site.d_in} inputs"


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for a model with experts."""
    output.check_no_experts(loaded.structure, "modelopt")


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes `hf_quant_config.json` with the table; `edits`, errors: as in `search.export.compressed_tensors.export`."""
    formats = plan.formats_of(loaded, file, edits, supports, "modelopt")
    config = {
        "producer": plan.label(loaded, file),
        "quantization": quantization(formats, output.uncompressed(loaded.model, formats)),
    }
    contents = {FILE: config, "config.json": output.config_of(loaded, loaded.structure.dtype)}
    plan.write(folder, loaded, file, contents, "tensorrt-llm")


def quantization(formats: Mapping[str, Format], dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization` of linears with formats (by module name) among dense ones; `from_config` reads it back."""
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": list(dense),
        "quantized_layers": {name: dict(ALGORITHMS[fmt.name]) for name, fmt in formats.items()},
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Format]:
    """The formats, by module name, of an `hf_quant_config.json` that `export` wrote; raises ValueError for any other."""
    table = config.get("quantization", {}).get("quantized_layers")
    if not isinstance(table, dict):
        raise ValueError(f"{FILE} has no quantized_layers; it is not ModelOpt's of mixed precision")
    formats = {}
    for name, entry in table.items():
        known = [text for text, own in ALGORITHMS.items() if dict(own) == entry]
        if not known:
            raise ValueError(f"{name}: {entry} is not a format of this project")
        formats[name] = parse_format(known[0])
    return formats


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Whether the configuration reads back as the folder's policy; `ids` is not used, because nothing is loaded."""
    return plan.verified(folder, FILE, reference, from_config)
