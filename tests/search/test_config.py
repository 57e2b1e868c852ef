"""Configuration: flags, TOML and the saved run are one thing."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from methods.errors import InputError
from profilers.kernels.build import kernel_folder
from search.config import ConfigError, RunConfig, add_flags, default_cache, from_arguments, read_toml, to_toml
from search.folder import open_study
from search.objectives import parse_objective


def parse(*arguments: str) -> RunConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_arguments(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("text", "value", "relative"), [("30ms", 30, False), ("1.5s", 1500, False), ("0.6x", 0.6, True), ("800us", 0.8, False)]
)
def test_objectives_have_units(text: str, value: float, relative: bool) -> None:
    objective = parse_objective(text)
    assert objective.value == pytest.approx(value)
    assert objective.relative is relative
    assert parse_objective(objective.text) == objective


@pytest.mark.parametrize("text", ["30", "fast", "-3ms", "0ms", "30 m s", "nanms", ""])
def test_objectives_without_a_unit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--latency"):
        parse_objective(text)


def test_relative_objectives_scale_with_the_dense_latency() -> None:
    assert parse_objective("0.6x").resolve(50.0) == pytest.approx(30.0)
    assert parse_objective("20ms").resolve(50.0) == pytest.approx(20.0)


def test_every_field_goes_through_toml_and_back(tmp_path) -> None:
    config = parse(
        "--latency", "30ms", "--formats", "w4a16-g64,w8a16", "--data", 'a=b"c.txt', "--data", "x", "--max-kl", "0.25"
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert parse("--config", str(path)) == config
    assert set(read_toml(path)) == {field.name for field in dataclasses.fields(RunConfig)}


def test_flags_win_over_the_file(tmp_path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('latency = "10ms"\nthreads = 3\n')
    config = parse("--config", str(path), "--latency", "20ms")
    assert (config.latency, config.threads) == ("20ms", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("latencie = '1ms'", "unknown name 'latencie'"),
        ("threads = 'two'", "threads: expected a whole number, found 'two'"),
        ("= 3", "not TOML"),
        ("seed = true", "seed: expected a whole number, found true"),
    ],
)
def test_bad_files_are_explained(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(path))


@pytest.mark.parametrize(
    "flags", [("--sequence", "0"), ("--workload", "decode:batch=x"), ("--evaluations", "-1"), ("--max-kl", "-1")]
)
def test_bad_values_are_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        parse("--latency", "1ms", *flags)


def test_a_study_is_named_after_what_it_studies() -> None:
    assert parse("--latency", "1ms").study_name == "smollm2-135m-instruct-cpu-decode-batch-1-context-512"
    assert parse("--latency", "1ms", "--study", "mine").study_name == "mine"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    (
        ("study", "../elsewhere", "a name in the folder of --results, not a path"),
        ("study", "/tmp/elsewhere", "a name in the folder of --results, not a path"),
        ("study", "..", "a name in the folder of --results, not a path"),
        ("study", "deep/er", "a name in the folder of --results, not a path"),
        ("study", "two\nlines", r"holds a line break or another control character"),
        ("results", "two\nlines", r"holds a line break or another control character"),
        ("store", "a\tb.db", r"holds a line break or another control character"),
        ("data", "calibrate=a\r.txt", r"holds a line break or another control character"),
        ("results", "bad\udcff", "is no UTF-8"),
        ("results", "", "--results is empty"),
        ("data", "", "--data '': names no text"),
        ("data", "report=", "--data 'report=': names no text"),
        ("model", " ", "--model is empty"),
    ),
)
def test_names_that_lead_elsewhere_or_that_no_file_holds_are_refused(flag: str, value: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        parse(f"--{flag}", value)
    assert "\n" not in str(refusal.value) and f"--{flag}" in str(refusal.value)


def test_a_study_may_have_any_name(tmp_path: Path) -> None:
    for name in ("s", "0.6x run", ".hidden", "größe", "a\\b", ""):
        assert parse("--study", name).folder.parent == Path("results")


@pytest.mark.parametrize(
    ("variables", "expected"),
    (
        ({}, "~/.cache/isolatency"),
        ({"XDG_CACHE_HOME": ""}, "~/.cache/isolatency"),
        ({"XDG_CACHE_HOME": "relative/cache"}, "~/.cache/isolatency"),
        ({"XDG_CACHE_HOME": "/var/cache"}, "/var/cache/isolatency"),
        ({"XDG_CACHE_HOME": "/var/cache", "ISOLATENCY_CACHE": ""}, "/var/cache/isolatency"),
        ({"ISOLATENCY_CACHE": "", "XDG_CACHE_HOME": ""}, "~/.cache/isolatency"),
        ({"ISOLATENCY_CACHE": "own"}, "own"),
    ),
)
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("ISOLATENCY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache() == Path(expected).expanduser() == kernel_folder().parent


def test_an_account_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISOLATENCY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(ValueError, match="set ISOLATENCY_CACHE"):
        default_cache()


def test_a_studys_own_configuration_means_the_study_where_it_lies_now(tmp_path: Path) -> None:
    config = parse("--results", str(tmp_path / "results"), "--latency", "0.5x", "--model", "m")
    with open_study(config) as folder:
        pass
    assert parse("--config", str(folder / "config.toml")) == config
    moved = folder.rename(tmp_path / "carried")
    again = parse("--config", str(moved / "config.toml"))
    assert again.folder == moved and again.model == "m"
    assert parse("--config", str(moved / "config.toml"), "--study", "new").study_name == "new"
    (tmp_path / "copy.toml").write_text((moved / "config.toml").read_text())
    assert parse("--config", str(tmp_path / "copy.toml")) == config
