"""Every architecture through every export: what is written loads and agrees, or is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from methods.apply import Installer
from methods.model.load import LoadedModel, load
from methods.policy_file import PolicyFile
from search.export.registry import EXPORTERS, exporter
from tests.edits import edits_of
from tests.tiny import tiny_model, tiny_tokenizer, tiny_tokens

FORMATS = {
    **dict.fromkeys(EXPORTERS, "w4a16-g32"),
    "modelopt": "w8a16",
    "mlx": "w4a16-g32-asym",
}
"""One that each export takes."""

OWN_CLASS = "is a FalconLinear, and .* replaces nn.Linear alone"
ON_LOADING = "is initialised on loading by a weight that is packed"
CONSTANT = "is not stored and stands beside the linear"

ENGINES = ("compressed-tensors", "auto-round", "gptq", "torchao")
FALCON = {**dict.fromkeys(ENGINES, OWN_CLASS), "compressed-tensors": ON_LOADING}
TABLES = dict.fromkeys(("auto-round", "gptq"), CONSTANT)
TRANSPOSED = dict.fromkeys((*ENGINES, "modelopt", "mlx"), "stored transposed")
SOUND = ("bloom", "mpt", "neox-even", "phi-even", "phi-tied", "stablelm-even", "gemma-even", "starcoder2")

REFUSALS: dict[str, dict[str, str]] = {
    **{arch: FALCON for arch in ("falcon-7b", "falcon-40b", "falcon-rw")},
    **{arch: {"compressed-tensors": ON_LOADING} for arch in ("bigcode", "bigcode-mha", "nanochat")},
    **{arch: TABLES for arch in ("gptj", "codegen", "gpt-neo")},
    "gpt2-even": TRANSPOSED,
    **{arch: {} for arch in SOUND},
}
"""By architecture, the exports that refuse it and why; all others write what loads and agrees, but for GGUF, which has none of these."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    folder, known = tmp_path_factory.mktemp("models"), {}

    def get(arch: str) -> LoadedModel:
        if arch not in known:
            model = tiny_model(arch, stock=True)
            for parameter in model.parameters():
                if parameter.dim() == 1:  # exports of GPTQ's layout keep biases in fp16
                    parameter.data = parameter.to(torch.float16).float()
            model.to(torch.bfloat16).save_pretrained(folder / arch)
            tiny_tokenizer().save_pretrained(folder / arch)
            known[arch] = load(str(folder / arch), folder / "cache")
        return known[arch]

    return get


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("arch", REFUSALS)
def test_loads_and_agrees_or_is_refused(tmp_path: Path, models: Callable[[str], LoadedModel], arch: str, name: str) -> None:
    loaded, module, folder = models(arch), exporter(name), tmp_path / "out"
    policy, edits = edits_of(loaded.model, loaded.structure, {site.name: FORMATS[name] for site in loaded.structure.sites})
    expected = "is not written to GGUF" if name == "gguf" else REFUSALS[arch].get(name)
    if expected is not None:
        with pytest.raises(ValueError, match=expected):
            module.export(folder, loaded, PolicyFile(policy), edits)
        assert not folder.exists()
        return
    module.export(folder, loaded, PolicyFile(policy), edits)
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        result = module.verify(folder, loaded.model, tiny_tokens(2, 24))
    assert result.ok, result.message
    assert result.n_linears == sum(len(edit.linears) for edit in edits.values())
    assert result.max_weight_diff == 0.0 or not result.load_tested


@pytest.mark.parametrize("arch", ["falcon-7b", "bigcode"])
def test_weights_that_are_not_packed_load_where_packed_ones_do_not(
    tmp_path: Path, models: Callable[[str], LoadedModel], arch: str
) -> None:
    loaded, module = models(arch), exporter("compressed-tensors")
    policy, edits = edits_of(loaded.model, loaded.structure, {site.name: "w8a8-token" for site in loaded.structure.sites})
    module.export(tmp_path / "out", loaded, PolicyFile(policy), edits)
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        result = module.verify(tmp_path / "out", loaded.model, tiny_tokens(2, 24))
    assert result.ok, result.message


def test_a_head_with_a_bias_is_written(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    from safetensors.torch import load_file

    loaded, module = models("phi-tied"), exporter("dense")
    assert loaded.structure.tied and loaded.model.lm_head.bias.abs().max() > 0.1
    site = loaded.structure.sites[0].name
    policy, edits = edits_of(loaded.model, loaded.structure, {site: "w4a16-g32"})
    module.export(tmp_path / "out", loaded, PolicyFile(policy), edits)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.bias"].float(), loaded.model.lm_head.bias) and "lm_head.weight" not in stored
