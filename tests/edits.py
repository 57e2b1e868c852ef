"""Edits made the obvious way, for tests of what is done with edits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.formats.format import Format, parse_format
from methods.formats.numerics import SCALE_DTYPE, Compressed, encode
from methods.method import Edit
from methods.model.load import LoadedModel, load
from methods.model.structure import Structure
from methods.model.weights import weight_of
from methods.policy import Decision, Policy
from tests.tiny import save_tiny


def minmax(weight: Tensor, fmt: Format) -> Compressed:
    """A weight (d_out, d_in) on the grid that its groups span."""
    groups = weight.reshape(weight.shape[0], fmt.groups(weight.shape[1]), -1)
    if fmt.symmetric:
        scale = (groups.abs().amax(-1).clamp_min(1e-8) * 2 / (fmt.levels - 1)).to(SCALE_DTYPE)
        return Compressed.of(fmt, {"codes": encode(weight, fmt, scale), "scale": scale})
    offset = groups.amin(-1).to(SCALE_DTYPE)
    scale = ((groups.amax(-1) - offset.float()).clamp_min(1e-8) / (fmt.levels - 1)).to(SCALE_DTYPE)
    return Compressed.of(fmt, {"codes": encode(weight, fmt, scale, offset), "scale": scale, "offset": offset})


def edits_of(model: Any, structure: Structure, formats: Mapping[str, str]) -> tuple[Policy, dict[str, Edit]]:
    """The policy that rounds sites to formats (by site name), and its edits."""
    edits = {}
    for name, text in formats.items():
        layers = structure.site(name).layers
        edits[name] = Edit({x.name: minmax(weight_of(model.get_submodule(x.name)), parse_format(text)) for x in layers})
    return Policy({name: (Decision.of("rtn", format=text),) for name, text in formats.items()}), edits


def loaded_tiny(folder: Path, arch: str, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """A tiny model as `load` gives it, out of a checkpoint in `dtype`."""
    return load(str(save_tiny(folder / arch, arch, dtype=dtype)), folder / "cache")
