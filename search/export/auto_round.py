"""Export to AutoRound's configuration over GPTQ's tensors, which transformers (with the package auto-round) and vLLM load.

Formats stand by the linears' exact names in `extra_config`, mixed as they come; nothing but safetensors is needed to write it.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods import policy_file
from methods.formats.format import Format
from methods.formats.numerics import DTYPES
from methods.method import Edit
from methods.model.structure import Site, Structure
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export import gptq_tensors
from search.export.serving import transformers_entry, vllm_entries
from search.export.verification import EXACT, Verification, compare, read_config, stock, storage_dtype

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

VERSION = "0.16.1"
"""Whose layout this is."""

PACKING = "auto_round:auto_gptq"
VLLM_BITS = (4, 8)
_DENSE = {"bits": 16, "data_type": "float"}


def supports(fmt: Format, site: Site) -> str | None:
    """Why the format cannot be exported at the site, or None."""
    return gptq_tensors.refuses(fmt, site)


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for a model that auto-round would not load, or not exactly, with these linears compressed."""
    gptq_tensors.check_model(loaded, formats, "auto-round")


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes the folder: codes and scales of the edits exactly, everything else in the checkpoint's dtype.

    `edits`, errors: as in `search.export.compressed_tensors.export`.
    """
    structure = loaded.structure
    table = output.linears(edits)
    output.check(structure, file, edits, supports)
    formats = output.formats_of(table)
    check_model(loaded, formats)
    config = output.config_of(loaded, structure.dtype)
    digest = policy_file.expanded_digest(file.policy, structure)
    config["quantization_config"] = quantization_config(
        formats, output.uncompressed(loaded.model, formats), blocks(structure), digest
    )
    rest = output.rest(loaded, edits)
    # Its own checkpoints have no g_idx, and transformers would report each as unexpected.
    state = {**rest, **gptq_tensors.tensors(table, rest, g_idx=False)}
    output.write_folder(folder, loaded, file, state, config, _serve(structure, formats), [])


def blocks(structure: Structure) -> str:
    """The path that all decoder blocks stand under, `model.layers`."""
    return structure.blocks[0].rpartition(".")[0]


def commonest(formats: Mapping[str, Format]) -> Format:
    """The format of the most linears: what a configuration's default says."""
    return Counter(formats.values()).most_common(1)[0][0]


def quantization_config(formats: Mapping[str, Format], dense: Sequence[str], parent: str, policy_digest: str) -> dict[str, Any]:
    """The `quantization_config` of linears with formats (by module name) among dense ones; `from_config` reads it back.

    parent: the path of the decoder blocks. Every linear is named, so that the default decides nothing.
    """
    usual = commonest(formats)
    entries: dict[str, Any] = {name: _entry(fmt) for name, fmt in formats.items()}
    return {
        "quant_method": "auto-round",
        "packing_format": PACKING,
        "autoround_version": VERSION,
        "data_type": "int",
        **_entry(usual),
        "block_name_to_quantize": parent,
        "extra_config": {**entries, **{name: dict(_DENSE) for name in dense}},
        "policy_digest": policy_digest,
    }


def _entry(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group, "sym": True}


def from_config(config: Mapping[str, Any]) -> dict[str, Format]:
    """The formats, by module name, of a `quantization_config` that `quantization_config` wrote; raises ValueError for any other."""
    if (config.get("quant_method"), config.get("packing_format")) != ("auto-round", PACKING):
        raise ValueError(
            f"quant_method={config.get('quant_method')!r} with packing_format={config.get('packing_format')!r} is not "
            f"auto-round with {PACKING}"
        )
    formats = {}
    for name, entry in config["extra_config"].items():
        if entry.get("bits", config["bits"]) < 16:
            if not entry.get("sym", config["sym"]):
                raise ValueError(f"{name}: sym=false is not a format of this project")
            formats[name] = Format(entry.get("bits", config["bits"]), entry.get("group_size", config["group_size"]))
    return formats


def _serve(structure: Structure, formats: Mapping[str, Format]) -> dict[str, Any]:
    bits = {fmt.bits for fmt in formats.values()}
    vllm = vllm_entries(structure.dtype, cpu=bits == {4}) if bits <= set(VLLM_BITS) else {}
    return {"transformers": transformers_entry(structure.dtype), **vllm}


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Decodes the written tensors, then loads the folder with transformers and auto-round; both have to give the evaluated weights.

    `reference`, `ids`: as in `search.export.compressed_tensors.verify`. Predictions have to be `EXACT`.
    """
    return verify_packed(folder, reference, ids, from_config(read_config(folder).get("quantization_config", {})))


def verify_packed(folder: Path, reference: Any, ids: Tensor, formats: Mapping[str, Format], **options: Any) -> Verification:
    """`verify` for any folder that auto-round's kernels read, with what the linears should be; options: for `from_pretrained`."""
    missing = [name for name in ("auto_round", "cpuinfo") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"verifying this export needs the packages auto-round and py-cpuinfo ({', '.join(missing)} is missing); "
            "pip install 'isolatency[export]'"
        )

    def load(path: Path) -> tuple[Any, Mapping[str, Any]]:
        # Its kernels take 16 bits only, and are exact in fp32: scales have been read as they are by then.
        model, info = stock(path, dtype=DTYPES[storage_dtype(path)], **options)
        unexpected = [key for key in info["unexpected_keys"] if not key.endswith(".g_idx")]
        return torch.nn.Module.float(model), {**info, "unexpected_keys": unexpected}

    found = gptq_tensors.damage(folder, reference, formats)
    result = compare(folder, reference, ids, list(formats), EXACT, load, gptq_tensors.runtime_weights)
    return replace(result, ok=False, message=f"{found}; {result.message}") if found else result
