"""The cache: what is listed, what is found damaged, what clearing deletes and what it leaves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from profilers.table import LatencyTable
from profilers.target import resolve
from profilers.timer import exclusive
from search.cache import clear, items
from search.cli import main
from search.config import ConfigError


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
    (tmp_path / "mine.txt").write_text("not ours")
    return tmp_path


def test_everything_is_listed_and_sound(cache: Path) -> None:
    found = items(cache, verify=True)
    assert [item.kind for item in found] == ["models", "tables", "generated", "kernels"]
    assert all(item.size_bytes > 0 and item.problem == "" for item in found)
    assert found[0].size_bytes == sum(file.stat().st_size for file in (cache / "models/ab-v1").iterdir())
    assert items(cache / "nowhere") == []


def test_damage_is_found(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "models/ab-v1/origin.json").unlink()
    (cache / "generated/cd.safetensors").write_bytes(b"12345678garbage")
    (cache / "kernels/ef.so").write_bytes(b"")
    table = next((cache / "tables").glob("*.jsonl"))
    table.write_text(table.read_text() + "no row\n")
    problems = {item.kind: item.problem for item in items(cache, verify=True)}
    assert "never finished" in problems["models"] and "damaged" in problems["generated"]
    assert "no shared library" in problems["kernels"] and "line 2 is not JSON" in problems["tables"]
    assert main(["cache", "--cache", str(cache), "--verify"]) == 1
    assert "never finished" in capsys.readouterr().out
    assert main(["cache", "--cache", str(cache)]) == 0


def test_clearing_deletes_one_kind_or_all_and_nothing_else(cache: Path) -> None:
    size = items(cache)[0].size_bytes
    assert clear(cache, "models") == size
    assert [item.kind for item in items(cache)] == ["tables", "generated", "kernels"]
    assert clear(cache, "all") > 0
    assert items(cache) == [] and (cache / "mine.txt").exists() and (cache / "tables/timing.lock").exists()
    with pytest.raises(ConfigError, match="no kind 'everything'; there are models"):
        clear(cache, "everything")


def test_tables_are_not_cleared_under_a_run_that_times(cache: Path) -> None:
    with exclusive(cache / "tables"), pytest.raises(ConfigError, match="clear tables when it has ended"):
        clear(cache, "tables")
    assert any(item.kind == "tables" for item in items(cache))
