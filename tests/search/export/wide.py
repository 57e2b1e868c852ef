"""A tiny model whose linears all have multiples of 32 inputs and outputs, biases included, and formats and damage for its exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from methods.apply import Installer
from methods.method import Edit
from methods.model.load import LoadedModel, load
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from search.export.verification import Verification
from tests.edits import edits_of
from tests.tiny import VOCABULARY, seeded, tiny_tokenizer, tiny_tokens

IDS = tiny_tokens(2, 40)
HIDDEN, INNER = 128, 192


def wide_model(folder: Path, dtype: torch.dtype = torch.bfloat16, *, biases: bool = True) -> LoadedModel:
    """A llama of three blocks with grouped queries (128, 64 and 64 outputs), tied, in `dtype`; biases: of its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        attention_bias=biases,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with seeded(0):
        model: Any = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load(str(folder), folder / "cache")


def compressed(loaded: LoadedModel, formats: Sequence[str], cache: str = "") -> tuple[PolicyFile, dict[str, Edit]]:
    """One format after the other, site by site, with the last block's last site left dense."""
    sites = loaded.structure.sites[:-1]
    chosen = {site.name: formats[index % len(formats)] for index, site in enumerate(sites)}
    policy, edits = edits_of(loaded.model, loaded.structure, chosen)
    model = (Decision.of("kv-cache", format=cache),) if cache else ()
    return PolicyFile(Policy(policy.sites, model), id="mixed"), edits


def verified(module: Any, folder: Path, loaded: LoadedModel, edits: Mapping[str, Edit]) -> Verification:
    """What an exporter's `verify` says with the edits installed."""
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        found: Verification = module.verify(folder, loaded.model, IDS)
        return found


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Damage to a folder: tensors of its file changed, the header as it was."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=header)

    return apply


def swapped(a: str, b: str) -> Callable[[Path], None]:
    """Two tensors in each other's place."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return damaged(swap)


def added(name: str, index: tuple[Any, ...], amount: float) -> Callable[[Path], None]:
    """Something added to elements of a tensor."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] += amount

    return damaged(add)
