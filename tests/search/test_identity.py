"""What a study, a map and an export are tied to, and what they are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import search.maps
from methods.policy import DENSE, Decision, Policy
from methods.sealed import sealed, unsealed
from profilers.target import local_cpu
from search.cli import main
from search.config import ConfigError
from search.curves import latency_pairs
from search.folder import check_same
from search.prepared import by_format
from search.results import saved_answer, saved_config, saved_prepared
from tests.search.run_server import fixed_prices, one_core
from tests.tiny import save_tiny

SMALL = [
    *(
        "--workload",
        "decode:batch=1,context=8",
        "--formats",
        "w8a8-token,w4a8-g32-asym",
        "--sequence",
        "16",
        "--latency",
        "0.9x",
    ),
    *("--calibration-tokens", "32", "--search-tokens", "32", "--validation-tokens", "32", "--evaluations", "0", "--quiet"),
]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with one_core(), fixed_prices():
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a cache and a finished study `results/s`."""
    folder = tmp_path_factory.mktemp("box")
    save_tiny(folder / "model")
    assert run(folder, "s") in (0, 1)
    return folder


def run(box: Path, study: str, *flags: str) -> int:
    own = ("--model", box / "model", "--results", box / "results", "--cache", box / "cache", "--study", study)
    return main(["run", *SMALL, *map(str, own), *flags])


def on_another_device(study: Path) -> None:
    """Rewrites what the study says of its device: another torch, fewer threads, one cache less."""
    path = study / "steps" / "prepared.json"
    data = unsealed(path.read_text(), path)
    target = data["value"]["target"]
    target |= {"fingerprint": "0" * 16, "facts": {**target["facts"], "torch": "1.0", "flags": ["avx2", "old"]}}
    path.write_text(sealed(data))


def test_a_map_outlives_text_and_methods_and_nothing_else(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise ConfigError("measured again")

    monkeypatch.setattr(search.maps, "whole_model", never)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} quick brown foxes jump over {n} lazy dogs " * 9 for n in range(80)))
    assert run(box, "text", "--data", str(text)) in (0, 1)
    assert run(box, "methods", "--methods", "rtn") in (0, 1)
    assert run(box, "formats", "--formats", "w8a8-token") == 2
    assert run(box, "workload", "--workload", "decode:batch=2,context=8") == 2


def test_what_a_map_was_fitted_on_is_known_by_its_formats() -> None:
    gptq, rtn = (Decision.of(method, format="w8a8-token") for method in ("gptq", "rtn"))
    assert by_format(Policy({"a": (gptq,), "b": (DENSE,)})) == Policy({"a": (rtn,), "b": (DENSE,)})
    assert by_format(Policy({"a": (gptq,)})).key() != by_format(Policy({"a": (Decision.of("gptq", format="w4a8-g64"),)})).key()


def test_a_policy_that_the_map_was_fitted_on_is_no_test_of_it(box: Path) -> None:
    folder = box / "results" / "s"
    answer, prepared = saved_answer(folder), saved_prepared(folder)
    fitted = {run.policy_key for run in prepared.map.runs}  # type: ignore[union-attr]
    known = [item for item in answer.finalists if item.policy.sites and by_format(item.policy).key() in fitted]
    pairs = latency_pairs([answer], prepared, saved_config(folder).stated_workloads)
    measured = [item for item in answer.finalists if item.policy.sites]
    assert known and sum(map(len, pairs.values())) == len(measured) - len(known)


def test_a_study_of_another_set_up_says_what_differs(box: Path) -> None:
    prepared = saved_prepared(box / "results" / "s")
    here = local_cpu()
    loaded = SimpleNamespace(digest=prepared.model["digest"])
    session: Any = SimpleNamespace(loaded=loaded, target=here, config=SimpleNamespace(folder=Path("s")))
    check_same(session, prepared)
    facts = {
        **here.facts,
        "torch": "1.0",
        "threads": 99,
        "flags": [*here.facts["flags"], "warp"],
        "environment": {"KMP_BLOCKTIME": "0"},
    }
    prepared = replace(prepared, target={**prepared.target, "fingerprint": "0" * 16, "facts": facts})
    with pytest.raises(ConfigError) as refused:
        check_same(session, prepared)
    message = str(refused.value)
    for part in (f"torch 1.0 there, {here.facts['torch']} here", "threads 99 there", "flags warp only there"):
        assert part in message
    assert "KMP_BLOCKTIME 0 there, not set here" in message and "cores" not in message.partition("differs in")[2]


def test_export_and_materialize_need_no_device_and_no_text(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a study whose device is not here and whose text is gone."""
    folder = box / "results" / "s"
    kept = (folder / "steps" / "prepared.json").read_bytes()
    on_another_device(folder)

    def gone(*_: object) -> Any:
        raise ValueError("no device and no text are here")

    monkeypatch.setattr("search.session.resolve", gone)
    monkeypatch.setattr("search.session.roles_from_tokens", gone)
    monkeypatch.setattr("search.session.roles_from_text", gone)
    try:
        answer = saved_answer(folder)
        name = next(item.name for item in answer.finalists if item.policy.sites and not item.recompressed)
        arguments = ["export", str(folder), "--format", "dense", "--candidate", name, "--out", str(tmp_path / "export")]
        assert main(arguments) == 0
        (policy, *_) = sorted((folder / "policies").glob("uniform*.yaml"))
        out = tmp_path / "checkpoint"
        assert main(["materialize", str(policy), "--study", str(folder), "--out", str(out), "--cache", str(box / "cache")]) == 0
        assert (out / "policy.yaml").exists() and (tmp_path / "export" / "config.json").exists()
    finally:
        (folder / "steps" / "prepared.json").write_bytes(kept)
