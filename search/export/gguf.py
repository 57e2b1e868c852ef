"""Export to GGUF, which llama.cpp and transformers load: one file, a type of its own for every tensor, tokenizer and sizes inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods import atomic, policy_file
from methods.checkpoint import narrow
from methods.formats.format import Format
from methods.formats.gguf_blocks import pack_blocks
from methods.formats.gguf_types import DENSE_TYPES, SMALLEST, block_size, block_type, input_rounding, refuses
from methods.formats.numerics import DTYPES, Compressed
from methods.method import Edit
from methods.model.experts import stock_state_dict
from methods.model.structure import Site, Structure
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export.gguf_layout import MODEL, Family, family, names, row_order
from search.export.gguf_metadata import add_metadata
from search.export.gguf_rope import TENSOR, divisors, kind_of
from search.export.gguf_tokenizer import probes, vocabulary
from search.export.gguf_verify import verify
from search.export.serving import with_cache
from search.generate import cache_format

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

__all__ = ["export", "supports", "verify"]

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def supports(fmt: Format, site: Site) -> str | None:
    """Why no GGML type holds the format's weights at the site bit for bit, or None. There is no fallback to another type."""
    if fmt.dense:
        return "GGUF holds dense weights as they are; leave the site out of the policy"
    if any(layer.transposed for layer in site.layers):
        return "this weight is stored transposed (Conv1D), as in no architecture that is written to GGUF"
    if site.kind.startswith("expert"):
        return "models with experts are not written to GGUF"
    return refuses(fmt, site.d_in)


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for an architecture that the file could not describe, or a tokenizer that it could not hold."""
    family(loaded.structure, loaded.model.config)
    output.check_no_experts(loaded.structure, "GGUF")
    if loaded.shapes_alone:
        return
    if loaded.tokenizer is None:
        raise ValueError("a GGUF holds the tokenizer, and this model has none; add tokenizer.json to its folder")
    vocabulary(loaded.tokenizer, loaded.structure.n_vocab)
    probes(loaded.tokenizer)


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes `model.gguf` with `policy.yaml`, `serve.json`, `losses.json` and `tokens.json`, what the tokenizer makes of a few texts.

    edits: by site, exactly what the policy decides; they may be installed in the model or not. Raises ValueError for what a GGUF cannot
    hold exactly, an architecture or a tokenizer that it could not describe, and FileExistsError where `folder` holds something.
    """
    structure, config = loaded.structure, loaded.model.config
    table = output.linears(edits)
    check_model(loaded, output.formats_of(table))
    output.check(structure, file, edits, supports)
    kind = family(structure, config)
    words = vocabulary(loaded.tokenizer, structure.n_vocab)
    contents: dict[str, Any] = {"tokens.json": probes(loaded.tokenizer)}
    contents["serve.json"], lost = with_cache(
        _serve(structure, kind_of(config)), cache_format(file.policy, structure), structure.dtype
    )
    contents["losses.json"] = [*_rotary(kind_of(config)), *_losses(table, structure), *lost]
    with atomic.new_folder(folder) as staging:
        from gguf import GGUFWriter

        writer = GGUFWriter(staging / MODEL, kind.name)
        digest = policy_file.expanded_digest(file.policy, structure)
        add_metadata(writer, structure, config, loaded.label, digest, words)
        _add_tensors(writer, loaded, kind, edits)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        output.write_texts(staging, loaded, file, contents)


def _add_tensors(writer: Any, loaded: LoadedModel, kind: Family, edits: Mapping[str, Edit]) -> None:
    structure = loaded.structure
    state: dict[str, Tensor | Compressed] = dict(stock_state_dict(loaded.model))
    for edit in edits.values():
        state |= edit.tensors
        state |= {f"{name}.weight": compressed for name, compressed in edit.linears.items()}
    if structure.tied:
        state.pop(f"{structure.head}.weight", None)
    for parameter, name in names(state, structure, kind).items():
        type_name, rows = _stored(parameter, state[parameter], structure)
        order = row_order(parameter, structure, kind)
        _add(writer, name, rows if order is None else rows[order], type_name)
    divided = divisors(loaded.model.config, structure.head_dim)
    if divided is not None:
        _add(writer, TENSOR, divided, "F32")


def _stored(name: str, value: Tensor | Compressed, structure: Structure) -> tuple[str, NDArray[Any]]:
    """The type's name and the rows, as bytes but for fp32: blocks, or the checkpoint's dtype where that is exact, F32 otherwise."""
    if isinstance(value, Compressed):
        try:
            return str(block_type(value.format)), pack_blocks(value.format, value.payload)
        except ValueError as error:
            raise ValueError(f"{name.removesuffix('.weight')}: {error}") from None
    # llama.cpp computes norms and biases in fp32 and wants them so.
    tensor = value.float() if value.dim() == 1 else narrow(value, structure.dtype)
    rows = tensor.contiguous()
    return _NAMES[tensor.dtype], rows.numpy() if tensor.dtype == torch.float32 else rows.view(torch.uint8).numpy()


def _add(writer: Any, name: str, rows: NDArray[Any], type_name: str) -> None:
    from gguf import GGMLQuantizationType

    writer.add_tensor(name, np.ascontiguousarray(rows), raw_dtype=GGMLQuantizationType[type_name])


def _rotary(kind: str) -> list[dict[str, str]]:
    """What readers leave out of a rotary embedding."""
    if kind == "default":
        return []
    why = f"transformers: reads a GGUF without its {kind} scaling of the rotary embedding, and so as another model; llama.cpp reads it"
    return [{"lost": "rotary scaling", "why": why}]


def _serve(structure: Structure, rotary: str) -> dict[str, Any]:
    """By engine, how it runs the file; rotary: the rule of its rotary embedding."""
    llama_cpp: dict[str, Any] = {"llama.cpp": {"command": ["llama-server", "--model", MODEL]}}
    if rotary != "default":
        return llama_cpp
    dtype = str(DTYPES[structure.dtype]).removeprefix("torch.")
    python = f"AutoModelForCausalLM.from_pretrained('.', gguf_file='{MODEL}', dtype='{dtype}')"
    return {**llama_cpp, "transformers": {"python": python, "faster": False}}


def _losses(table: Mapping[str, Compressed], structure: Structure) -> list[dict[str, str]]:
    losses = []
    for fmt, count in Counter(compressed.format for compressed in table.values()).items():
        rounding, name = input_rounding(fmt), str(block_type(fmt))
        if rounding:
            why = f"llama.cpp on a CPU: inputs of {count} linears are {rounding}, which is not the rule of {fmt.name}"
            losses.append({"lost": "activations", "why": why})
        if block_size(name) == SMALLEST and fmt.group != SMALLEST:
            why = f"{count} linears in {fmt.name} are stored as {name}, which repeats their scales for every {SMALLEST} inputs"
            losses.append({"lost": "size", "why": why})
    if any(compressed.format.act_bits < 16 for compressed in table.values()):
        losses.append({"lost": "activations", "why": "transformers: decodes the weights and rounds no inputs"})
    dense = DENSE_TYPES[structure.dtype]
    return [*losses, {"lost": "size", "why": f"embeddings and head are {dense}, because policies decide on linears alone"}]
