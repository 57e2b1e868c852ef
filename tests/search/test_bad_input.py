"""Bad input: one line on stderr, a non-zero exit, no traceback, nothing half-written."""

import json
from pathlib import Path

import pytest
import torch

from search.cli import main
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def run(capsys, *arguments: object) -> str:
    """The error line of a command that must fail."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.strip().splitlines() if line.startswith("search:")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latency", "30"], "has no unit"),
        (["--latency", "fast"], "not a latency"),
        ([], "--latency is missing"),
        (["--latency", "1ms", "--target", "tpu-v9"], "unknown target 'tpu-v9'"),
        (["--latency", "1ms", "--target", "a100"], "not this machine"),
        (["--latency", "1ms", "--workload", "chat"], "write decode:batch=1"),
        (["--latency", "1ms", "--formats", "w9a16"], "bits=9"),
        (["--latency", "1ms", "--formats", "int4"], "unknown format 'int4'"),
        (["--latency", "1ms", "--methods", "gtpq"], "did you mean gptq"),
        (["--latency", "1ms", "--data", "nowhere.txt"], "no such file"),
        (["--latency", "1ms", "--runtime", "vllm", "--formats", "w3a8-g32-asym"], "nothing can be compressed"),
        (["--latency", "1ms", "--sequence", "0"], "at least 1"),
        (["--latency", "1ms", "--tasks", "nowhere.yaml"], "no such file"),
    ],
)
def test_bad_flags(model, tmp_path, capsys, flags: list[str], message: str) -> None:
    error = run(capsys, "run", "--model", model, "--results", tmp_path / "r", "--cache", tmp_path / "c", "--quiet", *flags)
    assert message in error


def test_models_that_cannot_be_loaded(tmp_path, capsys) -> None:
    def refusal(path: object) -> str:
        return run(
            capsys,
            "run",
            "--model",
            path,
            "--latency",
            "1ms",
            "--results",
            tmp_path / "r",
            "--cache",
            tmp_path / "c",
            "--quiet",
        )

    assert "no such folder" in refusal(tmp_path / "nothing")
    pickle = save_tiny(tmp_path / "pickle", "llama")
    torch.save({}, pickle / "pytorch_model.bin")
    (pickle / "model.safetensors").unlink()
    assert "safetensors" in refusal(pickle)
    foreign = save_tiny(tmp_path / "foreign", "llama")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    assert "code" in refusal(foreign)
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf")
    assert "broken.gguf" in refusal(tmp_path / "broken.gguf")


def test_weights_with_nan_are_named(tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "nan", "llama")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = run(
        capsys, "run", "--model", folder, "--latency", "1ms", "--results", tmp_path / "r", "--cache", tmp_path / "c", "--quiet"
    )
    assert name in error
    assert "NaN" in error


def test_too_short_a_text(model, tmp_path, capsys) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words\n\n" * 8)
    flags = ["--workload", "decode:batch=1,context=8", "--formats", "w8a8-token"]
    error = run(
        capsys,
        "run",
        "--model",
        model,
        "--latency",
        "9x",
        "--data",
        text,
        "--results",
        tmp_path / "r",
        "--cache",
        tmp_path / "c",
        "--quiet",
        *flags,
    )
    assert "too short" in error


def test_a_folder_that_is_no_study(model, tmp_path, capsys) -> None:
    (tmp_path / "r" / "mine").mkdir(parents=True)
    (tmp_path / "r" / "mine" / "thesis.tex").write_text("years of work")
    error = run(capsys, "run", "--model", model, "--latency", "1ms", "--results", tmp_path / "r", "--study", "mine", "--quiet")
    assert "no study" in error
    assert "no study" in run(capsys, "show", tmp_path)
    assert (tmp_path / "r" / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_that_is_none(tmp_path, capsys) -> None:
    assert "not a compressed checkpoint" in run(capsys, "generate", tmp_path)


@pytest.mark.parametrize("content", ["garbage\n", '{"schema": 99}\n'])
def test_a_corrupt_table_is_refused(model, tmp_path, capsys, content: str) -> None:
    from profilers.target import local_cpu

    table = tmp_path / "c" / "tables" / f"{local_cpu().fingerprint}.jsonl"
    table.parent.mkdir(parents=True)
    table.write_text(content)
    flags = ["--workload", "decode:batch=1,context=8", "--formats", "w8a8-token"]
    error = run(
        capsys,
        "run",
        "--model",
        model,
        "--latency",
        "9x",
        "--results",
        tmp_path / "r",
        "--cache",
        tmp_path / "c",
        "--quiet",
        *flags,
    )
    assert str(table) in error
