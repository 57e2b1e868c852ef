"""Export to compressed-tensors, which transformers and vLLM load: packed codes, one config group a format, exact module names.

Written with safetensors alone: the package of the same name is needed to load a folder, not to write it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods import policy_file
from methods.formats.format import Format
from methods.formats.numerics import DTYPES, Compressed
from methods.formats.packing import pack
from methods.method import Edit
from methods.model.experts import stacked
from methods.model.structure import Site, Structure
from methods.policy_file import PolicyFile
from search.export import experts, loading
from search.export import folder as output
from search.export.serving import transformers_entry, vllm_entries
from search.export.verification import EXACT, REROUTED, ROUNDED, Verification, compare, read_config, storage_dtype

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
GROUPS = (-1, 32, 64, 128)
_WORD = 32


def supports(fmt: Format, site: Site) -> str | None:
    """Why the format cannot be exported at the site, or None: what every engine of the family loads alike, and nothing else."""
    if fmt.dense:
        return "compressed-tensors leaves dense weights as they are; leave the site out of the policy"
    if any(layer.transposed for layer in site.layers):
        return "compressed-tensors packs nn.Linear only, and this weight is stored transposed (Conv1D)"
    if site.kind.startswith("expert") and fmt.act_bits != 16:
        return "transformers reads experts whose inputs are left alone only; use w4a16 or the like"
    return _grid(fmt) or _shape(fmt, site)


def _grid(fmt: Format) -> str | None:
    if not fmt.plain:
        return f"{fmt.name} is not exported; use integers with bf16 scales, inputs left alone or in int8"
    if not fmt.symmetric:
        return "asymmetric grids do not load alike in all engines; use the symmetric format"
    if fmt.bits not in (4, 8):
        return f"{fmt.bits}-bit codes have no kernel in these engines; use 4 or 8 bits"
    if fmt.act_bits == 8 and fmt.act_group != -1:
        return "activation scales a group cannot be expressed; use one a token (w8a8-token)"
    if fmt.act_bits == 8 and (fmt.bits, fmt.group) != (8, -1):
        return "8-bit activations go with 8-bit weights and one scale a channel (w8a8-token)"
    if fmt.group not in GROUPS:
        return f"group={fmt.group} is not one of {GROUPS}"
    return None


def _shape(fmt: Format, site: Site) -> str | None:
    if not fmt.divides(site.d_in):
        return f"group={fmt.group} does not divide {site.d_in} inputs"
    if _layout(fmt) == PACKED and site.d_in * fmt.bits % _WORD:
        return f"{site.d_in} codes of {fmt.bits} bits do not fill words of {_WORD} bits"
    return None


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for a model that transformers would not load, or experts that it would not read, in these formats."""
    packed = [name for name, fmt in formats.items() if _layout(fmt) == PACKED]
    loading.check_initialised(loaded.model, packed, "transformers")
    if experts.one_format(loaded.structure, formats) is not None:
        experts.parts(loaded.model)


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes the folder: the codes and scales of the edits bit for bit, everything else in the checkpoint's dtype.

    edits: by site, exactly what the policy decides; they may be installed in the model or not.
    Raises ValueError, naming the layer, for what compressed-tensors cannot express, and FileExistsError where `folder` holds something.
    """
    structure = loaded.structure
    table = output.linears(edits)
    output.check(structure, file, edits, supports)
    check_model(loaded, output.formats_of(table))
    packed = experts.one_format(structure, output.formats_of(table))
    ignored, rest = output.uncompressed(loaded.model, table), output.rest(loaded, edits)
    patterns: dict[str, str] = {}
    if packed is None:
        rest = stacked(loaded.model, rest)
    else:
        table, patterns = experts.in_parts(loaded.model, table)
    formats = {patterns.get(layer, layer): compressed.format for layer, compressed in table.items()}
    config = output.config_of(loaded, structure.dtype)
    digest = policy_file.expanded_digest(file.policy, structure)
    config["quantization_config"] = quantization_config(formats, ignored, digest)
    scales = output.in_storage_dtype(_scales(table), structure.dtype)
    tensors = {**rest, **scales, **dict(_codes(table))}
    output.write_folder(folder, loaded, file, tensors, config, _serve(structure, formats), _losses(packed, structure))


def _layout(fmt: Format) -> str:
    return INTEGERS if fmt.act_bits == 8 else PACKED


def _codes(table: Mapping[str, Compressed]) -> Iterator[tuple[str, Tensor]]:
    for layer, compressed in table.items():
        codes, fmt = compressed.payload["codes"], compressed.format
        if _layout(fmt) == INTEGERS:
            yield f"{layer}.weight", (codes.to(torch.int16) - fmt.levels // 2).to(torch.int8)
        else:
            # A row fills whole words, so that packing all rows at once packs each along its inputs.
            yield f"{layer}.weight_packed", pack(codes, fmt.bits).view(torch.int32).view(codes.shape[0], -1)
            yield f"{layer}.weight_shape", torch.tensor(codes.shape, dtype=torch.int64)


def _scales(table: Mapping[str, Compressed]) -> Iterator[tuple[str, Tensor]]:
    for layer, compressed in table.items():
        yield f"{layer}.weight_scale", compressed.payload["scale"]


def quantization_config(formats: Mapping[str, Format], ignore: list[str], policy_digest: str) -> dict[str, Any]:
    """The `quantization_config` of linears with formats (by module name); `from_config` reads it back."""
    groups: dict[str, Any] = {}
    for index, fmt in enumerate(sorted(set(formats.values()))):
        groups[f"group_{index}"] = {
            "targets": [name for name, other in formats.items() if other == fmt],
            "format": _layout(fmt),
            "weights": {
                "num_bits": fmt.bits,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                **({"strategy": "channel"} if fmt.group == -1 else {"strategy": "group", "group_size": fmt.group}),
            },
            "input_activations": _token_activations() if fmt.act_bits == 8 else None,
            "output_activations": None,
        }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        # Without the status transformers takes raw codes for weights and says nothing.
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "ignore": ignore,
        "config_groups": groups,
        "policy_digest": policy_digest,
    }


def _token_activations() -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def from_config(config: Mapping[str, Any]) -> dict[str, Format]:
    """The formats, by module name, of a `quantization_config` that `quantization_config` wrote; raises ValueError for any other."""
    if config.get("quant_method") != "compressed-tensors":
        raise ValueError(f"quant_method={config.get('quant_method')!r} is not compressed-tensors")
    formats: dict[str, Format] = {}
    for name, group in config["config_groups"].items():
        weights, activations = group["weights"], group["input_activations"]
        act_bits = 16 if activations is None else int(activations["num_bits"])
        fmt = Format(int(weights["num_bits"]), int(weights.get("group_size") or -1), bool(weights["symmetric"]), act_bits)
        if weights["type"] != "int" or activations not in (None, _token_activations()):
            raise ValueError(f"{name}: weights={weights}, input_activations={activations} are not a format of this project")
        for target in group["targets"]:
            if target in formats:
                raise ValueError(f"{name}: {target} is in two groups")
            formats[target] = fmt
    return formats


def _losses(experts_format: Format | None, structure: Structure) -> list[dict[str, str]]:
    if experts_format is None:
        return []
    why = f"transformers decodes experts to {structure.dtype}, whatever it computes in, so that their weights are rounded to it"
    return [{"lost": "experts", "why": why}]


def _serve(structure: Structure, formats: Mapping[str, Format]) -> dict[str, Any]:
    if any(site.kind.startswith("expert") for site in structure.sites):
        return {"transformers": transformers_entry(structure.dtype)}
    on_cpu = not any(fmt.bits == 8 and fmt.act_bits == 16 for fmt in formats.values())
    return {"transformers": transformers_entry(structure.dtype), **vllm_entries(structure.dtype, on_cpu)}


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Loads the folder with transformers and compressed-tensors, and compares every weight and prediction with the reference's.

    reference: the fp32 model with the edits installed; ids: (b, t) token ids. Weights have to be equal bit for bit, the predictions
    `EXACT`, or `ROUNDED` with 8-bit activations, which each engine rounds in its own way. Experts, which transformers decodes to the
    checkpoint's dtype, have to be equal to the reference's rounded to it, and the stored codes have to decode to them without rounding.
    Nothing runs faster here: transformers decompresses at the first forward pass.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ValueError(
            "verifying a compressed-tensors export needs the package compressed-tensors; pip install 'isolatency[export]'"
        )
    formats = from_config(read_config(folder).get("quantization_config", {}))
    tolerance = ROUNDED if any(fmt.act_bits == 8 for fmt in formats.values()) else EXACT
    packed = {fmt for target, fmt in formats.items() if target.startswith("re:")}
    if not packed:
        return compare(folder, reference, ids, list(formats), tolerance)
    found = next((told for fmt in packed if (told := experts.damage(folder, reference, fmt))), "")
    rounded = dict.fromkeys(experts.fused_names(reference), DTYPES[storage_dtype(folder)])
    dense = set(output.uncompressed(reference, formats))
    linears = [name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear) and name not in dense]
    result = compare(folder, reference, ids, linears, REROUTED, rounded=rounded)
    return replace(result, ok=False, message=f"{found}; {result.message}") if found else result
