"""What cannot be reached is said from prices and map, before any text is read and anything is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from methods.policy import DENSE, Decision
from profilers.doctor import Finding
from search.cli import main
from search.config import ConfigError, RunConfig
from search.prepared import Option, SiteOptions
from search.reach import kernels_alone
from tests.search.run_server import fixed_prices, one_core
from tests.tiny import save_tiny

SMALL = [
    *(
        "--workload",
        "decode:batch=1,context=8",
        "--formats",
        "w8a8-token,w4a8-g32-asym",
        "--methods",
        "rtn",
        "--sequence",
        "16",
    ),
    *("--calibration-tokens", "32", "--search-tokens", "32", "--validation-tokens", "32", "--evaluations", "0"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_core(), fixed_prices():
        yield


def run(model: Path, folder: Path, *flags: str) -> int:
    own = ("--results", str(folder / "results"), "--cache", str(folder / "cache"), "--study", "s")
    return main(["run", "--model", str(model), *SMALL, *own, *flags])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--latency", "0.01x"), "--latency 0.01x"),
        (("--latency", "1x", "--size", "1kB"), "--size 1kB"),
        (("--latency", "1x", "--ttft", "1us"), "--ttft 0.001ms"),
    ],
)
def test_what_no_policy_reaches_is_refused_before_text_and_calibration(
    model: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("search.prepare.calibrate", never)
    monkeypatch.setattr("search.session.generate_tokens", never)
    monkeypatch.setattr("search.session.roles_from_text", never)
    assert run(model, tmp_path, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in error and "cannot be met" in error


def test_what_is_in_reach_is_a_line_before_the_calibration(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise ConfigError("stopped here")

    monkeypatch.setattr("search.prepare.calibrate", stopped)
    assert run(model, tmp_path, "--latency", "1x") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "in reach: " in line]
    assert "decode:batch=1,context=8 from " in line and "ms dense (0." in line and "size from " in line and "modelled" in line


def test_kernel_times_alone_warn_and_do_not_refuse() -> None:
    options = [(DENSE.label, "bf16", 4.0), (Decision.of("rtn", format="w8a8-token").label, "w8a8-token", 3.0)]
    sites = tuple(
        SiteOptions(f"s{i}", "o", i, 100, tuple(Option(label, fmt, 8, 100, ms, "kernel") for label, fmt, ms in options))
        for i in range(2)
    )
    (warning,) = kernels_alone([sites], RunConfig(latency="0.7x"))
    assert warning.startswith("warning: 0.7x") and "take 6 ms where the dense ones take 8 ms (0.75x;" in warning
    assert kernels_alone([sites], RunConfig(latency="0.8x")) == []
    (absolute,) = kernels_alone([sites], RunConfig(latency="5ms"))
    assert absolute.startswith("warning: 5ms")
    assert kernels_alone([sites], RunConfig(latency="6ms")) == []


@pytest.mark.parametrize("busy", [True, False])
def test_a_busy_machine_is_said_before_anything_is_timed(
    busy: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("profilers.doctor.load_average", lambda: 9.0 if busy else 0.0)
    monkeypatch.setattr("profilers.doctor._pace", lambda _: Finding("pace", not busy, "half as fast as it can be"))
    assert run(model, tmp_path, "--latency", "0.01x") == 2
    before, _, _ = capsys.readouterr().err.partition("latency table")
    assert ("this machine is busy" in before) == busy
    assert not busy or ("9.0 processes ran or waited" in before and "half as fast" in before)
