"""The benchmark of methods: which rows it has, and that rows of the whole model and of caches are what they say."""

from __future__ import annotations

import csv
import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from methods.policy import Decision
from tests.tiny import save_tiny

FOLDER = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "methods"
MODULES = ("rows", "table", "benchmark", "whole", "run")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    """The benchmark's modules by name, which lie beside its numbers and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name)


def text(path: Path, seed: int) -> Path:
    """Words that no other file has in this order."""
    draw = random.Random(seed)
    path.write_text("\n\n".join(" ".join(draw.choice("eat tea ate net ten") for _ in range(300)) for _ in range(4)))
    return path


def test_rows_of_the_whole_model_are_chosen_with_their_formats(modules: dict[str, Any]) -> None:
    chosen = modules["rows"].chosen_rows
    rows = chosen(
        ["quarot:seed=2", "spinquant:steps=3+gptq", "mofq", "kv-cache", "gptq"], ["w4a16-g64", "w3a16-g64", "kv-int4"]
    )
    assert [(row.method, row.format, row.kind, row.family) for row in rows] == [
        *(("quarot:seed=2+rtn", fmt, "rotated", "whole model") for fmt in ("w4a16-g64", "w3a16-g64")),
        *(("spinquant:steps=3+gptq", fmt, "rotated", "whole model") for fmt in ("w4a16-g64", "w3a16-g64")),
        ("mofq", "w4a16-g64", "mofq", "whole model"),  # no minifloat has three bits
        ("kv-cache", "kv-int4", "cache", "cache"),
        *(("gptq", fmt, "sites", "rounding") for fmt in ("w4a16-g64", "w3a16-g64")),
    ]
    assert rows[0].whole == Decision.of("quarot", seed=2) and rows[0].decision == Decision.of("rtn", format="w4a16-g64")
    # What is learned is learned for the format that follows.
    assert rows[3].whole == Decision.of("spinquant", steps=3, format="w3a16-g64")
    assert rows[3].decision == Decision.of("gptq", format="w3a16-g64")
    for methods, formats in ((["mofq"], ["w3a16-g64"]), (["kv-cache"], ["w4a16-g64"]), (["rtn"], ["kv-int4"])):
        with pytest.raises(SystemExit, match=f"{methods[0]}: none of {formats[0]}"):
            chosen(methods, formats)


def test_by_default_whole_models_and_caches_have_rows_and_what_learns_has_none(modules: dict[str, Any]) -> None:
    rows = modules["rows"].chosen_rows([], [])
    own = {row.method: [other.format for other in rows if other.method == row.method] for row in rows}
    assert own["quarot+gptq"] == own["quarot+rtn"] == ["w4a8-token", "w4a4-token"] and own["mofq"] == ["w4a16-g64"]
    assert {"kv-int8", "kv-kivi2-g32-w128", "kv-kvquant3-s1"} < set(own["kv-cache"])
    assert own["spqr"] == ["w3a16-g16-bi3-asym", "w4a16-g64"]
    assert {"w4a4-token", "w3a16-g16-bi3-asym"} < set(own["rtn"]) and not {"signround", "obq", "spinquant+gptq"} & set(own)


def test_whole_models_and_caches_are_judged_from_the_model_as_stored(
    modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rotation changes nothing but for rounding to the stored dtype, a dense cache nothing at all; lower bits cost more."""
    model = save_tiny(tmp_path / "model", "llama", 1)
    places = {name: str(tmp_path / name) for name in ("out", "cache", "scratch")}
    texts = {"calibrate": str(text(tmp_path / "a.txt", 1)), "evaluate": str(text(tmp_path / "b.txt", 2))}
    options = {"model": str(model), "tokens": "64", "sequence": "32", "windows": "2", "sites": "0,2", **places, **texts}
    options |= {"methods": "quarot,mofq,kv-cache", "formats": "bf16,w4a16-g16,kv-bf16,kv-int8,kv-int2"}
    monkeypatch.setattr(sys, "argv", ["run.py", *(word for name, value in options.items() for word in (f"--{name}", value))])
    modules["run"].main()
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {(row["method"], row["format"]): row for row in csv.DictReader(file)}
    kl = {key: float(row["kl"]) for key, row in rows.items()}
    assert set(rows) == {
        *(("quarot+rtn", fmt) for fmt in ("bf16", "w4a16-g16")),
        ("mofq", "w4a16-g16"),
        *(("kv-cache", fmt) for fmt in ("kv-bf16", "kv-int8", "kv-int2")),
    }
    assert 0 < kl["quarot+rtn", "bf16"] < 1e-3 < kl["quarot+rtn", "w4a16-g16"]
    assert abs(kl["kv-cache", "kv-bf16"]) < 1e-3 and kl["kv-cache", "kv-int8"] < kl["kv-cache", "kv-int2"]
    assert float(rows["kv-cache", "kv-bf16"]["bits"]) == 16 and rows["kv-cache", "kv-int2"]["error_down"] == ""
    assert float(rows["mofq", "w4a16-g16"]["bits"]) == 5 and int(rows["mofq", "w4a16-g16"]["plain_sites"]) == 0
    assert 0 < float(rows["quarot+rtn", "w4a16-g16"]["error_down"]) < 0.1
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## whole model" in page and "| kv-cache *s* | kv-int8 |" in page
    capsys.readouterr()
    modules["run"].main()
    assert "0 of 6 rows to do" in capsys.readouterr().err
