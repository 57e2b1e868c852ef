"""Models that an engine's way of loading does not survive, told by the layer and before anything is written.

Each check looks for the cause, which no architecture's name tells: what the engine replaces, and what the model then misses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def check_plain(model: Any, layers: Iterable[str], engine: str) -> None:
    """Raises ValueError for a linear of a class of its own, as Falcon's are: engines replace `nn.Linear` by its class, or not at all."""
    for name in layers:
        kind = type(model.get_submodule(name))
        if kind is not nn.Linear:
            raise ValueError(
                f"{name} is a {kind.__name__}, and {engine} replaces nn.Linear alone; export to the format 'dense'"
            )


def check_constants(model: Any, layers: Iterable[str], engine: str) -> None:
    """Raises ValueError for a linear beside a constant that no checkpoint holds, such as GPT-J's table of rotations.

    auto-round calls the module around each linear that it replaces initialised, so that transformers leaves the module's constants what
    the memory held before.
    """
    stored = set(model.state_dict())
    for name in layers:
        parent = name.rpartition(".")[0]
        constants = (f"{parent}.{own}" for own, _ in model.get_submodule(parent).named_buffers(recurse=False))
        lost = next((constant for constant in constants if constant not in stored), None)
        if lost is not None:
            raise ValueError(
                f"{lost} is not stored and stands beside the linear {name}, so that {engine} loads it as whatever the memory held; export "
                "to the format 'dense' or 'compressed-tensors'"
            )


def check_initialised(model: Any, layers: Iterable[str], engine: str) -> None:
    """Raises ValueError where transformers initialises, while it loads, the weight of a linear that is packed and so has none.

    A model's own `_init_weights` runs on every module that has not all of its tensors from the folder. It is run here on a model without
    memory whose packed linears have no weight.
    """
    with torch.device("meta"):
        frame = type(model)(copy.deepcopy(model.config))
    packed = [name for name in layers if name in dict(frame.named_modules())]
    for name in packed:
        del frame.get_submodule(name).weight
    for name, module in frame.named_modules():
        try:
            frame._init_weights(module)
        except AttributeError as error:
            raise ValueError(
                f"{name} of {type(model).__name__} is initialised on loading by a weight that is packed ({error}), so that {engine} cannot "
                "load it; export to the format 'dense'"
            ) from None
