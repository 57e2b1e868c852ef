"""Export to GPTQ's checkpoints, mixed through `dynamic` rules: for vLLM, SGLang and whatever else reads those rather than AutoRound's.

One rule a site, whose pattern names its linears exactly, and beside them the one that vLLM makes of them: it looks for `qkv_proj` where
the checkpoint has `q_proj`, and would take the default for a name that no rule covers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from methods import policy_file
from methods.formats.format import Format
from methods.method import Edit
from methods.model.structure import Site, Structure
from methods.policy_file import PolicyFile
from search.export import folder as output
from search.export import gptq_tensors
from search.export.auto_round import VLLM_BITS, commonest, verify_packed
from search.export.serving import vllm_entries
from search.export.verification import Verification, read_config

if TYPE_CHECKING:
    from methods.model.load import LoadedModel

FUSED: Mapping[frozenset[str], str] = {
    frozenset(("q_proj", "k_proj", "v_proj")): "qkv_proj",
    frozenset(("gate_proj", "up_proj")): "gate_up_proj",
}
"""What vLLM calls linears that it fuses, by their own last names."""


def supports(fmt: Format, site: Site) -> str | None:
    """Why the format cannot be exported at the site, or None."""
    reason = gptq_tensors.refuses(fmt, site, VLLM_BITS)
    leaves = frozenset(layer.name.rpartition(".")[2] for layer in site.layers)
    if reason is None and len(site.layers) > 1 and leaves not in FUSED:
        return f"what engines call {'+'.join(sorted(leaves))} when they fuse them is not known; export to 'auto-round' instead"
    return reason


def check_model(loaded: LoadedModel, formats: Mapping[str, Format]) -> None:
    """Raises ValueError for a model that auto-round's kernels would not load, or not exactly, with these linears compressed."""
    gptq_tensors.check_model(loaded, formats, "gptq")


def export(folder: Path, loaded: LoadedModel, file: PolicyFile, edits: Mapping[str, Edit]) -> None:
    """Writes the folder; `edits`, errors: as in `search.export.compressed_tensors.export`."""
    structure = loaded.structure
    table = output.linears(edits)
    output.check(structure, file, edits, supports)
    formats = output.formats_of(table)
    check_model(loaded, formats)
    sites = [[layer.name for layer in site.layers] for site in structure.sites]
    others = output.uncompressed(loaded.model, [structure.head, *(name for names in sites for name in names)])
    config = output.config_of(loaded, structure.dtype)
    digest = policy_file.expanded_digest(file.policy, structure)
    config["quantization_config"] = quantization_config(formats, [*sites, *([name] for name in others)], digest)
    rest = output.rest(loaded, edits)
    state = {**rest, **gptq_tensors.tensors(table, rest, g_idx=True)}
    output.write_folder(folder, loaded, file, state, config, _serve(structure, formats), [])


def quantization_config(formats: Mapping[str, Format], groups: Sequence[Sequence[str]], policy_digest: str) -> dict[str, Any]:
    """The `quantization_config` of linears with formats, by name; `from_config` reads it back.

    groups: names of all linears, those of a site together, which have one format or are dense. Every site has a rule, so that the default
    decides nothing; raises ValueError where the members of a group disagree.
    """
    dynamic: dict[str, Any] = {}
    for names in groups:
        members = {formats.get(name) for name in names}
        if len(members) > 1:
            told = {name: fmt.name if (fmt := formats.get(name)) else "dense" for name in names}
            raise ValueError(f"gptq: engines fuse these linears, which therefore need one format: {told}")
        fmt = members.pop()
        entry = {} if fmt is None else {"bits": fmt.bits, "group_size": fmt.group}
        dynamic[f"{'-' if fmt is None else '+'}:{_pattern(names)}"] = entry
    usual = commonest(formats)
    return {
        "quant_method": "gptq",
        "bits": usual.bits,
        "group_size": usual.group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "policy_digest": policy_digest,
    }


def _pattern(names: Sequence[str]) -> str:
    parent = names[0].rpartition(".")[0]
    leaves = [name.removeprefix(f"{parent}.") for name in names]
    fused = FUSED.get(frozenset(leaves))
    return rf"^{re.escape(parent)}\.({'|'.join(map(re.escape, [*leaves, *([fused] if fused else [])]))})$"


def from_config(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Format]:
    """The formats of linears, by name, as engines read the rules: the first that matches wins, the default where none does.

    names: of a model's linears but the head, or what engines call them; dense ones are left out of the result. Raises ValueError for what
    this project does not write.
    """
    wanted = {"quant_method": "gptq", "desc_act": False, "sym": True, "checkpoint_format": "gptq", "lm_head": False}
    other = {name: config.get(name) for name, value in wanted.items() if config.get(name) != value}
    if other:
        raise ValueError(f"quantization_config has {other}; this project writes {wanted}")
    found = {name: _rule(config, name) for name in names}
    return {name: fmt for name, fmt in found.items() if fmt is not None}


def _rule(config: Mapping[str, Any], name: str) -> Format | None:
    for rule, entry in config["dynamic"].items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), name):
            return None if rule.startswith("-:") else _format({**config, **entry})
    return _format(config)


def _format(entry: Mapping[str, Any]) -> Format:
    return Format(int(entry["bits"]), int(entry["group_size"]))


def _serve(structure: Structure, formats: Mapping[str, Format]) -> dict[str, Any]:
    return vllm_entries(structure.dtype, cpu={fmt.bits for fmt in formats.values()} == {4})


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Decodes the written tensors, then loads the folder with transformers and auto-round's kernels, which read GPTQ's checkpoints too.

    `reference`, `ids`, errors: as in `search.export.auto_round.verify`.
    """
    from transformers import AutoRoundConfig

    head = reference.get_output_embeddings()
    names = [name for name in output.uncompressed(reference, ()) if reference.get_submodule(name) is not head]
    formats = from_config(read_config(folder).get("quantization_config", {}), names)
    return verify_packed(folder, reference, ids, formats, quantization_config=AutoRoundConfig())
