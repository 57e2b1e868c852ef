"""A loaded model's configuration, made to say what the model is: what is saved and exported takes it from there."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from methods.model.structure import Structure

ABSENT = re.compile(r"(^|_)(mtp|nextn)(_|$)")
"""Names, in a configuration and of modules, that speak of next-token-prediction blocks."""


def settle_(model: Any) -> bool:
    """Whether the configuration had tied the head to an embedding that it is not; afterwards it says what the tensors are.

    Names that speak of next-token-prediction blocks leave the configuration of a model that holds none. Engines obey both: they would
    read the embedding as the head, or look for weights that are in no file.
    """
    tied, absent = is_tied(model), not any(ABSENT.search(name.replace(".", "_")) for name, _ in model.named_modules())
    wrong = False
    for config in (model.config, model.config.get_text_config()):
        wrong = wrong or (not tied and bool(getattr(config, "tie_word_embeddings", False)))
        config.tie_word_embeddings = tied
        for name in [name for name in vars(config) if absent and ABSENT.search(name)]:
            delattr(config, name)
    return wrong


def is_tied(model: Any) -> bool:
    """Whether the output projection and the input embedding are one tensor; False for a model that lacks one of them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        return False
    return bool(head.weight.data_ptr() == embedding.weight.data_ptr())


def untie_(model: Any, structure: Structure, head: Tensor) -> Structure:
    """Gives the output projection a weight of its own, and the configuration says so; the structure that the model has then."""
    model.get_submodule(structure.head).weight = nn.Parameter(head, requires_grad=False)
    settle_(model)
    return replace(structure, tied=False, n_parameters=structure.n_parameters + head.numel())
