"""`search runtimes`: the matrix says what the space offers, what exporters write, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from methods.formats.format import parse_format
from methods.model.structure import LayerSpec, Site, Structure
from search.cli import main
from search.config import ConfigError, RunConfig
from search.export.registry import EXPORTERS, exporter
from search.method_list import WIDTH
from search.reference import _parsers
from search.runtime_list import _SITE, formats, listing, rows
from spaces.runtimes import DEFAULT_FORMATS, RUNTIMES, runtime
from spaces.space import build

MATRIX = {(row["runtime"], row["format"]): row for row in rows()}
NAMES = [name for names in formats().values() for name in names]


def _structure() -> Structure:
    down = Site("down", "down", 0, (LayerSpec("down", "down", 0, 1536, 512),))
    return Structure("LlamaForCausalLM", ("b.0",), (_SITE, down), "head", "embed", True, 512, 128, 8, 8, 64, "bf16", 10**6)


def test_it_holds_every_runtime_and_format_once() -> None:
    assert len(rows()) == len(MATRIX) == len(RUNTIMES) * len(NAMES)
    assert {name for names in DEFAULT_FORMATS.values() for name in names} <= set(NAMES)


def test_a_row_gives_reasons_or_exports() -> None:
    for row in MATRIX.values():
        assert (
            row["loads"] == (not row["reason"]) == bool(row["exports"]) == (row["evidence"] in ("load-tested", "by reference"))
        )
        assert row["loads"] or not row["fused"]
        assert {*row["exports"]} <= {*EXPORTERS, "isolatency"}


@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != "isolatency"])
def test_the_exports_of_a_row_write_its_format(name: str) -> None:
    for fmt in map(parse_format, NAMES):
        row = MATRIX[name, fmt.name]
        if row["loads"] and not fmt.dense:
            assert {export: exporter(export).supports(fmt, _SITE) for export in row["exports"]} == dict.fromkeys(row["exports"])


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_space_offers_nothing_that_does_not_load(name: str) -> None:
    def anything(fmt: object, site: Site) -> str | None:
        return None

    integers = [fmt for fmt in NAMES if not parse_format(fmt).dense]
    space = build(_structure(), integers, ["rtn"], runtime(name), anything)
    offered = {choice.format.name for choices in space.choices.values() for choice in choices[1:]}
    known = {fmt for fmt in offered if (name, fmt) in MATRIX}
    assert known and all(RUNTIMES[name].loads is None or MATRIX[name, fmt]["loads"] for fmt in known)
    # A group that does not divide is replaced, so that a format may appear that is not in the matrix: it loads all the same.
    assert all(runtime(name).supports(parse_format(fmt), _SITE) is None for fmt in offered)
    if RUNTIMES[name].loads is not None:
        refused = {fmt for fmt in integers if not MATRIX[name, fmt]["loads"]}
        assert refused and not refused & offered
        assert refused <= {label for dropped in space.dropped.values() for label in dropped}


def test_what_is_measured_in_decoded_form_is_not_called_fused() -> None:
    assert not any(row["fused"] for (name, _), row in MATRIX.items() if name in ("transformers", "auto-round"))
    assert MATRIX["vllm-cpu", "w4a16-g64"]["fused"] and MATRIX["vllm-cpu", "w4a16-g64"]["evidence"] == "load-tested"
    assert MATRIX["vllm", "w8a16"]["evidence"] == "by reference" and not MATRIX["vllm-cpu", "w8a16"]["loads"]
    assert MATRIX["vllm", "w4a16-g64"]["exports"] == ["compressed-tensors", "auto-round", "gptq"]
    assert MATRIX["vllm", "w3a16-g64"]["reason"].startswith("vllm: 3-bit weights")
    assert MATRIX["isolatency", "nf4"]["reason"].startswith("isolatency: no kernel computes nf4")


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runtimes"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == listing()
    assert max(map(len, listing().splitlines())) <= WIDTH
    assert main(["runtimes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows()


def test_it_needs_no_torch() -> None:
    code = "import sys; from search.cli import main; main(['runtimes']); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_run_takes_every_runtime_that_the_documents_name_and_no_other() -> None:
    """The reference's tables and `search runtimes` are what `--runtime` takes."""
    (action,) = (a for a in _parsers()["run"]._actions if a.dest == "runtime")
    assert set(action.choices or ()) == set(RUNTIMES) == set(DEFAULT_FORMATS) == {row["runtime"] for row in rows()}
    for name in RUNTIMES:
        assert RunConfig(runtime=name).runtime == name
    with pytest.raises(ConfigError, match="--runtime 'onnx': use one of isolatency, transformers"):
        RunConfig(runtime="onnx")
