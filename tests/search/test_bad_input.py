"""Bad input to every command: one or two lines that name the value and the way out, status 2, no traceback, nothing half-written."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.cli import _parser, main
from search.config import from_arguments, to_toml
from tests.search.run_server import fixed_prices, one_core
from tests.tiny import save_tiny

SMALL = ["--workload", "decode:batch=1,context=8", "--formats", "w8a8-token,w4a8-g32-asym", "--sequence", "32"]
SMALL += ["--calibration-tokens", "64", "--search-tokens", "64", "--validation-tokens", "64", "--evaluations", "0"]


@dataclass(frozen=True)
class Place:
    """Where a command works: a sound model, a finished study of it, and a folder of the test's own."""

    model: Path
    study: Path
    cache: Path
    own: Path

    def run(self, *flags: object) -> list[object]:
        """A run of the sound model that comes to nothing but its bad input."""
        return ["run", "--model", self.model, "--latency", "0.9x", *self.small(), *flags]

    def small(self) -> list[object]:
        """Flags of a small run into the test's own folder."""
        return [*SMALL, "--results", self.own / "results", "--cache", self.own / "cache", "--quiet"]

    def with_model(self, model: object) -> list[object]:
        """A run of another model."""
        return ["run", "--model", model, "--latency", "0.9x", *self.small()]

    def again(self, *flags: object) -> list[object]:
        """The command that made a copy of the study, with further flags."""
        copied = self.copy()
        own = ["--results", copied.parent, "--study", copied.name, "--cache", self.cache, "--quiet"]
        return ["run", "--model", self.model, "--latency", "0.9x", *SMALL, *own, *flags]

    def copy(self, name: str = "s") -> Path:
        """A copy of the study to spoil."""
        if not (self.own / name).exists():
            shutil.copytree(self.study, self.own / name)
        return self.own / name

    def file(self, name: str, content: str | bytes) -> Path:
        """A file of the test's own."""
        path = self.own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copied_model(self, change: Callable[[Path], object]) -> Path:
        """A copy of the model, spoiled."""
        folder = self.own / "model"
        shutil.copytree(self.model, folder)
        change(folder)
        return folder

    def checkpoint(self) -> Path:
        """A copy of the study's checkpoint to spoil."""
        (source,) = (self.study / "models").iterdir()
        return Path(shutil.copytree(source, self.own / "checkpoint"))

    def policy(self) -> Path:
        """A copy of the study's policy."""
        return Path(shutil.copy(self.study / "policies" / "0.9x.yaml", self.own / "policy.yaml"))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One core and fixed prices: the study's numbers do not matter here."""
    with one_core(), fixed_prices():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model, finished study, cache."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny(folder / "llama", "llama")
    own = ["--results", str(folder / "results"), "--study", "s", "--cache", str(folder / "cache"), "--quiet"]
    assert main(["run", "--model", str(model), "--latency", "0.9x", *SMALL, *own]) == 0
    return model, folder / "results" / "s", folder / "cache"


def edited(path: Path, old: str, new: str) -> Path:
    """The file with a text in it replaced."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def flipped(path: Path, back: int = 40) -> Path:
    """The file with one byte changed."""
    data = bytearray(path.read_bytes())
    data[-back] ^= 0xFF
    path.write_bytes(bytes(data))
    return path


def set_json(path: Path, **values: object) -> Path:
    """The JSON file with other values."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


def poisoned(folder: Path) -> None:
    """A NaN in one weight."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_tensor(folder: Path) -> None:
    """A checkpoint that lacks one weight."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    """Weights as torch.save leaves them."""
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    """Weights of which the end is missing."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def table(place: Place, content: str) -> list[object]:
    """A run on a latency table of this machine with that content."""
    from profilers.target import local_cpu

    place.file(f"cache/tables/{local_cpu().fingerprint}.jsonl", content)
    return place.run()


def spoiled_table(place: Place) -> list[object]:
    """A run on this machine's table, of which every row was changed; one alone would be measured again."""
    (source,) = (place.cache / "tables").glob("*.jsonl")
    place.file(f"cache/tables/{source.name}", source.read_text().replace('"kernel": "', '"kernel": "other '))
    return place.run()


def spoiled_bank(place: Place) -> list[object]:
    """A policy from a study whose compressed tensors were changed; a run would make them again."""
    study = place.copy()
    for path in (study / "bank").rglob("*.safetensors"):
        flipped(path)
    return ["materialize", place.policy(), "--out", place.own / "out", "--study", study]


Bad = tuple[str, Callable[[Place], list[object]], str]

FLAGS: list[tuple[list[object], str]] = [
    (["--latency", "30"], "--latency '30' has no unit; write 30ms"),
    (["--latency", "fast"], "--latency 'fast'"),
    (["--latency", "0ms"], "above zero"),
    (["--latency=-5ms"], "--latency '-5ms'"),
    (["--latency", "3parsecs"], "parsecs"),
    (["--latency", ""], "--latency is missing"),
    (["--target", "tpu-v9"], "target 'tpu-v9': not known here"),
    (["--workload", "chat"], "write decode:batch=1"),
    (["--workload", "decode:batch=0"], "batch=0"),
    (["--workload", "decode:ctx=8"], "ctx"),
    (["--formats", "w9a16"], "bits=9"),
    (["--formats", "int4"], "unknown format 'int4'"),
    (["--methods", "gtpq"], "--methods gtpq: no method 'gtpq'; did you mean gptq"),
    (["--methods", "gptq:colour=red"], "colour"),
    (["--methods", "gptq:fitter=best"], "best"),
    (["--transform", "quart"], "--transform quart"),
    (["--transform", "quarot:angle=3"], "angle"),
    (["--transform", "gptq"], "--transform gptq"),
    (["--runtime", "onnx"], "onnx"),
    (["--runtime", "vllm", "--formats", "w3a8-g32-asym"], "nothing can be compressed"),
    (["--sequence", "0"], "--sequence 0: use a whole number from 2 to"),
    (["--sequence", "long"], "'long'"),
    (["--calibration-tokens", "-5"], "--calibration-tokens -5"),
    (["--evaluations", "-1"], "--evaluations -1: use a whole number from 0 to"),
    (["--tokens", "-1"], "--tokens -1: use a whole number from 0 to"),
    (["--budget", "10"], "--budget '10' has no unit; write 10m"),
    (["--budget", "a while"], "--budget 'a while': not a time"),
    (["--threads", "-1"], "--threads -1"),
    (["--max-kl", "-0.1"], "--max-kl -0.1"),
    (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--data", "search=a.txt", "--data", "search=b.txt"], "'search' has a source already"),
    (["--data", "search=a.txt"], "no text for calibrate"),
    (["--tasks", "nowhere.yaml"], "no such file: nowhere.yaml"),
    (["--size", "10kB"], "--size 10kB cannot be met: the smallest legal policy takes"),
    (["--memory", "10kB"], "--memory 10kB cannot be met: the smallest legal policy takes"),
    (["--cache", "/dev/null/cache"], "--cache /dev/null/cache: nothing can be written there"),
    (["--export", "onnx"], "onnx"),
    (["--config", "nowhere.toml"], "--config nowhere.toml"),
    (["--store", "oracle+none://host/db"], "oracle"),
    (["--store", "postgresql+pg8000://me@127.0.0.1:1/db"], "postgresql+psycopg://"),
    (["--results", "/dev/null/results"], "/dev/null/results"),
    (["--results", "/proc/nowhere"], "/proc/nowhere"),
    (["--frmats", "w8a8-token"], "--frmats"),
]
"""Flags of a run of a sound model, and what the error says."""


def study_without_answer(place: Place) -> bool:
    """A study's folder, before its run got anywhere."""
    arguments = [str(argument) for argument in place.run("--study", "e")]
    parsed = _parser().parse_args(arguments)
    return bool(place.file("results/e/config.toml", to_toml(from_arguments(parsed))))


def bad_flags() -> list[Bad]:
    """The flags above as commands."""
    return [(" ".join(map(str, flags)), lambda p, flags=flags: p.run(*flags), says) for flags, says in FLAGS]  # type: ignore[misc]


INPUTS: list[Bad] = [
    (
        "exports where a file lies",
        lambda p: (
            p.run("--study", "e", "--export", "dense") if p.file("results/e/exports", "") and study_without_answer(p) else []
        ),
        "exports/dense: nothing can be written there",
    ),
    (
        "a table into a folder that is a file",
        lambda p: ["profile", "--plan", "1", "--out", p.file("f", "") / "t.parquet"],
        "f is a file",
    ),
    (
        "an export into nowhere",
        lambda p: ["export", p.checkpoint(), "--format", "dense", "--out", p.file("f", "") / "x"],
        "f is a file",
    ),
    (
        "materialize into a file",
        lambda p: ["materialize", p.policy(), "--out", p.file("f", ""), "--model", p.own / "nothing"],
        "exists and is not empty",
    ),
    (
        "a task file that names code",
        lambda p: p.run("--tasks", p.file("t.yaml", "task: a\nprocess_docs: !function utils.f\n")),
        "names the Python function utils.f, which would run here",
    ),
    ("a TOML that is none", lambda p: p.run("--config", p.file("c.toml", "latency = 0.9x")), "not TOML"),
    ("a TOML of another program", lambda p: p.run("--config", p.file("c.toml", "colour = 'red'")), "unknown name 'colour'"),
    (
        "a TOML value of another type",
        lambda p: p.run("--config", p.file("c.toml", "seed = 'one'")),
        "seed: expected a whole number, found 'one'",
    ),
    ("a text that is none", lambda p: p.run("--data", p.file("t.txt", b"\xff\xfe\x00")), "cannot be read as .txt"),
    ("lines that are not JSON", lambda p: p.run("--data", p.file("t.jsonl", "{text: 1}")), "not JSON lines"),
    ("lines without a text", lambda p: p.run("--data", p.file("t.jsonl", '{"words": 1}')), "no column `text`"),
    ("a Parquet file that is none", lambda p: p.run("--data", p.file("t.parquet", "PAR1")), "cannot be read as .parquet"),
    ("a folder without texts", lambda p: p.run("--data", p.file("texts/a.pdf", "%PDF").parent), "the folder holds no .txt"),
    ("a text that is too short", lambda p: p.run("--data", p.file("t.txt", "a few words\n\n" * 8)), "too short"),
    (
        "a store that is no database",
        lambda p: p.run("--store", p.file("s.db", "no database" * 99)),
        "cannot be opened as a study",
    ),
    ("a study that is a file", lambda p: p.run("--study", p.file("results/f", "").name), "is a file; choose another --study"),
    ("a folder of something else", lambda p: p.run("--study", p.file("results/x/thesis.tex", "").parent.name), "is no study"),
    ("no model there", lambda p: p.with_model(p.own / "nothing"), "no such folder or file"),
    ("no such package", lambda p: p.with_model("package:nobodys_model"), "not installed; run pip install nobodys-model"),
    ("no such model on the hub", lambda p: p.with_model("nobody/nothing"), "no local folder of that name"),
    ("a pickle", lambda p: p.with_model(p.copied_model(pickled)), "a pickle, which can run code; safetensors or GGUF only"),
    ("weights cut short", lambda p: p.with_model(p.copied_model(cut_short)), "not a readable safetensors file"),
    ("a weight is missing", lambda p: p.with_model(p.copied_model(without_a_tensor)), "no weights for"),
    ("a weight is NaN", lambda p: p.with_model(p.copied_model(poisoned)), "down_proj.weight holds NaN"),
    ("no config.json", lambda p: p.with_model(p.copied_model(lambda f: (f / "config.json").unlink())), "no config.json"),
    (
        "a torn config.json",
        lambda p: p.with_model(p.copied_model(lambda f: (f / "config.json").write_text('{"a'))),
        "not JSON",
    ),
    (
        "a model with code of its own",
        lambda p: p.with_model(p.copied_model(lambda f: set_json(f / "config.json", auto_map={"AutoModel": "evil.M"}))),
        "brings its own code",
    ),
    (
        "a model that is no decoder",
        lambda p: p.with_model(
            p.copied_model(lambda f: set_json(f / "config.json", model_type="vit", architectures=["ViTModel"]))
        ),
        "no causal language model",
    ),
    (
        "a model that is quantized already",
        lambda p: p.with_model(p.copied_model(lambda f: set_json(f / "config.json", quantization_config={}))),
        "already quantized",
    ),
    ("a GGUF that is none", lambda p: p.with_model(p.file("m.gguf", "not a gguf")), "not a readable GGUF"),
    ("a model that is a text", lambda p: p.with_model(p.file("m.txt", "weights")), "a model is a folder with config.json"),
    ("a compressed checkpoint", lambda p: p.with_model(p.checkpoint()), "run it with `search generate"),
    ("a table that is none", lambda p: table(p, "garbage\n"), "line 1: not JSON"),
    ("a table of something else", lambda p: table(p, '{"schema": 1}\n'), "not a latency table"),
    (
        "a table of a later version",
        lambda p: table(p, '{"kind": "isolatency latency table", "schema": 99}\n'),
        "schema 99 is newer",
    ),
    ("a table that was changed throughout", spoiled_table, "its checksum does not fit; remove the file"),
    ("an objective below everything", lambda p: p.again("--latency", "0.0001ms"), "the fastest legal policy takes"),
    ("another model's study", lambda p: p.again("--model", save_tiny(p.own / "other", "llama", 1)), "a study with --model"),
    ("another seed's study", lambda p: p.again("--seed", "7"), "a study with --seed 0, here it is 7"),
    (
        "a study of an earlier model in the same folder",
        lambda p: (
            [*p.again(), "--model", str(p.model)]
            if set_json(p.copy() / "steps/prepared.json", key="gone") and _other_db(p)
            else []
        ),
        "is another one",
    ),
    ("a damaged bank", spoiled_bank, "leave --study out to compress here"),
    ("show nothing", lambda p: ["show", p.own / "nowhere"], "no study there"),
    (
        "show a study without an answer",
        lambda p: ["show", p.file("e/config.toml", "").parent],
        "no answer yet; repeat `search run`",
    ),
    (
        "show a torn answer",
        lambda p: ["show", p.file("s/answers/0.9x.json", '{"objective').parent.parent] if p.copy() else [],
        "0.9x.json",
    ),
    (
        "show an answer of a later version",
        lambda p: ["show", p.copy()] if set_json(p.copy() / "answers/0.9x.json", karma=1) else [],
        "0.9x.json",
    ),
    (
        "show a study with a torn step",
        lambda p: ["show", edited(p.copy() / "steps/prepared.json", "{", "").parents[1]],
        "prepared.json",
    ),
    (
        "show a study with a bad TOML",
        lambda p: ["show", p.file("s/config.toml", "x =").parent] if p.copy() else [],
        "not TOML",
    ),
    ("report another objective", lambda p: ["report", p.study, "--objective", "5x"], "no answer for '5x'; there are 0.9x"),
    ("report into a folder", lambda p: ["report", p.study, "--out", p.own], "directory"),
    ("a frontier as a GIF", lambda p: ["frontier", p.study, "--out", p.own / "f.gif"], ".gif"),
    ("compare a study with itself", lambda p: ["compare", p.study, p.study], "named twice"),
    ("compare with nothing", lambda p: ["compare", p.study, p.own / "nowhere"], "no study there"),
    (
        "explain a layer that is none",
        lambda p: ["explain", p.copy(), "--layer", "nowhere"],
        "'nowhere' is in no name of a decided site",
    ),
    ("explain by colour", lambda p: ["explain", p.study, "--by", "colour"], "colour"),
    ("export as nothing known", lambda p: ["export", p.copy(), "--format", "onnx"], "onnx"),
    ("export another objective", lambda p: ["export", p.study, "--format", "dense", "--objective", "5x"], "no answer for '5x'"),
    ("export without a format", lambda p: ["export", p.study], "--format"),
    ("generate from nothing", lambda p: ["generate", p.own], "not a compressed checkpoint"),
    ("generate no tokens", lambda p: ["generate", p.study, "--tokens", "0"], "--tokens 0: use a whole number from 1 to"),
    ("generate from no prompt", lambda p: ["generate", p.study, "--prompt", ""], "--prompt: empty"),
    (
        "generate from a changed checkpoint",
        lambda p: ["generate", flipped(next(p.checkpoint().glob("*payload*.safetensors"))).parent],
        "was changed after it was written",
    ),
    (
        "generate from a checkpoint of a later version",
        lambda p: ["generate", set_json(p.checkpoint() / "isolatency.json", schema=99).parent],
        "schema=99",
    ),
    ("materialize nothing", lambda p: ["materialize", p.own / "no.yaml", "--out", p.own / "out"], "no.yaml: no such file"),
    (
        "materialize a YAML that is none",
        lambda p: ["materialize", p.file("p.yaml", "a: [1"), "--out", p.own / "out", "--model", p.model],
        "p.yaml",
    ),
    (
        "materialize a policy of a later version",
        lambda p: ["materialize", edited(p.policy(), "policy/1", "policy/9"), "--out", p.own / "out", "--model", p.model],
        "policy/9",
    ),
    (
        "materialize another model's policy",
        lambda p: ["materialize", p.policy(), "--out", p.own / "out", "--model", save_tiny(p.own / "opt", "opt")],
        "policy.yaml",
    ),
    (
        "materialize a changed policy",
        lambda p: ["materialize", edited(p.policy(), "bits: ", "bits: 1"), "--out", p.own / "out", "--model", p.model],
        "policy.yaml",
    ),
    (
        "materialize over something",
        lambda p: ["materialize", p.policy(), "--out", p.file("out/mine", "").parent, "--model", p.model, "--study", p.copy()],
        "is not empty",
    ),
    ("clear a kind that is none", lambda p: ["cache", "--cache", p.own, "--clear", "everything"], "no kind 'everything'"),
    ("a cap without a unit", lambda p: ["cache", "--results", p.own, "--max-size", "10"], "--max-size '10'"),
    ("a method that is none", lambda p: ["methods", "gtpq"], "gtpq"),
    ("validate nothing", lambda p: ["validate", p.own], "no study there"),
    ("a command that is none", lambda p: ["serach"], "serach"),
]
"""Everything else: name, command, what the error says."""


def _other_db(place: Place) -> bool:
    """The copied study's database as a study of another model left it."""
    import sqlite3

    with sqlite3.connect(place.copy() / "study.db") as store:
        store.execute('UPDATE study_user_attributes SET value_json = replace(value_json, \'"model": "\', \'"model": "0\')')
    return True


def status(arguments: list[object]) -> int:
    """Exit status of a command, also where it ends while its flags are read."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(("arguments", "says"), [pytest.param(a, says, id=name) for name, a, says in bad_flags() + INPUTS])
def test_bad_input(made, tmp_path, capsys, arguments: Callable[[Place], list[object]], says: str) -> None:
    place = Place(*made, tmp_path)
    command = arguments(place)
    capsys.readouterr()
    assert status(command) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.strip().splitlines() if not line.startswith("[")]
    assert says in " ".join(lines)
    assert 1 <= len(lines) <= 2 and lines[-1].startswith("search: ")
    assert "Traceback" not in captured.err and captured.out == ""
    assert not list(tmp_path.rglob(".*.part")) and not list((tmp_path / "out").glob("*.safetensors"))


def test_there_are_sixty_of_them() -> None:
    names = [name for name, _, _ in bad_flags() + INPUTS]
    assert len(set(names)) == len(names) >= 60


def test_what_is_not_ours_is_left_alone(made, tmp_path, capsys) -> None:
    place = Place(*made, tmp_path)
    thesis = place.file("results/mine/thesis.tex", "years of work")
    assert status(place.run("--study", "mine")) == 2
    assert thesis.read_text() == "years of work" and [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]
