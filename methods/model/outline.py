"""`outline`: a model's structure from its configuration alone, before a weight is read or anything is converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from methods.model.describe import describe
from methods.model.experts import UnsupportedModel, unfuse_experts
from methods.model.load import configuration
from methods.model.quiet import quiet
from methods.model.structure import Structure


@dataclass(frozen=True)
class Outline:
    """A structure, and the model on the device `meta` that showed it: shapes without values."""

    structure: Structure
    model: Any


def outline(spec: str | None, cache: Path, *, fetch: bool = False) -> Outline | None:
    """The structure of what `methods.model.load.load` would load, found in seconds whatever its size.

    Which norms fold is not tested, as it takes values: those that look like it are taken to. None where the architecture's forward pass
    looks at values too, so that only its weights will tell. Raises what `load` raises for a model that it would refuse by its
    configuration, its file's metadata or its layers. fetch: whether the hub is asked for a configuration that is not cached.
    """
    found = configuration(spec, cache, fetch=fetch)
    return None if found is None else outlined(*found)


def outlined(config: Any, dtype: str) -> Outline | None:
    """The outline of a configuration of transformers; as `outline`. dtype: what the weights are stored in."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            model = auto.from_config(config, dtype=torch.float32).eval()
            unfuse_experts(model)
        return Outline(describe(model, dtype), model)
    except UnsupportedModel:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError):
        return None
