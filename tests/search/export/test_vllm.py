"""vLLM's CPU build loads what is exported for it and computes what was evaluated. `make vllm` sets its environment up and runs these."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from methods.apply import Installer
from methods.model.load import LoadedModel
from methods.model.structure import Structure
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from search.export.registry import exporter
from search.export.verification import nll
from tests.cut import TEXT, cut_model
from tests.edits import edits_of

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
TOLERANCE = 0.02
"""Nats per token: vLLM computes in bf16."""
ROUNDED_TOLERANCE = 0.06
"""Of 16, where inputs are rounded: few of them flip in bf16, and a cut model is sensitive."""
CACHE_TOLERANCE = 0.5
"""Of 16: keys and values are rounded without a scale, and the evaluated loss is of none rounded."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return cut_model(tmp_path_factory.mktemp("cut"))


def _formats(structure: Structure, names: Sequence[str]) -> dict[str, str]:
    """A format a block, "" being dense."""
    found = {site.name: names[site.block % len(names)] for site in structure.sites}
    return {site: name for site, name in found.items() if name}


def _vllm(folder: Path, ids: torch.Tensor) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_nll.py")), str(folder), json.dumps(ids[0].tolist())]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def _ids(model: LoadedModel) -> torch.Tensor:
    ids: torch.Tensor = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 40
    return ids


def _exported(folder: Path, model: LoadedModel, name: str, formats: Mapping[str, str], cache: str) -> float:
    """Writes the folder; returns the evaluated model's loss."""
    policy, edits = edits_of(model.model, model.structure, formats)
    if cache:
        policy = Policy(policy.sites, (Decision.of("kv-cache", format=cache),))
    exporter(name).export(folder, model, PolicyFile(policy, id="cut"), edits)
    with Installer(model.model, model.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        return nll(model.model, _ids(model))


@pytest.mark.parametrize(
    ("name", "formats", "cache"),
    [
        ("compressed-tensors", ("w4a16-g64", ""), ""),
        ("compressed-tensors", ("w4a16-g32", "w8a8-token", "", "w4a16"), ""),
        ("auto-round", ("w4a16-g64", "", "w4a16-g32"), ""),
        ("gptq", ("w4a16", "", "w4a16-g32"), ""),
        ("compressed-tensors", ("w4a16-g64", ""), "kv-fp8"),
    ],
)
def test_vllm_computes_what_was_evaluated(
    tmp_path: Path, model: LoadedModel, name: str, formats: tuple[str, ...], cache: str
) -> None:
    expected = _exported(tmp_path / "out", model, name, _formats(model.structure, formats), cache)
    done = _vllm(tmp_path / "out", _ids(model))
    assert done.returncode == 0, done.stderr[-2000:]
    found = float(done.stdout.split("nll")[-1])
    sys.stdout.write(f"{name} {formats} {cache}: evaluated {expected:.4f}, vLLM {found:.4f}\n")
    tolerance = CACHE_TOLERANCE if cache else ROUNDED_TOLERANCE if "w8a8-token" in formats else TOLERANCE
    assert abs(found - expected) <= tolerance


@pytest.mark.parametrize("name", ["compressed-tensors", "auto-round", "gptq"])
def test_vllm_refuses_what_the_matrix_says_it_does_not_load(tmp_path: Path, model: LoadedModel, name: str) -> None:
    """8-bit weights with inputs left alone have no kernel in its CPU build, and `serve.json` does not offer it."""
    folder = tmp_path / "out"
    _exported(folder, model, name, _formats(model.structure, ("w8a16",)), "")
    serve = json.loads((folder / "serve.json").read_text())
    assert "vllm" in serve and "vllm-cpu" not in serve
    (folder / "serve.json").write_text(json.dumps({"vllm-cpu": serve["vllm"]}))
    assert _vllm(folder, _ids(model)).returncode != 0
