"""The cache: what is listed, what is found damaged, what clearing deletes and what it leaves."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from methods.bank import Bank
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed
from methods.method import Edit
from methods.policy import Decision
from profilers.pace import YARDSTICK
from profilers.resolution import resolve
from profilers.table import LatencyTable
from profilers.timer import exclusive
from search.cache import banks, clear, items, trim
from search.cli import main
from search.config import ConfigError
from search.files import kept_tensors
from search.folder import held


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for kind in ("models/ab-v1", "generated", "kernels"):
        (tmp_path / kind).mkdir(parents=True)
    save_file({"w": torch.ones(300)}, tmp_path / "models/ab-v1/model.safetensors")
    (tmp_path / "models/ab-v1/origin.json").write_text("{}")
    save_file({"tokens": torch.ones(30)}, tmp_path / "generated/cd.safetensors")
    (tmp_path / "kernels/ef.so").write_bytes(b"\x7fELF....")
    LatencyTable.open(tmp_path / "tables", resolve("cpu"))
    (tmp_path / "tables/timing.lock").touch()
    (tmp_path / "pace").mkdir()
    (tmp_path / "pace/machine.json").write_text(json.dumps({"yardstick": YARDSTICK, "seconds": 2e-6}))
    (tmp_path / "mine.txt").write_text("not ours")
    return tmp_path


def test_everything_is_listed_and_sound(cache: Path) -> None:
    found = items(cache, verify=True)
    assert [item.kind for item in found] == ["models", "tables", "pace", "generated", "kernels"]
    assert all(item.size_bytes > 0 and item.problem == "" for item in found)
    assert found[0].size_bytes == sum(file.stat().st_size for file in (cache / "models/ab-v1").iterdir())
    assert items(cache / "nowhere") == []


def test_damage_is_found(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "models/ab-v1/origin.json").unlink()
    (cache / "generated/cd.safetensors").write_bytes(b"12345678garbage")
    (cache / "kernels/ef.so").write_bytes(b"")
    table = next((cache / "tables").glob("*.jsonl"))
    table.write_text(table.read_text() + "no row\n")
    (cache / "pace/machine.json").write_text("{}")
    problems = {item.kind: item.problem for item in items(cache, verify=True)}
    assert "never finished" in problems["models"] and "damaged" in problems["generated"]
    assert "no shared library" in problems["kernels"] and "line 2: not JSON" in problems["tables"]
    assert "does not say how fast" in problems["pace"]
    assert main(["cache", "--cache", str(cache), "--verify"]) == 1
    assert "never finished" in capsys.readouterr().out
    assert main(["cache", "--cache", str(cache)]) == 0


def test_clearing_deletes_one_kind_or_all_and_nothing_else(cache: Path) -> None:
    size = items(cache)[0].size_bytes
    assert clear(cache, "models") == size
    assert [item.kind for item in items(cache)] == ["tables", "pace", "generated", "kernels"]
    assert clear(cache, "all") > 0
    assert items(cache) == [] and (cache / "mine.txt").exists() and (cache / "tables/timing.lock").exists()
    with pytest.raises(ConfigError, match="no kind 'everything'; there are models"):
        clear(cache, "everything")


def test_tables_are_not_cleared_under_a_run_that_times(cache: Path) -> None:
    with exclusive(cache / "tables"), pytest.raises(ConfigError, match="clear tables when it has ended"):
        clear(cache, "tables")
    assert any(item.kind == "tables" for item in items(cache))


def use(path: Path, at: int) -> None:
    """Set when a file was used last."""
    os.utime(path, (at, at))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two studies with two edits each in their banks; `old` was used before `new`."""
    for index, study in enumerate(("old", "new")):
        folder = tmp_path / "results" / study
        bank = Bank(folder / "bank" / "key")
        for site in ("a", "b"):
            decision = Decision.of("rtn", format="bf16")
            bank.put(site, decision, Edit({"w": Compressed.of(parse_format("bf16"), {"weight": torch.ones(4, 8).bfloat16()})}))
            use(bank.path(site, decision), 1000 + 10 * index + ord(site))
        (folder / "config.toml").write_text("")
    return tmp_path / "results"


def test_banks_are_listed_and_checked(results: Path) -> None:
    found = banks(results, verify=True)
    assert [(item.kind, item.name, item.problem, item.held) for item in found] == [
        ("bank", n, "", False) for n in ("new", "old")
    ]
    path = next((results / "old").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "checksum does not fit" in banks(results, verify=True)[1].problem
    with held(results / "new"):
        assert [item.held for item in banks(results)] == [True, False]


def test_a_cap_deletes_the_longest_unused_and_nothing_that_a_run_holds(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = next(results.rglob("*.safetensors")).stat().st_size
    bank = Bank(results / "old" / "bank" / "key")
    bank.get("a", Decision.of("rtn", format="bf16"))  # used now, so that the other one goes first
    assert trim(results, 4 * size) == 0
    assert trim(results, 3 * size) == size
    assert [bank.has(site, Decision.of("rtn", format="bf16")) for site in ("a", "b")] == [True, False]
    with held(results / "new"):
        assert trim(results, size) == size
    assert len(list(results.rglob("*.safetensors"))) == 2 and not list((results / "old").rglob("*.safetensors"))
    assert main(["cache", "--cache", str(results), "--results", str(results), "--max-size", "1B"]) == 0
    assert "MiB freed" in capsys.readouterr().out and not list(results.rglob("*.safetensors"))


def test_damaged_text_is_made_again_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    path, tensors = tmp_path / "t.safetensors", {"tokens": torch.arange(12).reshape(3, 4)}

    def make() -> dict[str, torch.Tensor]:
        said.append("made")
        return tensors

    for _ in range(2):
        assert torch.equal(kept_tensors(path, make, said.append)["tokens"], tensors["tokens"])
    assert said == ["made"]
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-5], lambda data: b"garbage"):
        path.write_bytes(damage(path.read_bytes()))
        said.clear()
        assert torch.equal(kept_tensors(path, make, said.append)["tokens"], tensors["tokens"])
        assert said == [f"{path} is damaged: it is made again", "made"]
    save_file(tensors, path)  # of an earlier version, without a checksum
    said.clear()
    assert torch.equal(kept_tensors(path, make, said.append)["tokens"], tensors["tokens"]) and said == []
