"""A target that is not here: refused, searched with its table or its datasheet and labelled so everywhere, and validated on it."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from methods.formats.format import parse_format
from methods.model.describe import describe
from methods.model.load import load
from methods.policy_text import load as read_yaml
from profilers import stored
from profilers.cells import model_key
from profilers.plan import model_cells
from profilers.table import LatencyTable, Row, header_of
from profilers.target import local_cpu
from profilers.timer import Timing
from profilers.workload import parse_workload
from search import validate
from search.cli import main
from search.results import saved_answer, saved_prepared
from tests.tiny import save_tiny

WORKLOAD = "decode:batch=1,context=8"
FORMATS = ("w8a8-token", "w4a8-g32-asym")


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A folder with a tiny model, and tables of another CPU: one with the model's own run, one with its kernels alone."""
    folder = tmp_path_factory.mktemp("box")
    model = load(str(save_tiny(folder / "model", "llama")), folder / "cache").model
    structure = describe(model)
    target = replace(local_cpu(1), fingerprint="0" * 16, description="another CPU", name="bigbox")
    kernels = LatencyTable(target.fingerprint, target.description, header=header_of(target))
    kernels.add(
        Row("grouped", key, "ok", "hash", timing=timing(parse_format(key.format).bits * 0.1))
        for key in model_cells(structure, FORMATS, (1,))
    )
    (folder / "devices").mkdir()
    stored.write(kernels, folder / "devices" / "kernelbox.parquet")
    dense_ms = 16 * 0.1 * len(structure.sites)
    kernels.add([Row("isolatency", model_key(structure, parse_workload(WORKLOAD)), "ok", "", timing=timing(dense_ms + 2))])
    stored.write(kernels, folder / "devices" / "bigbox.parquet")
    return folder


def timing(ms: float) -> Timing:
    return Timing(ms, 0.95 * ms, 1.1 * ms, 30, lo_ms=0.98 * ms, hi_ms=1.02 * ms)


def run(box: Path, *flags: str) -> int:
    common = {
        "model": box / "model", "workload": WORKLOAD, "formats": ",".join(FORMATS), "methods": "rtn", "sequence": 16,
        "calibration-tokens": 64, "search-tokens": 64, "validation-tokens": 64, "evaluations": 1, "finalists": 1,
        "cache": box / "cache", "results": box / "results", "devices": box / "devices", "threads": 1,
    }  # fmt: skip
    return main(["run", "--quiet", *(text for name, value in common.items() for text in (f"--{name}", str(value))), *flags])


@pytest.fixture(scope="module")
def study(box: Path) -> Path:
    assert run(box, "--target", "bigbox", "--latency", "0.7x", "--study", "s") == 0
    return box / "results" / "s"


def test_a_target_that_nobody_measured_is_refused_and_nothing_is_written(box: Path, capsys) -> None:
    assert run(box, "--target", "a100", "--latency", "0.7x", "--study", "refused") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "--allow-modelled" in error and "search profile" in error
    assert not (box / "results" / "refused").exists()


def test_kernels_alone_do_not_make_a_model(box: Path, capsys) -> None:
    assert run(box, "--target", "kernelbox", "--latency", "0.7x", "--study", "k") == 2
    assert "no run of this model" in capsys.readouterr().err


def test_with_a_stored_table_the_answer_is_unvalidated_in_every_file(study: Path, capsys) -> None:
    answer = saved_answer(study)
    assert answer.verdict == "unvalidated" and answer.best is not None and answer.best.label == "interpolated"
    assert saved_prepared(study).label == "interpolated"
    header = next(csv.reader((study / "frontier.csv").open()))
    assert "latency_ms_interpolated" in header and "kl_nats_proxy" in header
    for path in (study / "policies").glob("*.yaml"):
        latency = next(m for m in read_yaml(path.read_text())["measured"] if "latency" in m["metric"])
        assert latency["source"] == "interpolated"
    page = (study / "report.html").read_text()
    assert "Not validated" in page and "latency, interpolated" in page and "latency, measured (ms)" not in page
    assert main(["show", str(study)]) == 0
    shown = capsys.readouterr().out
    assert "latency interpolated" in shown and "search validate" in shown and "Not validated on the target" in shown


def test_its_latencies_are_the_tables_and_its_qualities_are_true(study: Path) -> None:
    answer = saved_answer(study)
    dense, best = answer.finalists[0], answer.best
    assert best is not None
    assert dense.latency_ms == pytest.approx(16 * 0.1 * len(saved_prepared(study).sites) + 2)
    assert best.latency_ms <= 0.7 * dense.latency_ms and best.report_kl > 0 and best.runtime_kl != best.runtime_kl


def test_another_machine_does_not_validate_it(study: Path, capsys) -> None:
    assert main(["validate", str(study)]) == 2
    assert "this machine is not bigbox" in capsys.readouterr().err


def test_on_the_target_it_is_measured_and_confirmed(study: Path, capsys) -> None:
    study = Path(shutil.copytree(study, study.with_name("carried")))
    # An objective that this machine surely meets: the answer's own, so that only the measuring is under test.
    path = study / "answers" / "0.7x.json"
    data = {**json.loads(path.read_text()), "objective": "50x"}
    del data["sha256"]
    path.unlink()
    (study / "answers" / "50x.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["validate", str(study), "--on", "cpu"]) in (0, 1)  # 1: met, but on a machine too contended to say so
    answer = saved_answer(study)
    assert answer.best is not None and {item.label for item in answer.finalists} == {"measured"}
    assert answer.best.kl == data["finalists"][answer.chosen]["kl"]
    assert any("validated on" in note for note in answer.notes)
    assert "latency_ms_measured" in (study / "frontier.csv").read_text()
    assert "latency measured" in capsys.readouterr().out
    assert f"bigbox ({escape(local_cpu(1).description)})" in (study / "report.html").read_text()
    if answer.verdict == "met":
        assert main(["validate", str(study), "--on", "cpu"]) == 2


def test_what_does_not_hold_on_the_target_is_solved_again(
    study: Path, box: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no finalist holds when measured, whatever this machine's timings are, its own table decides, and the study says so."""
    measured = validate._measured
    monkeypatch.setattr(validate, "_measured", lambda *about: [replace(i, meets=False) for i in measured(*about) or ()])
    assert main(["validate", str(study), "--on", "cpu"]) in (0, 1)
    assert "solving again" in capsys.readouterr().err
    answer = saved_answer(study)
    assert answer.verdict != "unvalidated" and {item.label for item in answer.finalists} == {"measured"}


def test_a_datasheet_is_labelled_modelled_everywhere(box: Path, capsys) -> None:
    flags = ("--target", "a100", "--allow-modelled", "--study", "m", "--formats", "w4a16-g32,w8a16-g32", "--latency", "1x")
    assert run(box, *flags) == 0
    study = box / "results" / "m"
    answer = saved_answer(study)
    assert answer.verdict == "unvalidated" and {item.label for item in answer.finalists} == {"modelled"}
    assert "latency_ms_modelled" in (study / "frontier.csv").read_text()
    assert "latency, modelled" in (study / "report.html").read_text()
    assert all("source: modelled" in path.read_text() for path in (study / "policies").glob("*.yaml"))
    shown = capsys.readouterr().out
    assert "latency modelled" in shown and "measured" not in shown.split("note:")[0]
