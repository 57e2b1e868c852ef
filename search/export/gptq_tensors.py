"""The tensors of GPTQ checkpoints, which AutoRound, vLLM and SGLang read: integers in words of 32 bits, a scale a group, stored transposed.

A linear `P` of weight (d_out, d_in) becomes `P.qweight` int32 (d_in * bits / 32, d_out), codes packed along the inputs; `P.qzeros` int32
(n_groups, d_out * bits / 32), zero points packed along the outputs; `P.scales` fp16 (n_groups, d_out); and for readers that know it
`P.g_idx` int32 (d_in,), each input's group. Least significant bits come first and fields of 3 bits cross words. Stored zero points are
one less than they are: the layout's first version, which all of them read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import Compressed
from methods.formats.packing import pack, unpack
from methods.model.structure import Site
from search.export import loading
from search.export.folder import check_no_experts, in_storage_dtype

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

BITS = (2, 3, 4, 8)
GROUPS = (-1, 32, 64, 128)
MULTIPLE = 32
"""What inputs and outputs of each linear have to be multiples of, so that rows of codes and of zero points fill words."""


def refuses(fmt: Format, site: Site, bits: tuple[int, ...] = BITS) -> str | None:
    """Why the layout cannot hold the format at the site exactly, or None; bits: those that the reader knows."""
    if fmt.dense:
        return "dense weights are left as they are; leave the site out of the policy"
    if any(layer.transposed for layer in site.layers):
        return "only nn.Linear is packed, and this weight is stored transposed (Conv1D)"
    if site.kind.startswith("expert"):
        return "models with experts are not exported"
    return _grid(fmt, bits) or _shape(fmt, site)


def _grid(fmt: Format, bits: tuple[int, ...]) -> str | None:
    if not fmt.plain:
        return f"{fmt.name} is not exported; use integers with bf16 scales"
    if not fmt.symmetric:
        return "zero points are whole numbers, and these offsets are not; use the symmetric format"
    if fmt.act_bits != 16:
        return "inputs are left alone, and this format rounds them; use w4a16 or the like"
    if fmt.bits not in bits:
        return f"{fmt.bits}-bit codes have no kernel in these engines; use {', '.join(map(str, bits))} bits"
    return None if fmt.group in GROUPS else f"group={fmt.group} is not one of {GROUPS}"


def _shape(fmt: Format, site: Site) -> str | None:
    if not fmt.divides(site.d_in):
        return f"group={fmt.group} does not divide {site.d_in} inputs"
    sizes = {site.d_in, *(layer.d_out for layer in site.layers)}
    odd = sorted(size for size in sizes if size % MULTIPLE)
    return f"{odd[0]} inputs or outputs of a linear are no multiple of {MULTIPLE}" if odd else None


def check_model(loaded: LoadedModel, layers: Iterable[str], export: str) -> None:
    """Raises ValueError for a model that the layout's readers would not load, or not exactly, with these linears packed.

    One that is stored in fp32 is rounded to 16 bits by all of them.
    """
    check_no_experts(loaded.structure, export)
    if loaded.structure.dtype == "fp32":
        raise ValueError(
            f"{export}: the model is stored in fp32, and its readers compute in 16 bits; export to the format 'dense'"
        )
    names = list(layers)
    loading.check_plain(loaded.model, names, "auto-round")
    loading.check_constants(loaded.model, names, "auto-round")


def tensors(table: Mapping[str, Compressed], rest: Mapping[str, Tensor], g_idx: bool) -> dict[str, Tensor]:
    """The tensors of compressed linears by name; raises ValueError where a scale, or a bias among `rest`, is beyond fp16."""
    biases = [(name, rest[name]) for name in (f"{layer}.bias" for layer in table) if name in rest]
    # Readers keep biases beside the scales, in fp16.
    in_storage_dtype(biases, "fp16")
    return {**in_storage_dtype(_scales(table), "fp16"), **dict(_codes(table, g_idx))}


def _scales(table: Mapping[str, Compressed]) -> Iterator[tuple[str, Tensor]]:
    for layer, compressed in table.items():
        yield f"{layer}.scales", compressed.payload["scale"].T


def _codes(table: Mapping[str, Compressed], g_idx: bool) -> Iterator[tuple[str, Tensor]]:
    for layer, compressed in table.items():
        codes, fmt = compressed.payload["codes"], compressed.format
        d_out, d_in = codes.shape
        zeros = torch.full((fmt.groups(d_in), d_out), fmt.levels // 2 - 1, dtype=torch.uint8)
        yield f"{layer}.qweight", _words(codes, fmt.bits).T.contiguous()
        yield f"{layer}.qzeros", _words(zeros, fmt.bits)
        if g_idx:
            yield f"{layer}.g_idx", _groups(fmt, d_in)


def _groups(fmt: Format, d_in: int) -> Tensor:
    return torch.arange(d_in, dtype=torch.int32) // fmt.group_size(d_in)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Rows (r, n) of codes as int32 (r, n * bits / 32); a row fills whole words, so that packing all packs each."""
    return pack(codes, bits).view(torch.int32).view(codes.shape[0], -1)


def decoded(stored: Mapping[str, Tensor], layer: str, fmt: Format) -> Tensor:
    """The weight (d_out, d_in) fp32 that the tensors of a linear stand for, by the layout's definition and nothing else.

    Raises KeyError where a tensor is missing and ValueError or IndexError where shapes do not belong together.
    """
    qweight, qzeros, scales = (stored[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales"))
    d_in, d_out = qweight.shape[0] * 32 // fmt.bits, scales.shape[1]
    codes = _fields(qweight.T, fmt.bits, (d_out, d_in)).T.float()
    zeros = _fields(qzeros, fmt.bits, tuple(scales.shape)).float() + 1
    group = stored.get(f"{layer}.g_idx", _groups(fmt, d_in)).long()
    return ((codes - zeros[group]) * scales.float()[group]).T


def _fields(words: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    return unpack(words.contiguous().view(torch.uint8).flatten(), bits, shape)


def damage(folder: Path, reference: Any, formats: Mapping[str, Format]) -> str:
    """What the folder's tensors decode to if not the reference's weights bit for bit, in words; "" where they do."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    for layer, fmt in formats.items():
        try:
            found = decoded(stored, layer, fmt)
        except (KeyError, ValueError, IndexError) as error:
            return f"{layer} cannot be decoded: {error}"
        expected = reference.get_submodule(layer).weight
        if found.shape != expected.shape or not torch.equal(found, expected):
            return f"the tensors of {layer} do not decode to the evaluated weights"
    return ""


def runtime_weights(model: Any) -> dict[str, Tensor]:
    """The tensors of a loaded model by stock names, each packed linear's weight being what it makes of the identity: exact in fp32."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] not in _PARTS}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            state[f"{name}.weight"] = _effective(module)
    return state


def _effective(module: Any) -> Tensor:
    bias, module.bias = module.bias, None
    with torch.inference_mode():
        weight: Tensor = module(torch.eye(module.infeatures)).T
    # Subtracting the bias instead would round.
    module.bias = bias
    return weight


_PARTS = ("qweight", "qzeros", "scales", "g_idx")
