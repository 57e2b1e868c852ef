"""`--transform`: a run on a rotated model, of which nothing computed on the stored one is reused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from methods import catalogue, checkpoint, policy_file
from methods.model.describe import describe
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from search.config import ConfigError, RunConfig
from search.dry_run import dry_run
from search.folder import open_store, study_key
from search.generate import materialize
from search.progress import Progress
from search.session import Session
from search.study import TrialRecord
from tests.tiny import save_tiny, tiny_model

SMALL = {
    "sequence": 16,
    "calibration_tokens": 64,
    "search_tokens": 32,
    "validation_tokens": 32,
    "latency": "50x",
    "formats": ("w8a8-token",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transform")
    save_tiny(folder / "model", "llama")
    (folder / "text.txt").write_text(
        "\n\n".join(f"the fox number {i} jumps over the lazy dog, again and again" for i in range(400))
    )
    return folder


def config(folder: Path, transform: str = "none") -> RunConfig:
    return RunConfig(
        model=str(folder / "model"),
        transform=transform,
        data=(str(folder / "text.txt"),),
        results=str(folder / "results"),
        cache=str(folder / "cache"),
        **SMALL,  # type: ignore[arg-type]
    )


def session(folder: Path, transform: str = "none") -> Session:
    return Session(config(folder, transform), Progress(quiet=True))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("quarot", "quarot"),
        ("quarot:seed=3:heads=false", "quarot:heads=false,seed=3"),
        ("quarot:seed=3,heads=false", "quarot:heads=false,seed=3"),
        ("spinquant:format=w4a16-g64:steps=5", "spinquant:format=w4a16-g64,steps=5"),
    ],
)
def test_the_option_names_a_decision(text: str, label: str) -> None:
    decision = RunConfig(transform=text).transform_decision
    assert decision is not None and decision.label == label
    assert RunConfig().transform_decision is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quarrot", "--transform quarrot: no method"),
        ("gptq", "decided at sites"),
        ("quarot:r4=true", "unknown knob 'r4'"),
        ("kv-cache:format=kv-int8", "changes no weight"),
    ],
)
def test_other_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(transform=text)


def test_studies_and_keys_of_different_transforms_differ(folder: Path) -> None:
    configs = [config(folder, text) for text in ("none", "quarot", "quarot:seed=1")]
    assert len({c.study_name for c in configs}) == len({study_key(c) for c in configs}) == 3
    sessions = [Session(c, Progress(quiet=True)) for c in configs]
    assert len({s.loaded.digest for s in sessions}) == len({s.bank_folder.name for s in sessions}) == 3


def test_what_another_revision_of_the_methods_made_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed weights, what was prepared from them and evaluations are looked for elsewhere, and stay where they are."""
    policy = Policy.uniform(["s"], Decision.of("gptq", format="w4a16-g64"))
    trial = TrialRecord(policy, kl=0.5, kl_stderr=0.1, n_tokens=100, latency_ms=1.0, role="search")
    config(folder).folder.mkdir(parents=True, exist_ok=True)
    found = []
    for revision in (1, catalogue.REVISION):
        monkeypatch.setattr(catalogue, "REVISION", revision)
        own = session(folder)
        store = open_store(own)
        found.append((own.bank_folder, study_key(own.config), store.name, store.lookup(*trial.key)))
        store.record(trial)
    assert catalogue.REVISION > 1
    assert all(len({entry[index] for entry in found}) == 2 for index in range(3)) and found[1][3] is None
    assert open_store(session(folder)).lookup(*trial.key) is not None


def test_a_session_is_about_the_rotated_model(folder: Path) -> None:
    plain, rotated = session(folder), session(folder, "quarot")
    ids = rotated.corpora["search"].tokens[:1]
    assert torch.equal(plain.corpora["search"].tokens[:1], ids)
    with torch.no_grad():
        before, after = plain.model(ids).logits, rotated.model(ids).logits
    # The rotated weights were rounded to bf16, so that the logits are near, and not the same.
    assert 0 < (before - after).abs().max() < 0.05 * before.abs().max()
    structure = rotated.loaded.structure
    assert structure == describe(rotated.model) and not structure.tied and plain.loaded.structure.tied
    assert structure.n_parameters == plain.loaded.structure.n_parameters + 128 * 96
    assert all(torch.equal(p, p.bfloat16().float()) for p in rotated.model.parameters())
    assert "quarot" in rotated.loaded.notes[-1] and "rounded to bf16" in rotated.loaded.notes[-1]


def test_learned_rotations_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "spinquant:format=w4a8-token:steps=2"
    monkeypatch.setattr("search.session.all_threads", contextlib.nullcontext)
    first = session(folder, text).loaded

    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr("search.transform.rotations_of", never)
    assert session(folder, text).loaded.digest == first.digest
    with pytest.raises(AssertionError, match="learned again"):
        _ = session(folder, "spinquant:format=w4a8-token:steps=3").loaded


def test_a_policy_file_rotates_the_model_it_materialises(folder: Path, tmp_path: Path) -> None:
    structure = describe(tiny_model("llama"))
    site = structure.sites[1].name
    policy = Policy({site: (Decision.of("rtn", format="w8a8-token"),)}, (Decision.of("quarot", seed=2),))
    policy_file.write(tmp_path / "p.yaml", PolicyFile(policy), structure)
    materialize(tmp_path / "p.yaml", tmp_path / "out", config(folder), None, Progress(quiet=True))
    back, rotated = checkpoint.load_dense(tmp_path / "out"), session(folder, "quarot:seed=2").loaded
    assert policy_file.parse(checkpoint.read(tmp_path / "out").policy_text, back.structure).policy == policy
    assert back.structure == rotated.structure
    state, expected = back.model.state_dict(), rotated.model.state_dict()
    compressed = {f"{layer.name}.weight" for layer in structure.site(site).layers}
    assert {name for name in state if not torch.equal(state[name], expected[name])} == compressed


def test_a_dry_run_changes_nothing_and_says_what_cannot_be_done(folder: Path) -> None:
    assert dry_run(config(folder, "quarot"), Progress(quiet=True))["transform"] == "quarot, which is not done in a dry run"
    save_tiny(folder / "opt", "opt")
    with pytest.raises(ConfigError, match="subtracts the mean"):
        dry_run(RunConfig(**{**vars(config(folder, "quarot")), "model": str(folder / "opt")}), Progress(quiet=True))
