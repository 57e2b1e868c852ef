"""What a model cannot read is refused when it is opened, with both numbers, by every command that opens one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from methods import checkpoint
from methods.model.load import LoadedModel, load
from methods.model.tokenizer import UnknownToken, beyond_embedding, check_ids, checked_ids
from methods.policy_file import PolicyFile, render
from profilers.workload import parse_workload
from search.cli import main
from search.config import ConfigError, RunConfig
from search.deliver import COMPARED, compared
from search.export.standalone import export_checkpoint
from search.fit import continuation_notes, sequence_length, sequence_notes, workload_notes
from search.progress import Progress
from search.session import Session
from tests.edits import edits_of
from tests.tiny import VOCABULARY, seeded, tiny_model, tiny_tokenizer, tiny_tokens

POSITIONS = 24
ADDED = ["<|tool_0|>", "quick brown"]
PLAIN, STRANGE = "the lazy dog and the rain stay over the plain. ", "the quick brown fox jumps over the lazy dog. "


def saved(folder: Path, arch: str, *, longer: bool = False) -> Path:
    """A checkpoint with `POSITIONS` positions; longer: its tokenizer knows two tokens that the embedding has no rows for."""
    from transformers import AutoModelForCausalLM

    config = tiny_model(arch).config
    setattr(config, "n_positions" if arch == "gpt2" else "max_position_embeddings", POSITIONS)
    with seeded(0):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if longer:
        tokenizer.add_tokens(ADDED)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder: Path, arch: str, *, longer: bool = False) -> LoadedModel:
    """`saved`, loaded."""
    return load(str(saved(folder / arch, arch, longer=longer)), folder / "cache")


def written(folder: Path, loaded: LoadedModel) -> Path:
    """A compressed checkpoint of the model."""
    policy, edits = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w8a16"})
    checkpoint.write(folder, loaded, PolicyFile(policy, id="one"), edits)
    return folder


def lines(text: str) -> str:
    """A text of 400 paragraphs, each another."""
    return "\n\n".join(f"{number} {text}" for number in range(400))


@pytest.mark.parametrize("arch", ["gpt2", "opt"])
@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ("decode", r"context=512 reads 513 tokens .* has 24 positions; give --workload decode:batch=1,context=23 or less$"),
        ("decode:context=24", "reads 25 tokens .* has 24 positions"),
        (
            "prefill:batch=2,prompt=25",
            r"reads 25 tokens .* has 24 positions; give --workload prefill:batch=2,prompt=24 or less$",
        ),
    ],
)
def test_workloads_beyond_the_table_of_positions_are_refused(arch: str, workload: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        workload_notes(opened(tmp_path, arch), [parse_workload(workload)])


@pytest.mark.parametrize("workload", ["decode:context=23", "prefill:batch=2,prompt=24"])
def test_workloads_up_to_its_end_run(workload: str, tmp_path: Path) -> None:
    from profilers.steps import Step, once

    loaded, asked = opened(tmp_path, "gpt2"), parse_workload(workload)
    assert workload_notes(loaded, [asked]) == []
    with torch.inference_mode():
        assert once(Step(loaded.model, asked)).shape == (asked.batch,)


def test_computed_positions_go_on_with_a_note(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama")
    assert workload_notes(loaded, [parse_workload("decode:context=23"), parse_workload("prefill:prompt=24")]) == []
    (note,) = workload_notes(loaded, [parse_workload("decode:context=24"), parse_workload("decode:context=8")])
    assert "context=24 reads 25 tokens" in note
    assert "for 24 positions" in note


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_sequences_are_as_long_as_the_model_reads(arch: str, tmp_path: Path) -> None:
    loaded = opened(tmp_path, arch)
    assert (sequence_length(loaded, 512), sequence_length(loaded, 24), sequence_length(loaded, 8)) == (24, 24, 8)
    assert sequence_notes(loaded, 24) == []
    assert sequence_notes(loaded, 25) == ["sequences are 24 tokens long, as many as the model has positions, not --sequence 25"]


def test_a_sequence_without_a_loss_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"--sequence 1: use a whole number from 2 to"):
        RunConfig(sequence=1)
    assert RunConfig(sequence=2).sequence == 2


def test_a_model_of_one_position_is_refused(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama")
    loaded.model.config.max_position_embeddings = 1
    with pytest.raises(ConfigError, match=r"--sequence 512: llama has 1 position\(s\), and a loss needs 2 tokens"):
        sequence_length(loaded, 512)


@pytest.mark.parametrize("command", [["run", "--latency", "0.9x"], ["run", "--latency", "0.9x", "--dry-run"], ["profile"]])
def test_the_default_workload_is_refused_before_anything_is_measured(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "gpt2", "gpt2")
    places = ["--cache", str(tmp_path / "c"), *(["--results", str(tmp_path / "r")] if command[0] == "run" else [])]
    assert main([*command, "--model", str(model), *places]) == 2
    assert "reads 513 tokens of a sequence, and gpt2 has 24 positions" in capsys.readouterr().err
    assert not list((tmp_path / "c").rglob("*.parquet"))


def test_a_dry_run_shows_the_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "llama", "llama", longer=True)
    flags = ["--latency", "0.9x", "--workload", "decode:context=24", "--sequence", "8", "--formats", "w8a8-token"]
    assert main(["run", "--dry-run", "--json", "--model", str(model), *flags, "--cache", str(tmp_path / "c")]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert "reads 25 tokens of a sequence, and llama is for 24 positions" in notes


@pytest.mark.parametrize(
    ("n_tokens", "message"),
    [
        (21, r"--prompt of 5 tokens and --tokens 21 need 25 positions, and gpt2 has 24; ask for --tokens 20 or fewer$"),
        (20, None),
    ],
)
def test_a_continuation_ends_with_the_positions(n_tokens: int, message: str | None, tmp_path: Path) -> None:
    loaded = opened(tmp_path, "gpt2")
    if message is None:
        assert continuation_notes(loaded, 5, n_tokens) == []
        return
    with pytest.raises(ConfigError, match=message):
        continuation_notes(loaded, 5, n_tokens)


def test_a_prompt_beyond_the_positions_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompt of 25 tokens .* has 24; shorten it$"):
        continuation_notes(opened(tmp_path, "gpt2"), 25, 1)


def test_a_long_continuation_by_computed_positions_is_told(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama")
    assert continuation_notes(loaded, 5, 20) == []
    (note,) = continuation_notes(loaded, 5, 21)
    assert "takes 25 positions, and llama is for 24" in note


@pytest.mark.parametrize(
    ("arch", "flags", "message"),
    [
        ("gpt2", ["--prompt", PLAIN, "--tokens", "500"], "positions, and c has 24"),
        ("llama", ["--prompt", STRANGE], "--prompt holds the token 'quick brown' with the id 129.*has 128 rows"),
    ],
)
def test_generate_refuses_before_it_writes(
    arch: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "c", opened(tmp_path, arch, longer=True))
    assert main(["generate", str(folder), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_longer_tokenizer_is_told_and_only_its_text_refused(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama", longer=True)
    (note,) = loaded.notes
    assert note == beyond_embedding(loaded.tokenizer, loaded.model)
    assert "2 tokens beyond the 128 rows of the embedding, '<|tool_0|>' with the id 128 first" in note
    for name, text in (("plain", PLAIN), ("strange", STRANGE)):
        (tmp_path / f"{name}.txt").write_text(lines(text))

    def corpora(name: str) -> object:
        few = {"sequence": 16, "calibration_tokens": 32, "search_tokens": 32, "validation_tokens": 32}
        config = RunConfig(model=str(tmp_path / "llama"), data=(str(tmp_path / f"{name}.txt"),), cache=str(tmp_path), **few)
        return Session(config, Progress(quiet=True)).corpora

    assert corpora("plain")
    with pytest.raises(
        UnknownToken, match=r"strange\.txt \(\w+\) holds the token 'quick brown' with the id 129.* has 128 rows"
    ):
        corpora("strange")


def test_special_tokens_without_an_embedding_are_no_news_until_a_text_holds_one(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama")
    loaded.tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert beyond_embedding(loaded.tokenizer, loaded.model) == ""
    ids = loaded.tokenizer("the <image>", return_tensors="pt")["input_ids"]
    with pytest.raises(UnknownToken, match="--prompt holds the token '<image>' with the id 128"):
        check_ids(ids, loaded.model, loaded.tokenizer, "--prompt")


def test_a_tokenizer_that_is_shorter_than_the_embedding_is_no_news(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama")
    loaded.model.resize_token_embeddings(VOCABULARY + 16)
    assert beyond_embedding(loaded.tokenizer, loaded.model) == ""


def test_text_that_others_turn_into_tokens_is_checked_at_the_embedding(tmp_path: Path) -> None:
    loaded = opened(tmp_path, "llama", longer=True)
    with torch.inference_mode():
        with checked_ids(loaded.model, loaded.tokenizer, "--tasks: their text"):
            loaded.model(tiny_tokens(1, 8))
            with pytest.raises(UnknownToken, match=r"--tasks: their text holds the token '<\|tool_0\|>' with the id 128"):
                loaded.model(torch.tensor([[3, 128, 4]]))
        with pytest.raises(IndexError):
            loaded.model(torch.tensor([[3, 128, 4]]))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_checkpoint_is_exported_whatever_the_text_of_the_comparison_holds(arch: str, tmp_path: Path) -> None:
    """The text is longer than 24 tokens."""
    loaded = opened(tmp_path, arch)
    loaded.tokenizer.add_tokens(["the river"])
    folder = written(tmp_path / "c", loaded)
    assert export_checkpoint(folder, "dense", tmp_path / "out").ok


def test_materialize_needs_no_workload_and_says_what_it_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "gpt2", "gpt2", longer=True)
    loaded = load(str(model), tmp_path / "cache")
    policy, _ = edits_of(loaded.model, loaded.structure, {loaded.structure.sites[0].name: "w8a16"})
    path = tmp_path / "policy.yaml"
    path.write_text(render(PolicyFile(policy, id="one"), loaded.structure))
    (tmp_path / "plain.txt").write_text(lines(PLAIN))
    flags = ["--model", str(model), "--data", str(tmp_path / "plain.txt"), "--calibration-tokens", "48"]
    assert main(["materialize", str(path), "--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c"), *flags]) == 0
    assert "2 tokens beyond the 128 rows" in capsys.readouterr().err
    assert checkpoint.read(tmp_path / "o").edits.keys() == policy.sites.keys()


@pytest.mark.parametrize(("length", "n_sequences"), [(2, 32), (60, 2), (64, 1), (512, 1)])
def test_an_export_is_compared_on_more_than_a_few_tokens(length: int, n_sequences: int) -> None:
    tokens = torch.arange(40 * length).view(40, length)
    assert torch.equal(compared(tokens), tokens[:n_sequences])
    assert compared(tokens).numel() >= COMPARED
    assert torch.equal(compared(tokens[:1]), tokens[:1])
