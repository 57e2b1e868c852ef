"""Configuration: flags, TOML and the saved run are one thing."""

import argparse
import dataclasses

import pytest

from search.config import ConfigError, RunConfig, add_flags, from_arguments, read_toml, to_toml
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
