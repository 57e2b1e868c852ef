"""Experts under the names of checkpoints on the hub, where one fused tensor of transformers is several, one for each expert and part.

The names and the rows are asked of transformers itself, which knows the way from its own tensors back to a checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import Compressed, decode
from methods.formats.packing import unpack
from methods.model.experts import STACKED, UnfusedExperts
from methods.model.structure import Structure

_ROWS = 4
"""Rows of the markers whose way is watched: enough to tell halves from rows that alternate."""


@dataclass(frozen=True)
class Part:
    """What a checkpoint keeps of a linear of an unfused expert.

    name: of the checkpoint's linear, without `.weight`; layer: of the unfused linear; start, stop: its rows, as shares of all of them.
    """

    name: str
    layer: str
    start: float
    stop: float

    def rows(self, tensor: Tensor) -> Tensor:
        """This part of a tensor with a row for each output of the unfused linear."""
        n = tensor.shape[0]
        return tensor[round(self.start * n) : round(self.stop * n)].contiguous()


def checkpoint_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' own names (`methods.model.experts.stock_state_dict`) -> by the names of checkpoints on the hub."""
    from transformers.core_model_loading import revert_weight_conversion

    result: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return result


def parts(model: Any) -> tuple[Part, ...]:
    """The parts of all experts of a model that has them unfused.

    Raises ValueError for a family whose checkpoints keep experts stacked, or their rows in another order.
    """
    return tuple(
        part
        for name, module in model.named_modules()
        if isinstance(module, UnfusedExperts)
        for leaf in STACKED
        for part in _parts(model, name, leaf, len(module))
    )


def _parts(model: Any, name: str, leaf: str, n_experts: int) -> Iterator[Part]:
    marker = torch.arange(_ROWS * n_experts).view(n_experts, _ROWS, 1)
    for found, rows in checkpoint_state(model, {f"{name}.{leaf}": marker}).items():
        expert, first = divmod(int(rows.flatten()[0]), _ROWS)
        in_order = torch.equal(rows.flatten(), torch.arange(len(rows.flatten())) + rows.flatten()[0])
        if rows.dim() != 2 or not in_order:
            raise ValueError(
                f"checkpoints of a {type(model).__name__} keep experts in one tensor, or their rows in another order ({found})"
            )
        yield Part(found.removesuffix(".weight"), f"{name}.{expert}.{leaf}", first / _ROWS, (first + len(rows)) / _ROWS)


def pattern(name: str) -> str:
    """The regular expression of a linear's name in any block and for any expert."""
    words = (r"\d+" if word.isdigit() else re.escape(word) for word in name.split("."))
    return r"\.".join(words) + "$"


def in_parts(model: Any, table: Mapping[str, Compressed]) -> tuple[dict[str, Compressed], dict[str, str]]:
    """Compressed linears by name, with those of experts in the parts that checkpoints keep; and a pattern for each of their names.

    Raises ValueError as `parts` does.
    """
    result = {name: compressed for name, compressed in table.items()}
    patterns = {}
    for part in parts(model):
        whole = table[part.layer]
        result.pop(part.layer, None)
        payload = {name: part.rows(tensor) for name, tensor in whole.payload.items()}
        result[part.name] = Compressed(part.rows(whole.dense), payload, whole.format)
        patterns[part.name] = f"re:{pattern(part.name)}"
    return result, patterns


def one_format(structure: Structure, formats: Mapping[str, Format]) -> Format | None:
    """The format of all experts of a model, None where none is compressed; formats: of the compressed linears, by name.

    Raises ValueError where they are not alike: transformers reads experts by one scheme, which it looks for by their names, and drops
    those that are stored dense beside it.
    """
    layers = [layer.name for site in structure.sites if site.kind.startswith("expert") for layer in site.layers]
    found = {formats.get(name) for name in layers}
    if len(found) > 1:
        told = ", ".join(sorted("dense" if fmt is None else fmt.name for fmt in found))
        raise ValueError(
            f"the experts have {told}, and transformers reads one format for all experts of a model; give all of them one, or export to "
            "the format 'dense'"
        )
    return found.pop() if found else None


def damage(folder: Path, reference: Any, fmt: Format) -> str:
    """What the folder's packed experts decode to if not the reference's weights bit for bit, in words; "" where they do."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
        for part in parts(reference):
            if f"{part.name}.weight_packed" not in names or f"{part.name}.weight_scale" not in names:
                return f"{part.name} is missing"
            words, scale = (stored.get_tensor(f"{part.name}.weight_{kind}") for kind in ("packed", "scale"))
            expected = part.rows(reference.get_submodule(part.layer).weight)
            codes = unpack(words.view(torch.uint8).flatten(), fmt.bits, tuple(expected.shape))
            if not torch.equal(decode(fmt, {"codes": codes, "scale": scale}), expected):
                return f"the tensors of {part.name} do not decode to the evaluated weights"
    return ""


def fused_names(model: Any) -> tuple[str, ...]:
    """The names of transformers' own tensors of all experts of a model that has them unfused."""
    found = (name for name, module in model.named_modules() if isinstance(module, UnfusedExperts))
    return tuple(f"{name}.{leaf}" for name in found for leaf in STACKED)
