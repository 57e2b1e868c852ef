"""Every exporter but GGUF's, whose tests are beside it, on the default model with a mixed policy: loaded back by the real runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from methods.apply import Installer
from methods.formats.format import parse_format
from methods.model.load import LoadedModel, load
from methods.policy_file import PolicyFile
from search.export.registry import exporter
from tests.cut import TEXT, cut_model
from tests.edits import edits_of

MIXES = {
    "compressed-tensors": ("w4a16-g64", "w8a8-token", "w8a16", "w4a16-g32"),
    "auto-round": ("w4a16-g64", "w3a16-g64", "w8a16", "w2a16-g32"),
    "gptq": ("w4a16-g64", "w8a16", "w4a16-g32"),
    "torchao": ("w4a16-g64", "w8a8-token", "w8a16"),
    "dense": ("w4a8-g64-asym", "w3a16-g64", "nf4", "q4_0"),
}
"""Formats by exporter, one after the other over the sites; the last site stays dense."""


@pytest.fixture(scope="module", params=["cut", pytest.param("whole", marks=pytest.mark.slow)])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("default")
    makers: dict[str, Callable[[], LoadedModel]] = {
        "cut": lambda: cut_model(folder / "model"),
        "whole": lambda: load(None, folder),
    }
    return makers[request.param]()


@pytest.mark.parametrize("name", MIXES)
def test_a_mixed_policy_is_loaded_back(name: str, loaded: LoadedModel, tmp_path: Path) -> None:
    module, structure = exporter(name), loaded.structure
    allowed = {
        site.name: [fmt for fmt in MIXES[name] if module.supports(parse_format(fmt), site) is None] for site in structure.sites
    }
    chosen = {site: formats[index % len(formats)] for index, (site, formats) in enumerate(list(allowed.items())[:-1])}
    assert set(chosen.values()) == set(MIXES[name])
    policy, edits = edits_of(loaded.model, structure, chosen)
    module.export(tmp_path / "out", loaded, PolicyFile(policy, id="mixed"), edits)
    ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    with Installer(loaded.model, structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        result = module.verify(tmp_path / "out", loaded.model, ids)
    assert result.ok, result.message
    assert result.load_tested and result.max_weight_diff == 0
    assert result.n_linears == sum(len(edit.linears) for edit in edits.values())
