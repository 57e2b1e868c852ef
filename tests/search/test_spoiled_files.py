"""Every kind of outside file with one value in it spoiled, in turn: it is read, or one line names the file; nothing else comes through."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from methods import checkpoint, policy_file
from methods.bank import Bank, tensors_digest
from methods.model.load import load
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from methods.policy_text import load as load_yaml
from profilers import stored
from profilers.resolution import look_up
from profilers.table import Check, KernelKey, LatencyTable, Row
from profilers.target import local_cpu
from profilers.timer import Timing
from search.cli import main
from search.config import RunConfig, read_toml, to_toml
from search.results import saved_prepared
from search.study import TrialRecord, _attributes, _parse
from tests.edits import edits_of, loaded_tiny
from tests.search.studies import W4, answer, save_study
from tests.spoil import Spoiled, outcome, spoiled
from tests.tiny import save_tiny


def refused(variants: Iterable[Spoiled], read: Callable[[Any], object], named: str) -> int:
    """How many spoiled values were refused; fails where one was neither read nor refused in one line that names the file."""
    said = []
    for variant in variants:
        try:
            said.append(outcome(lambda value=variant.value: read(value), named))  # type: ignore[misc]
        except AssertionError as error:
            raise AssertionError(f"{variant}: {error}") from error
    assert len(said) > 20
    return len([text for text in said if text])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_study(tmp_path_factory.mktemp("results") / "s")


@pytest.mark.parametrize("name", ["answers/0.6x,size=1MB.json", "steps/prepared.json"])
def test_files_of_a_study(study: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / name
    good = path.read_text()
    assert main(["show", str(study)]) == 0
    capsys.readouterr()
    statuses = []
    try:
        for variant in spoiled(json.loads(good), each=2, most=150):
            path.write_text(json.dumps(variant.value))
            statuses.append(main(["show", str(study)]))
            err = capsys.readouterr().err
            assert statuses[-1] in (0, 2), f"{variant}: {err}"
            assert statuses[-1] == 0 or (err.startswith("search: ") and str(study) in err and err.count("\n") <= 2), (
                f"{variant}: {err}"
            )
    finally:
        path.write_text(good)
    assert statuses.count(2) > 60


def test_a_prepared_study_and_its_maps(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps" / "prepared.json"
    path.parent.mkdir()
    (tmp_path / "config.toml").write_text((study / "config.toml").read_text())

    def use(value: Any) -> None:
        path.write_text(json.dumps(value))
        prepared = saved_prepared(tmp_path)
        _ = prepared.problem, prepared.map.predict(5.0), [cost.map.predict(5.0) for cost in prepared.also]

    good = json.loads((study / "steps" / "prepared.json").read_text())
    assert refused(spoiled(good, each=3, most=900), use, "prepared.json") > 300


def test_trials() -> None:
    record = TrialRecord(Policy({"a": (W4,)}), 0.1, 0.01, 64, 5.0, "search", per_sequence=(0.1, 0.2), scores={"s": 1.0})

    def use(value: dict[str, Any]) -> None:
        _parse(optuna.trial.create_trial(values=[0.1, 5.0], user_attrs=value))

    good = json.loads(json.dumps(_attributes(record)))
    use(good)
    assert refused(spoiled(good, each=8), use, "trial ") > 50


TARGET = local_cpu(1)
KEY = KernelKey("linear", "w4a16-g32", 1, 96, 160)
ROW = Row("k", KEY, "ok", "abc", "", Timing(1.0, 0.9, 1.1, 20), 1000, 0.9, 0.1, True, "asm")
CHECK = Check("repeat", "k", KEY, 1.0, 1.1, 1000, 0.1, 2000.0)


def table_at(folder: Path) -> LatencyTable:
    table = LatencyTable.open(folder, TARGET)
    table.add([ROW])
    table.add_checks([CHECK])
    table.describe({"command": "c"})
    return table


def test_tables_of_lines(tmp_path: Path) -> None:
    table = table_at(tmp_path)
    path = tmp_path / "box.jsonl"
    assert table.path is not None
    good = [{k: v for k, v in json.loads(line).items() if k != "sha256"} for line in table.path.read_text().splitlines()]
    assert len(good) == 4

    def use(value: list[Any]) -> None:
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
        found = LatencyTable.read(path)
        _ = found.records(), [check.ratio for check in found.checks], found.timings(KEY)
        look_up("box", [tmp_path])

    use(good)
    lines = [
        dataclasses.replace(s, value=[*good[:line], s.value, *good[line + 1 :]])
        for line in range(4)
        for s in spoiled(good[line], each=4)
    ]
    assert refused(lines, use, "box.jsonl") > 60


def test_tables_of_columns(tmp_path: Path) -> None:
    table = table_at(tmp_path / "tables")
    path = tmp_path / "box.parquet"
    stored.write(table, path)
    data = parquet.read_table(path)
    good = {
        "header": json.loads(data.schema.metadata[b"isolatency"]),
        "rows": [json.loads(text) for text in data.column("record").to_pylist()],
    }

    def use(value: dict[str, Any]) -> None:
        rows, header = value.get("rows"), value.get("header")
        texts = [json.dumps(row) for row in rows] if isinstance(rows, list) else [None]
        if isinstance(rows, list) and isinstance(header, dict) and "content_hash" in header:
            header = {**header, "content_hash": stored.content_hash(rows)}
        columns = pyarrow.table({"record": pyarrow.array(texts, pyarrow.string())})
        parquet.write_table(columns.replace_schema_metadata({b"isolatency": json.dumps(header).encode()}), path)
        _ = LatencyTable.read(path).records()
        look_up("box", [tmp_path])

    use(good)
    assert refused(spoiled(good, each=4), use, "box.parquet") > 60


@pytest.mark.parametrize(
    "columns", [{"other": ["{}"]}, {"record": [1]}, {"record": ["{"]}, {"record": [None]}, {"record": ["[" * 9999]}]
)
def test_columns_of_another_kind(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    table = table_at(tmp_path / "tables")
    path = tmp_path / "box.parquet"
    metadata = {b"isolatency": json.dumps({**table.header, "content_hash": ""}).encode()}
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)
    assert "box.parquet" in outcome(lambda: LatencyTable.read(path), "box.parquet")


def test_policies(tmp_path: Path) -> None:
    import yaml

    loaded = loaded_tiny(tmp_path, "llama")
    policy, _ = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w8a8-token"})
    file = PolicyFile(policy, id="p", model={"id": "m"}, measured=({"metric": "ms", "value": 1.5, "source": "measured"},))
    path = tmp_path / "policy.yaml"
    good = load_yaml(policy_file.render(dataclasses.replace(file, weights_algo={"seed": 0}), loaded.structure))

    def use(value: Any) -> None:
        path.write_text(yaml.safe_dump(value))
        policy_file.read(path, loaded.structure)

    use(good)
    assert refused(spoiled(good, each=8), use, "policy.yaml") > 50


@pytest.mark.parametrize(
    "text",
    [
        "{[a]: 1}",
        "{{a: 1}: 1}",
        "? [a, b]\n: 1",
        "!!timestamp a",
        "!!int a",
        "!!float ''",
        "!!python/object:os.system {}",
        "a: !!set {b}",
        "[" * 5000,
        "a: " + "9" * 5000,
        "\x07",
        "a: &b [*b]",
        "a: 2026-13-45",
        "1: 2",
        "<<: 1",
    ],
)
def test_yaml_of_other_kinds(tmp_path: Path, text: str) -> None:
    loaded = loaded_tiny(tmp_path, "llama")
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    assert outcome(lambda: policy_file.read(path, loaded.structure), "policy.yaml")
    path.write_text(f"schema: llm-compression-policy/1\nprovenance: {text}\n" if "\n" not in text else text)
    outcome(lambda: policy_file.read(path, loaded.structure), "policy.yaml")


def test_configurations(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    good = {name: value for name, value in vars(RunConfig(latency="0.9x", data=("a", "b"))).items()}

    def use(value: dict[str, Any]) -> None:
        path.write_text(
            "".join(f"{name.replace('_', '-')} = {toml(item)}\n" for name, item in value.items() if item is not None)
        )
        to_toml(RunConfig(**read_toml(path)))

    plain = json.loads(json.dumps(good))
    use(plain)
    assert refused(spoiled(plain, each=5), use, "") > 60


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(item)}" for name, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value if item is not None) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


@pytest.mark.parametrize(
    ("arch", "name"), [("llama", "config.json"), ("gpt2", "config.json"), ("llama", "tokenizer_config.json")]
)
def test_models(tmp_path: Path, arch: str, name: str) -> None:
    folder = save_tiny(tmp_path / "model", arch)
    good = json.loads((folder / name).read_text())

    def use(value: Any) -> None:
        (folder / name).write_text(json.dumps(value))
        load(str(folder), tmp_path / "cache")

    refused(spoiled(good, each=4, most=60), use, str(folder))


def test_tokenizers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    good = json.loads((folder / "tokenizer.json").read_text())

    def use(value: Any) -> None:
        (folder / "tokenizer.json").write_text(json.dumps(value))
        load(str(folder), tmp_path / "cache")

    assert refused(spoiled(good, each=1, most=40), use, str(folder)) > 5


def test_checkpoints(tmp_path: Path) -> None:
    loaded = loaded_tiny(tmp_path, "llama")
    policy, edits = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w4a8-g16-asym"})
    folder = tmp_path / "checkpoint"
    checkpoint.write(folder, loaded, PolicyFile(policy), edits, {"a": 1})
    good = json.loads((folder / "isolatency.json").read_text())

    def use(value: dict[str, Any]) -> None:
        if "digest" in value and isinstance(value["digest"], str):
            body = {name: item for name, item in value.items() if name != "digest"}
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            value = {**value, "digest": hashlib.sha256(text.encode()).hexdigest()}
        (folder / "isolatency.json").write_text(json.dumps(value))
        checkpoint.read(folder)

    use(good)
    assert refused(spoiled(good, each=2), use, str(folder)) > 30


def test_banks(tmp_path: Path) -> None:
    loaded = loaded_tiny(tmp_path, "llama")
    site, decision = loaded.structure.sites[0], Decision.of("rtn", format="w4a16-g32")
    _, edits = edits_of(loaded.model, loaded.structure, {site.name: "w4a16-g32"})
    bank = Bank(tmp_path / "bank")
    bank.put(site.name, decision, edits[site.name])
    path = bank.path(site.name, decision)
    tensors = load_file(path)
    linears = {name: {"format": c.format.name, "shape": list(c.dense.shape)} for name, c in edits[site.name].linears.items()}
    good = {"site": site.name, "decision": decision.label, "linears": linears}

    def use(value: Any) -> None:
        spec = json.dumps(value)
        save_file(tensors, path, {"version": "1", "edit": spec, "sha256": tensors_digest(spec, tensors)})
        bank.get(site.name, decision)

    use(good)
    assert refused(spoiled(good, each=4), use, path.name) > 15


def test_the_study_made_by_hand_comes_back_equal(study: Path) -> None:
    from search.results import saved_answer

    assert json.dumps(saved_answer(study).to_json()) == json.dumps(answer().to_json())
