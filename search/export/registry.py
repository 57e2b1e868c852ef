"""Export formats by name; a format's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from methods.formats.format import Format
from methods.model.structure import Site
from methods.policy_file import PolicyFile

if TYPE_CHECKING:
    from torch import Tensor

    from methods.method import Edit
    from methods.model.load import LoadedModel
    from search.export.verification import Verification

EXPORTERS: Mapping[str, str] = MappingProxyType(
    {
        "compressed-tensors": "search.export.compressed_tensors",
        "auto-round": "search.export.auto_round",
        "gptq": "search.export.gptq",
        "torchao": "search.export.torchao",
        "gguf": "search.export.gguf",
        "dense": "search.export.dense",
        "modelopt": "search.export.modelopt",
        "mlx": "search.export.mlx",
    }
)
"""The module of every export format."""


class Exporter(Protocol):
    """What the module of an export format offers."""

    def supports(self, fmt: Format, site: Site) -> str | None:
        """Why the format cannot be written at the site, or None."""
        ...

    def check_model(self, loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
        """Raises ValueError, as `export` does, for a model that is not written with these linears, by name, in these formats.

        No weight is read: shapes tell, and the tokenizer where it is there.
        """
        ...

    def export(self, folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
        """Writes a folder that the runtime loads, with `policy.yaml`, `serve.json` and `losses.json`, whole or not at all."""
        ...

    def verify(self, folder: Path, reference: object, ids: Tensor) -> Verification:
        """Loads the folder and compares it with the reference model, in which the edits are installed."""
        ...


def exporter(name: str) -> Exporter:
    """The exporter of a name; raises ValueError with the known ones otherwise."""
    if name not in EXPORTERS:
        raise ValueError(f"unknown export format {name!r}; use one of {', '.join(EXPORTERS)}")
    return cast(Exporter, importlib.import_module(EXPORTERS[name]))
