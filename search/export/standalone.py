"""Exporting a checkpoint without a study: what `search materialize` made of a policy file, in any format of the library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods import checkpoint, policy_file
from methods.apply import Installer
from methods.lift import Lifted
from methods.model.load import MARKER
from methods.model.positions import learned_positions
from methods.model.tokenizer import n_embeddings
from search.export import checked
from search.export.registry import exporter
from search.files import check_new_folder

if TYPE_CHECKING:
    from methods.model.load import LoadedModel
    from search.export.verification import Verification

_TEXT = (
    "In the spring the river rises over its banks and covers the low fields with a thin layer of mud. The farmers wait until the water "
    "has gone, then they plough and sow. By the end of June the corn is as high as a child; in September it is cut, dried and taken to "
    "the mill, which has stood at the old bridge since 1786."
)
"""Both sides are compared on it; that is all it is for, and nothing is said of quality."""


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a compressed checkpoint of this project."""
    return (folder / MARKER).is_file()


def export_checkpoint(folder: Path, name: str, out: Path) -> Verification:
    """Exports a compressed checkpoint to the format `name` in `out`, loads that back and compares it with the checkpoint's weights.

    Raises ValueError for what the format cannot express and where the loaded model is another, CorruptCheckpoint as
    `methods.checkpoint.read` does, ConfigError where `out` holds something or nothing can be written there.
    """
    module = exporter(name)
    check_new_folder(out, "--out")
    stored, loaded = checkpoint.read(folder), checkpoint.load_dense(folder)
    file = policy_file.parse(stored.policy_text, loaded.structure)
    edits = Lifted(stored.edits, loaded.structure, loaded.model)

    def verify(place: Path) -> Verification:
        with Installer(loaded.model, loaded.structure) as installer:
            for site, edit in edits.items():
                installer.install(site, edit)
            return module.verify(place, loaded.model, sample_tokens(loaded))

    return checked.export(out, lambda place: module.export(place, loaded, file, edits), verify)


def sample_tokens(loaded: LoadedModel) -> Tensor:
    """Token ids (1, t) of a plain text, as long as the model reads it, or drawn with a fixed seed where it has no tokenizer for it."""
    length, rows = learned_positions(loaded.model), n_embeddings(loaded.model)
    if loaded.tokenizer is not None:
        ids = torch.tensor([loaded.tokenizer(_TEXT)["input_ids"][:length]])
        if int(ids.max()) < rows:
            return ids
    generator = torch.Generator().manual_seed(0)
    return torch.randint(loaded.structure.n_vocab, (1, 64), generator=generator)[:, :length]
