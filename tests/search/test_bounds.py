"""Numbers from outside have upper bounds, the same for flags, TOML and the Python API; beyond them is one line, and nothing is begun."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from methods.model.describe import describe
from profilers.cores import TargetError, allowed_cpus, check_threads
from profilers.duration import LONGEST_S, parse_duration
from profilers.plan import log_uniform, read_shapes
from profilers.target import local_cpu
from profilers.workload import BATCHES, LENGTHS, Workload, parse_workload
from search.cli import main
from search.config import ConfigError, RunConfig, read_toml
from search.objectives import TimeKind, parse_bytes, parse_objective
from search.room import check_texts, check_written
from tests.tiny import HIDDEN, tiny_model

NUMBERS = {item.name: item.metadata["allowed"] for item in dataclasses.fields(RunConfig) if item.type in ("int", "float")}
DIGITS = "9" * 5000
"""More than Python makes a number of."""


def by_flag(name: str, value: float, folder: Path) -> int:
    return main(["run", "--latency", "0.9x", f"--{name.replace('_', '-')}", str(value), "--results", str(folder), "--dry-run"])


def by_toml(name: str, value: float, folder: Path) -> int:
    path = folder / "c.toml"
    path.write_text(f"{name} = {value}\n")
    return main(["run", "--latency", "0.9x", "--config", str(path), "--results", str(folder), "--dry-run"])


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range_that_holds_its_default_and_both_ends(name: str) -> None:
    allowed = NUMBERS[name]
    assert allowed is not None and allowed.low >= 0 and allowed.high < 2**63
    assert getattr(RunConfig(), name) in allowed
    assert getattr(RunConfig(**{name: allowed.high}), name) == allowed.high
    assert getattr(RunConfig(**{name: allowed.low}), name) == allowed.low


@pytest.mark.parametrize("give", [by_flag, by_toml])
@pytest.mark.parametrize("name", NUMBERS)
def test_beyond_its_range_a_number_is_refused(
    name: str, give: Callable[[str, float, Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    for value in (NUMBERS[name].high + 1, -1):
        with pytest.raises(ConfigError, match=f"{flag} .* to "):
            RunConfig(**{name: value})
        assert give(name, value, tmp_path) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"search: {flag} ") and err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name != "c.toml"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, 10**400])
def test_what_is_no_number_is_refused_by_the_python_api(value: object) -> None:
    with pytest.raises(ConfigError, match=r"--sequence .*: use a whole number from 2 to"):
        RunConfig(sequence=value)  # type: ignore[arg-type]
    if value is not True:
        with pytest.raises(ConfigError, match=r"--max-kl .*: use a number from 0 to"):
            RunConfig(max_kl=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [f"threads = {DIGITS}", f"max_kl = {DIGITS}.0", "seed = 1979-05-27", "data = [1]", "a=" + "[" * 5000]
)
def test_a_toml_value_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        RunConfig(**read_toml(path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_toml_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"model = '\xff'")
    with pytest.raises(ConfigError, match=r"not TOML"):
        read_toml(path)


@pytest.mark.parametrize(
    "text",
    [
        f"decode:batch={int(BATCHES.high) + 1}",
        f"decode:context={int(LENGTHS.high) + 1}",
        f"prefill:prompt={int(LENGTHS.high) + 1}",
        f"decode:batch={DIGITS}",
        "decode:batch=²",
        "decode:batch=0",
        "decode:context=-1",
    ],
)
def test_workloads_have_bounds(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--workload"):
        RunConfig(workload=text)


def test_the_ends_of_a_workload_are_possible() -> None:
    assert parse_workload("decode:batch=00008").batch == 8
    assert Workload(batch=int(BATCHES.high), context=int(LENGTHS.high)).batch == BATCHES.high
    with pytest.raises(ValueError, match=r"prompt=0 is not possible; use a whole number from 1 to"):
        Workload("prefill", prompt=0)


@pytest.mark.parametrize("text", [f"{DIGITS}h", "721h", "0s", "99999999h"])
def test_durations_have_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--budget") as raised:
        parse_duration(text)
    assert len(str(raised.value)) < 200
    assert parse_duration("720h") == LONGEST_S


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{DIGITS}ms", "latency"),
        ("1001x", "latency"),
        (f"{DIGITS}tok/s", "throughput"),
        ("90000s", "ttft"),
        ("0ms", "tpot-p95"),
    ],
)
def test_objectives_have_bounds(text: str, kind: TimeKind) -> None:
    with pytest.raises(ValueError, match=f"^--{kind} .*must be above zero and at most") as raised:
        parse_objective(text, kind)
    assert len(str(raised.value)) < 300
    assert parse_objective("25s").value == 25_000


def test_bytes_have_bounds() -> None:
    assert parse_bytes("1GiB", "size") == 2**30
    for text in (f"{DIGITS}GiB", "1" + "0" * 12 + "GB", "0B"):
        with pytest.raises(ValueError, match=r"^--size .*at most"):
            parse_bytes(text, "size")


def test_threads_are_those_of_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    most = len(os.sched_getaffinity(0))
    check_threads(most)
    assert most == len(allowed_cpus()) and local_cpu(most).threads == most
    for threads in (most + 1, 9999, 0):
        with pytest.raises(TargetError, match=f"--threads {threads}: this machine has {most} CPUs"):
            local_cpu(threads)
    for command in (
        ["run", "--latency", "0.9x", "--results", str(tmp_path)],
        ["generate", str(tmp_path)],
        ["profile", "--plan", "1"],
    ):
        assert main([*command, "--threads", str(most + 1)]) == 2
        assert f"search: --threads {most + 1}: this machine has {most} CPUs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tokens_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = describe(tiny_model("llama"), "bf16")
    monkeypatch.setattr("search.room.memory_bytes", lambda: 4 * HIDDEN * 1000)
    fits = {"calibration_tokens": 1000, "search_tokens": 1000, "validation_tokens": 1000}
    check_texts(RunConfig(**fits), structure)
    for name in fits:
        with pytest.raises(
            ConfigError, match=f"--{name.replace('_', '-')} 1001: .* {4 * HIDDEN} bytes a token.*fewer than 1000"
        ):
            check_texts(RunConfig(**{**fits, name: 1001}), structure)


def test_what_is_written_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = describe(tiny_model("llama"), "bf16")
    a_token = 2 * 3 * 3 * (HIDDEN // 6) * 2  # keys and values, blocks, heads, their width, bytes
    monkeypatch.setattr("search.room.memory_bytes", lambda: a_token * 111)
    check_written(structure, 10, 100, 2)
    with pytest.raises(ConfigError, match=r"--tokens 101: "):
        check_written(structure, 10, 101, 2)


def test_a_plan_has_fewer_shapes_than_there_are() -> None:
    assert len(log_uniform(3)) == 3
    with pytest.raises(ValueError, match=r"--plan 70000: use a whole number from 0 to 10000"):
        log_uniform(70_000)


@pytest.mark.parametrize("content", [b"1 0\n", b"1 9999999\n", DIGITS.encode() + b" 1\n", "٣ ٤\n".encode(), b"\xff 1\n"])
def test_shapes_have_bounds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shapes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shapes\.txt: ") as raised:
        read_shapes(path)
    assert len(str(raised.value)) < 400
