"""What a checkpoint holds beside the model: tensors that transformers leaves out, named instead of dropped without a word."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from methods.model.settings import ABSENT

_HARMLESS = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention|self_attn|self_attention)\.(masked_)?bias)$")
"""Buffers that old checkpoints hold and models make anew: rotary frequencies, positions, causal masks."""

_PREDICTION = "next-token-prediction block"
_KINDS = (
    (_PREDICTION, re.compile(r"(^|[._])(mtp|nextn)")),
    ("adapter", re.compile(r"(^|[._])(lora|adapter)")),
    ("vision or audio part", re.compile(r"(^|[._])(vision|visual|image|audio|multi_modal|mm_projector)")),
)
_SHOWN = 2
"""Places that are named of one kind."""


@contextlib.contextmanager
def nothing_hidden(config: Any) -> Iterator[None]:
    """Inside, transformers names every tensor that a model of this configuration does not take.

    Model classes list names that loading passes over in silence, next-token-prediction blocks among them.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    _ = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # imports the model's classes
    name = "_keys_to_ignore_on_load_unexpected"
    before = [(kind, vars(kind)[name]) for kind in _subclasses(PreTrainedModel) if vars(kind).get(name)]
    for kind, _ in before:
        setattr(kind, name, None)
    try:
        yield
    finally:
        for kind, names in before:
            setattr(kind, name, names)


def _subclasses(kind: Any) -> Iterator[Any]:
    yield kind
    for below in kind.__subclasses__():
        yield from _subclasses(below)


def left_out(model: nn.Module, unexpected: Iterable[str], held: Collection[str]) -> str:
    """A line on the tensors that are not part of the model, by what they seem to be; "" where there are none or harmless ones alone.

    unexpected: names that the model did not take, as transformers calls them, before experts are unfused; held: all names in the files,
    by which the tensors are counted.
    """
    modules = dict(model.named_modules())
    base = str(getattr(model, "base_model_prefix", ""))
    places: dict[str, dict[str, set[str]]] = {}
    inside = False
    for name in sorted(name for name in unexpected if not _HARMLESS.search(name)):
        first = name.partition(".")[0]
        prefixed = first not in modules and f"{base}.{first}" in modules
        place = _outside(f"{base}.{name}" if prefixed else name, modules)
        kind = _kind(place, modules, model)
        inside = inside or (kind.startswith("tensors") and place.partition(".")[0] in modules)
        own = {n for n in held if _under(n, place) or _under(f"{base}.{n}", place)} or {name}
        places.setdefault(kind, {}).setdefault(_pattern(place, own), set()).update(own)
    if not places:
        return ""
    words = "; ".join(_words(kind, found) for kind, found in places.items())
    doubt = "; the weights may be another architecture's than the one that config.json names" if inside else ""
    return f"left out, not part of the model: {words}{doubt}"


def _outside(name: str, modules: Collection[str]) -> str:
    """The shortest beginning of a tensor's name that is no module of the model; all of it where that has the tensor's module."""
    parts = name.split(".")
    beginnings = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((beginning for beginning in beginnings if beginning not in modules), name)


def _kind(place: str, modules: dict[str, nn.Module], model: Any) -> str:
    parent, _, leaf = place.rpartition(".")
    blocks = modules.get(parent)
    if leaf.isdigit() and isinstance(blocks, nn.ModuleList):
        announced = any(ABSENT.search(key) and value for key, value in vars(model.config.get_text_config()).items())
        return _PREDICTION if announced else f"block beyond the {len(blocks)} of config.json"
    unknown = f"tensors that {type(model).__name__} does not have"
    return next((kind for kind, pattern in _KINDS if pattern.search(place)), unknown)


def _under(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def _pattern(place: str, own: Collection[str]) -> str:
    """The place, the same for all blocks of the model, with a star where more lies under it."""
    parent, dot, leaf = place.rpartition(".")
    shown = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parent) + dot + leaf
    return shown if any(name == place or place.endswith(f".{name}") for name in own) else f"{shown}.*"


def _words(kind: str, found: dict[str, set[str]]) -> str:
    count = len(set().union(*found.values()))
    names = list(found)
    more = f" and {len(names) - _SHOWN} more places" if len(names) > _SHOWN else ""
    return f"{kind} ({count} tensor{'s' if count > 1 else ''}, {', '.join(names[:_SHOWN])}{more})"
