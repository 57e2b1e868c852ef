"""The project's pages taken apart: blocks of code, commands, links; and what a command becomes so that a test can run it."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from profilers import stored
from profilers.table import LatencyTable
from tests.tiny import VOCABULARY, seeded, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
HOW_TO = (
    "methods/README.md",
    "methods/formats/README.md",
    "profilers/README.md",
    "profilers/kernels/README.md",
    "search/strategies/README.md",
    "search/export/README.md",
)
PAGES = ("README.md", "search/tutorial.md", *HOW_TO)

SHELL = ("sh", "console")
"""Fences whose every line is a command; in `console` those behind `$ `, and the rest is what they print."""

OTHER = ("python", "text", "toml", "json")
"""Fences without commands; any other name is an error, so that no command hides behind a misspelled one."""

NOT_RUN = {
    "make": "sets up an environment; its targets are checked",
    "pip": "installs packages",
    "python": "minutes, or a part of this test suite; its file is checked",
    "vllm": "an engine of its own, for servers",
    "llama-cli": "llama.cpp's program, which is no Python package",
    "llama-server": "llama.cpp's program, which is no Python package",
    "cat": "shows a file",
    "scp": "another machine",
}
"""Programs that pages name and tests do not run, and why."""

PROGRAMS = ("search", *NOT_RUN)

SMALLER = {
    "--sequence": "16",
    "--calibration-tokens": "64",
    "--search-tokens": "64",
    "--validation-tokens": "64",
    "--evaluations": "1",
    "--finalists": "1",
}
"""What `search run` and `search materialize` get in place of their own values: as little text and as few evaluations as work."""

FORMATS = {"isolatency": "w8a8-g64,w4a8-g32-asym", "vllm": "w8a8-token,w4a16-g64", "llama.cpp": "w8a8-g32,w4a8-g32"}
"""Two of a runtime's own formats, where a command names none."""

LOOSE = {"--throughput": "0.1tok/s", "--memory": "8GiB"}
"""Objectives that any machine meets."""

TEXT = "the quick brown fox jumps over the lazy dog, again and again, while the rain in the plain stays the same. "
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@dataclass(frozen=True)
class Block:
    """A block of code: `language` of its fence, `indented` where it has none; `line` is that of its first line, from 1."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page, as words."""

    line: int
    words: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    """The code blocks of a page; raises ValueError for a fence of an unknown language."""
    found: list[Block] = []
    language, lines, start = "", [], 0
    for number, line in enumerate([*page.splitlines(), ""], 1):
        fence = re.fullmatch(r"```(\S*)\s*", line)
        if fence and language not in ("", "indented"):
            found.append(Block(language, start, "\n".join(lines)))
            language, lines = "", []
        elif fence:
            language, lines, start = fence[1], [], number + 1
            if language not in (*SHELL, *OTHER):
                raise ValueError(f"line {number}: a fence of {language!r}; use one of {', '.join((*SHELL, *OTHER))}")
        elif language == "indented" and not line.startswith("    "):
            found.append(Block(language, start, "\n".join(lines)))
            language, lines = "", []
        elif language:
            lines.append(line[4:] if language == "indented" else line)
        elif line.startswith("    ") and (number == 1 or not page.splitlines()[number - 2].strip()):
            language, lines, start = "indented", [line[4:]], number
    return found


def commands(page: str) -> list[Command]:
    """The commands of a page, in order: of shell fences, and of indented blocks of which any line begins with a known program."""
    return [command for block in blocks(page) for command in _commands(block)]


def _commands(block: Block) -> Iterator[Command]:
    lines = block.text.splitlines()
    if block.language == "indented" and not any(line.split(" ")[0] in PROGRAMS for line in lines):
        return
    if block.language not in (*SHELL, "indented"):
        return
    pending = ""
    for offset, line in enumerate(lines):
        if block.language == "console" and not pending:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        pending += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = [word for word in shlex.split(pending, comments=True)]
        pending = ""
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words.pop(0)  # an environment variable for this command
        if words:
            yield Command(block.line + offset, tuple(words))


def inline_commands(page: str) -> list[str]:
    """Commands within a line of text: `` `search …` ``."""
    return [text for text in re.findall(r"`([^`\n]+)`", _prose(page)) if text.split(" ")[0] == "search"]


def links(page: str) -> list[str]:
    """Targets of links and pictures that are no addresses, without anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    return [target.partition("#")[0] for target in found if "://" not in target and not target.startswith("#")]


def _prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def small_model(folder: Path) -> Path:
    """A checkpoint that stands for any model: two Llama blocks of 128 channels, so that every format's groups divide its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with seeded(0):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def runnable(words: Sequence[str], model: Path, folder: Path) -> list[str]:
    """The arguments of `search` with what a test replaces in `folder`, the page's own, and nothing else.

    A model by `model` under its own name, a text by a small file, tasks by one of two questions, workloads by short ones; times by generous
    shares of the dense model's (different ones stay different) with a size that the dense model exceeds, because the time of so small a
    model is noise; a policy file that is not there by one of a study; in what runs a model, the values of `SMALLER`; the plain rounding and
    `FORMATS` where none are named. What is validated is validated on this machine.
    """
    given = _given(words[2:])
    named = dict(given)
    smaller = {"run": tuple(SMALLER), "materialize": ("--sequence", "--calibration-tokens")}.get(words[1], ())
    arguments = [words[1], *(["--on", "cpu"] if words[1] == "validate" else [])]
    for flag, value in given:
        if flag in ("--model", "--size", *smaller):
            continue
        arguments += [word for word in (flag, _replaced(flag, value, words[1], folder)) if word]
    if smaller or "--model" in named:
        arguments += ["--model", str(_model(named.get("--model", "default"), model, folder))]
    arguments += [word for flag in smaller for word in (flag, SMALLER[flag])]
    if words[1] == "run" and "--dry-run" not in named:
        arguments += ["--size", f"{0.8 * (model / 'model.safetensors').stat().st_size / 1e6:.3g}MB"]
    if words[1] in ("run", "profile"):
        arguments += [] if "--workload" in named else ["--workload", "decode:batch=1,context=16"]
    if words[1] == "run":
        arguments += [] if "--methods" in named else ["--methods", "rtn"]
        arguments += [] if "--formats" in named else ["--formats", FORMATS[named.get("--runtime", "isolatency")]]
    return arguments


def elsewhere(table: Path) -> None:
    """Makes the table of this machine one of another."""
    measured = LatencyTable.read(table)
    other = LatencyTable("0" * 16, "another machine", header={**measured.header, "fingerprint": "0" * 16})
    other.add(measured.rows.values())
    other.add_checks(measured.checks)
    stored.write(other, table)


def _model(name: str, model: Path, folder: Path) -> Path:
    path = folder / Path(name).name.removesuffix(".gguf")
    if not path.exists():
        path.symlink_to(model)
    return path


def _given(words: Sequence[str]) -> list[tuple[str, str]]:
    """(flag, value) in order; `("", word)` for a positional argument, `(flag, "")` for a flag without a value."""
    found: list[tuple[str, str]] = []
    waiting = ""
    for word in words:
        if word.startswith("--"):
            found += [(waiting, "")] if waiting else []
            flag, _, value = word.partition("=")
            found += [(flag, value)] if value else []
            waiting = "" if value else flag
        else:
            found.append((waiting, word))
            waiting = ""
    return found + ([(waiting, "")] if waiting else [])


def _replaced(flag: str, value: str, command: str, folder: Path) -> str:
    if command == "materialize" and not flag and not Path(value).exists():
        return str(min(folder.glob("results/*/policies/*.yaml")))
    if flag in ("--latency", "--ttft", "--tpot-p95"):
        return objective(value)
    if flag in LOOSE:
        return LOOSE[flag]
    if flag == "--workload":
        return re.sub(r"(context|prompt)=\d+", r"\1=16", value)
    if flag == "--data":
        role, _, source = value.rpartition("=")
        return f"{role}={_text(source, folder)}" if role else str(_text(source, folder))
    if flag == "--tasks":
        return ",".join(str(_task(name, folder)) for name in value.split(","))
    return value


def objective(text: str) -> str:
    """`30ms` as 4x, and a share such as 0.7x as 2.7x."""
    return f"{2 + float(text[:-1]):.3g}x" if text.endswith("x") else "4x"


def _text(source: str, folder: Path) -> Path:
    path = folder / re.sub(r"\W+", "-", source)
    words, draw = TEXT.split(), random.Random(source)
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(100)))
    return path


def _task(name: str, folder: Path) -> Path:
    (folder / "rows.jsonl").write_text('{"q": "the quick", "choices": [" brown", " rain"], "gold": 0}\n' * 2)
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, folder=folder))
    return path
