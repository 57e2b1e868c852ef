"""Export as torchao's tensors with an `FqnToConfig` of exact names, which transformers loads with the package torchao.

Codes of fewer than 8 bits stand in bytes of their own there (torchao's packed layouts need CUDA), which `losses.json` says. Written with
safetensors alone; what makes a tensor out of parts stands in the file's metadata, as torchao writes it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from methods import policy_file
from methods.formats.format import Format
from methods.formats.numerics import DTYPES, Compressed
from methods.method import Edit
from methods.model.structure import Site
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export import loading
from search.export.serving import transformers_entry
from search.export.verification import EXACT, ROUNDED, Verification, compare, read_config, stock, storage_dtype

if TYPE_CHECKING:
    from methods.model.load import LoadedModel


def supports(fmt: Format, site: Site) -> str | None:
    """Why the format cannot be exported at the site, or None."""
    if fmt.dense:
        return "torchao leaves dense weights as they are; leave the site out of the policy"
    if any(layer.transposed for layer in site.layers):
        return "torchao takes nn.Linear only, and this weight is stored transposed (Conv1D)"
    if site.kind.startswith("expert"):
        return "models with experts are not exported to torchao"
    return _grid(fmt) or (None if fmt.divides(site.d_in) else f"group={fmt.group} does not divide {site.d_in} inputs")


def _grid(fmt: Format) -> str | None:
    if not fmt.plain:
        return f"{fmt.name} is not exported; use integers with bf16 scales, inputs left alone or in int8"
    if not fmt.symmetric:
        return "zero points are whole numbers, and these offsets are not; use the symmetric format"
    if fmt.act_bits == 8 and (fmt.bits, fmt.group, fmt.act_group) != (8, -1, -1):
        return "int8 inputs go with 8-bit weights, one scale a channel and one a token (w8a8-token)"
    return None


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for a model with experts, or with linears of a class of their own, which torchao does not replace."""
    output.check_no_experts(loaded.structure, "torchao")
    loading.check_plain(loaded.model, formats, "torchao")


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes the folder; `edits`, errors: as in `search.export.compressed_tensors.export`."""
    structure = loaded.structure
    table = output.linears(edits)
    output.check(structure, file, edits, supports)
    formats = output.formats_of(table)
    check_model(loaded, formats)
    config = output.config_of(loaded, structure.dtype)
    digest = policy_file.expanded_digest(file.policy, structure)
    config["quantization_config"] = quantization_config(formats, output.uncompressed(loaded.model, formats), digest)
    rest = output.rest(loaded, edits)
    parts = output.in_storage_dtype(_parts(table), structure.dtype)
    serve = {"transformers": transformers_entry(structure.dtype)}
    output.write_folder(
        folder, loaded, file, {**rest, **parts}, config, serve, _losses(formats), _metadata(table, rest, config["dtype"])
    )


def _parts(table: Mapping[str, Compressed]) -> Iterator[tuple[str, Tensor]]:
    for layer, compressed in table.items():
        codes, scale, fmt = compressed.payload["codes"], compressed.payload["scale"], compressed.format
        yield f"{layer}._weight_qdata", (codes.to(torch.int16) - fmt.levels // 2).to(torch.int8)
        yield f"{layer}._weight_scale", scale
        if not _whole_rows(fmt):
            yield f"{layer}._weight_zero_point", torch.zeros(scale.shape, dtype=torch.int8)


def _whole_rows(fmt: Format) -> bool:
    """Whether it is torchao's int8 tensor, which has kernels; everything else is its intx, which is decoded."""
    return (fmt.bits, fmt.group) == (8, -1)


def _metadata(table: Mapping[str, Compressed], rest: Mapping[str, Tensor], dtype: str) -> dict[str, str]:
    """What torchao puts together: for each tensor of the model the class, its attributes and the parts that are stored."""
    found = {name: json.dumps({"_type": "Tensor"}) for name in rest}
    for layer, compressed in table.items():
        fmt, (_, d_in) = compressed.format, compressed.dense.shape
        data: dict[str, Any] = {"block_size": [1, fmt.group_size(d_in)], "dtype": _torch(dtype)}
        if _whole_rows(fmt):
            kind, names = "Int8Tensor", ["qdata", "scale"]
            data |= {"act_quant_kwargs": _token_activations() if fmt.act_bits == 8 else None, "reduce_range": False}
        else:
            kind, names = "IntxUnpackedToInt8Tensor", ["qdata", "scale", "zero_point"]
            data |= {"target_dtype": _torch(f"int{fmt.bits}"), "activation_quantization": None}
        found[f"{layer}.weight"] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})
    return {**found, "tensor_names": json.dumps(list(found))}


def _token_activations() -> dict[str, Any]:
    fields = {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    }
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": fields}


def _torch(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def quantization_config(formats: Mapping[str, Format], dense: Sequence[str], policy_digest: str) -> dict[str, Any]:
    """The `quantization_config` of linears with formats (by module name) among dense ones; `from_config` reads it back."""
    entries: dict[str, Any] = {name: _entry(fmt) for name, fmt in formats.items()}
    table = {**entries, **dict.fromkeys(dense)}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": table}}},
        "policy_digest": policy_digest,
    }


def _entry(fmt: Format) -> dict[str, Any]:
    if _whole_rows(fmt):
        name = "Int8DynamicActivationInt8WeightConfig" if fmt.act_bits == 8 else "Int8WeightOnlyConfig"
        return {"_type": name, "_version": 2, "_data": {}}
    by_group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": fmt.group}}
    granularity = by_group if fmt.group != -1 else {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    return {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {"weight_dtype": _torch(f"int{fmt.bits}"), "granularity": granularity},
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Format]:
    """The formats, by module name, of a `quantization_config` that `quantization_config` wrote; raises ValueError for any other."""
    try:
        default = config["quant_type"]["default"]
        table = default["_data"]["fqn_to_config"]
        if config["quant_method"] != "torchao" or default["_type"] != "FqnToConfig":
            raise KeyError("quant_method")
        return {name: _format(entry) for name, entry in table.items() if entry is not None}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the quantization_config is not torchao's FqnToConfig as this project writes it ({error})") from None


def _format(entry: Mapping[str, Any]) -> Format:
    if entry["_type"] != "IntxWeightOnlyConfig":
        return Format(8, act_bits={"Int8WeightOnlyConfig": 16, "Int8DynamicActivationInt8WeightConfig": 8}[entry["_type"]])
    data = entry["_data"]
    bits = int(data["weight_dtype"]["_data"].removeprefix("int"))
    return Format(bits, int(data["granularity"]["_data"].get("group_size", -1)))


def _losses(formats: Mapping[str, Format]) -> list[dict[str, str]]:
    narrow = sum(fmt.bits < 8 for fmt in formats.values())
    if not narrow:
        return []
    return [{"lost": "memory", "why": f"no size gain below 8 bit on CPU: the codes of {narrow} linears take a byte each"}]


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Loads the folder with transformers and torchao, and compares; `reference`, `ids` as in `search.export.compressed_tensors.verify`.

    Weights have to be equal bit for bit, the predictions `EXACT`, or `ROUNDED` with 8-bit activations, whose scales torchao makes a
    little smaller.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("verifying a torchao export needs the package torchao; pip install 'isolatency[export]'")
    formats = from_config(read_config(folder).get("quantization_config", {}))
    tolerance = ROUNDED if any(fmt.act_bits == 8 for fmt in formats.values()) else EXACT
    dtype = DTYPES[storage_dtype(folder)]

    def load(path: Path) -> tuple[Any, Mapping[str, Any]]:
        # It loads in the dtype that was written and no other; from there on fp32 is exact.
        model, info = stock(path, dtype=dtype)
        return _in_fp32(model), info

    return compare(folder, reference, ids, list(formats), tolerance, load, _dequantized)


def _in_fp32(model: Any) -> Any:
    torch.nn.Module.float(model)
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        # Its int8 tensor computes in the dtype of the inputs anyway; the other one in its own, which the module's cast does not reach.
        if hasattr(weight, "target_dtype"):
            module.weight = torch.nn.Parameter(weight.to(torch.float32), requires_grad=False)
    return model


def _dequantized(model: Any) -> dict[str, Tensor]:
    return {name: _decoded(tensor) for name, tensor in model.state_dict().items()}


def _decoded(tensor: Any) -> Tensor:
    if not hasattr(tensor, "qdata"):
        return cast(Tensor, tensor)
    return cast(Tensor, tensor.dequantize() if hasattr(tensor, "target_dtype") else tensor.dequantize(torch.float32))
