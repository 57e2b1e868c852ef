"""The whole way on tiny models: search, resume, re-solve, every architecture, bad input."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from methods import checkpoint, policy_file
from methods.model.describe import describe
from methods.model.load import load
from methods.policy import DENSE, Policy
from search.cli import main
from search.config import ConfigError, RunConfig
from search.evaluate import Evaluator, Switch
from search.folder import open_store
from search.generate import export_study
from search.progress import Progress
from search.results import measured_entries
from search.run import run_study
from search.session import Session
from tests.search.run_server import fixed_prices, one_core
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

SMALL = {
    "sequence": 32,
    "calibration_tokens": 256,
    "search_tokens": 256,
    "validation_tokens": 256,
    "evaluations": 4,
    "finalists": 1,
    "workload": "decode:batch=1,context=16",
    "formats": ("w8a8-token", "w4a8-g32-asym", "w2a8-g32-asym"),
}


def flags(**values: object) -> list[str]:
    """Command-line flags of configuration values."""
    found = []
    for name, value in values.items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return found


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One core and fixed prices: what is faster than dense is no matter of this machine's instructions."""
    with one_core(), fixed_prices():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache for the module: kernels are compiled and cells measured once."""
    return tmp_path_factory.mktemp("cache")


OBJECTIVE = "0.9x"


def save_wide(folder: Path) -> Path:
    """Two wide blocks: their linears dominate a step, so that an objective below the dense latency can be met."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny_model("llama").config.vocab_size,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory, cache):
    """A finished study of a small wide Llama, and its answer."""
    folder = tmp_path_factory.mktemp("study")
    model = save_wide(folder / "model")
    config = RunConfig(
        model=str(model), latency=OBJECTIVE, results=str(folder / "results"), cache=str(cache), study="s", **SMALL
    )
    return config, run_study(config, Progress(quiet=True))


def test_a_study_leaves_everything_that_it_promises(study) -> None:
    config, answer = study
    assert answer.best is not None
    for name in ("config.toml", "study.db", "frontier.csv", "frontier.png", "report.html", f"answers/{OBJECTIVE}.json"):
        assert (config.folder / name).stat().st_size > 0
    page = (config.folder / "report.html").read_text()
    assert "measured" in page
    assert "predicted" in page
    for role in ("calibrate", "search", "validate", "report"):
        assert role in page
    structure = describe(load(config.model, Path(config.cache)).model)
    for path in (config.folder / "policies").glob("*.yaml"):
        assert policy_file.read(path, structure).policy.sites


def test_simple_policies_are_in_every_answer_and_the_dense_model_is_first(study) -> None:
    _, answer = study
    assert answer.best is not None
    assert answer.best.policy.sites
    assert answer.finalists[0].name == "dense"
    assert answer.finalists[0].report_kl < 1e-6
    assert any(item.simple and item.policy.sites for item in answer.finalists)
    assert all(item.lo_ms <= item.latency_ms <= item.hi_ms for item in answer.finalists)


def test_the_text_that_ships_gives_perplexities(study) -> None:
    config, answer = study
    judged = [item for item in answer.finalists if item.kl == item.kl]
    assert judged and all(item.perplexity > 1 for item in judged)
    data = json.loads((config.folder / "steps" / "prepared.json").read_text())["value"]["data"]
    assert {(use["source"], use["generated"]) for use in data.values()} == {("shipped", False)}


def test_roles_are_disjoint_and_hashed(study) -> None:
    config, _ = study
    data = json.loads((config.folder / "steps" / "prepared.json").read_text())["value"]["data"]
    assert len({use["sha256"] for use in data.values()}) == 4


def test_another_objective_uses_what_is_known(study) -> None:
    """Re-solving reads no model; only the validation that follows does."""
    config, _ = study
    code = (
        "import sys\nfrom pathlib import Path\nfrom search.run import *\nfrom search.resolved import resolve\n"
        "from search.config import RunConfig, read_toml\nfrom search.folder import study_key\n"
        f"c = RunConfig(**{{**read_toml(Path({str(config.folder / 'config.toml')!r})), 'latency': '0.95x'}})\n"
        "p = Prepared.from_json(Steps(c.folder / 'steps').get('prepared', study_key(c)))\n"
        "print(len(resolve(p, c.objective, c).solution.policy.sites), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n_sites, torch_loaded = done.stdout.split()
    assert int(n_sites) > 0
    assert torch_loaded == "False"


def test_another_measured_policy_is_exported_by_its_name_or_row(study, tmp_path) -> None:
    config, answer = study
    rows = sorted(
        measured_entries(config.folder, answer, config.stated_workloads), key=lambda entry: entry.candidate.latency_ms
    )
    row, other = next((n, entry) for n, entry in enumerate(rows, 1) if entry.group == "baseline")
    for wanted, out in ((str(row), tmp_path / "row"), (other.candidate.name, tmp_path / "name")):
        path, check = export_study(config.folder, answer, "dense", out, Progress(quiet=True), wanted)
        assert path == out and check.ok and check.n_linears == 14
        assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    text = (tmp_path / "row" / "policy.yaml").read_text()
    assert str(other.candidate.policy.at(next(iter(other.candidate.policy.sites)))[0].knob("format")) in text
    dense = next(entry.candidate.name for entry in rows if entry.group == "dense")
    for wanted, message in (("99", "a row from 1 to"), ("none such", "not measured there"), (dense, "nothing to export")):
        with pytest.raises(ConfigError, match=message):
            export_study(config.folder, answer, "dense", tmp_path / "no", Progress(quiet=True), wanted)
    assert not (tmp_path / "no").exists()


def test_the_exported_folder_is_the_judged_model(study) -> None:
    """What stock transformers loads computes what was evaluated, and the checkpoint holds the same weights bit for bit."""
    from transformers import AutoModelForCausalLM

    config, answer = study
    best = answer.best
    assert best is not None
    (folder,) = (config.folder / "models").iterdir()
    held = checkpoint.read(folder)
    exported = AutoModelForCausalLM.from_pretrained(next((config.folder / "exports" / "dense").iterdir()), dtype=torch.float32)
    for edit in held.edits.values():
        for name, compressed in edit.linears.items():
            assert torch.equal(exported.get_submodule(name).weight, compressed.dense)


def test_the_command_line_shows_a_study(study, capsys) -> None:
    config, answer = study
    assert main(["show", str(config.folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["answer"]["objective"] == answer.objective
    assert len(shown["measured"]) == len(answer.finalists)
    assert all("measured" in str(row) for row in shown["measured"])


def test_an_objective_below_everything_says_what_is_possible(study, capsys) -> None:
    config, _ = study
    code = main(
        ["run", *flags(model=config.model, latency="0.001ms", results=config.results, cache=config.cache, study="s", **SMALL)]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert "cannot be met" in error
    assert "fastest legal policy takes" in error
    assert "outside the compressed layers" in error


def test_a_study_of_another_model_is_refused(study, tmp_path, capsys) -> None:
    config, _ = study
    other = save_tiny(tmp_path / "other", "llama")
    code = main(
        ["run", *flags(model=other, latency="50x", results=config.results, cache=config.cache, study="s", **SMALL), "--quiet"]
    )
    assert code == 2
    assert "a study with --model" in capsys.readouterr().err


def test_a_policy_file_materialises_to_the_judged_weights(study, tmp_path) -> None:
    config, answer = study
    best = answer.best
    assert best is not None
    path = config.folder / "policies" / f"{answer.objective}.yaml"
    out = tmp_path / "out"
    assert main(["materialize", str(path), "--out", str(out), "--study", str(config.folder), *flags(cache=config.cache)]) == 0
    (folder,) = (config.folder / "models").iterdir()
    mine, theirs = checkpoint.read(out), checkpoint.read(folder)
    assert set(mine.edits) == set(theirs.edits)
    for site, edit in mine.edits.items():
        for name, compressed in edit.linears.items():
            assert torch.equal(compressed.dense, theirs.edits[site].linears[name].dense)


def test_generate_runs_on_the_kernels(study, capsys) -> None:
    config, _ = study
    assert main(["generate", str(config.folder), "--prompt", "a b", "--tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens"] >= 1


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "gpt2", "opt", "neox", "mixtral"])
def test_other_architectures(arch: str, tmp_path, cache) -> None:
    model = save_tiny(tmp_path / arch, arch)
    small = {**SMALL, "evaluations": 1, "formats": ("w8a8-token", "w4a8-g32-asym")}
    answer = run_study(
        RunConfig(model=str(model), latency="50x", results=str(tmp_path), cache=str(cache), study="s", **small),
        Progress(quiet=True),
    )
    assert answer.best is not None
    assert any(item.policy.sites and item.report_kl > 0 for item in answer.finalists)


def test_every_policy_that_was_evaluated_is_in_the_store(study) -> None:
    config, answer = study
    records = open_store(Session(config, Progress(quiet=True))).records()
    assert len(records) == answer.cost["true evaluations in the study"]
    assert {item.policy.key() for item in answer.finalists[1:]} <= {record.policy.key() for record in records}


def test_quality_in_the_answer_is_what_a_fresh_evaluation_finds(study) -> None:
    """The report's KL, computed again from the stored checkpoint and the generated text, is the same number."""
    config, answer = study
    best = answer.best
    assert best is not None
    session = Session(config, Progress(quiet=True))
    edits = checkpoint.read(next((config.folder / "models").iterdir())).edits
    switch = Switch(session.model, session.loaded.structure, session.edit)
    quality = Evaluator(switch, session.corpora["report"].tokens).evaluate_edits(edits)
    assert quality.kl == pytest.approx(best.report_kl, rel=1e-3, abs=1e-7)
    assert Policy().key() == answer.finalists[0].policy.key()


def test_explain_attributes_loss_and_time_to_choices(study, capsys) -> None:
    config, answer = study
    decided = [site for site in answer.best.policy.sites if answer.best.policy.at(site)[0] != DENSE]
    arguments = ["explain", str(config.folder), "--json"]
    assert main([*arguments, "--by", "kind"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["kl"] == pytest.approx(whole["residual"] + sum(share["kl"] for share in whole["shares"]))
    assert {share["ms_label"] for share in whole["shares"]} == {"measured"}
    assert sum(share["n_sites"] for share in whole["shares"]) == len(decided)
    assert main([*arguments, "--by", "site", "--layer", decided[0]]) == 0
    one = json.loads(capsys.readouterr().out)
    assert len(one["shares"]) == 1
    assert (one["residual"] is None) == (len(decided) > 1)
    assert main(["explain", str(config.folder), "--layer", "nowhere"]) == 2
    assert "'nowhere' is in no name of a decided site" in capsys.readouterr().err
    assert main(["explain", str(config.folder)]) == 0
    assert "KL per ms" in capsys.readouterr().out


def test_a_finished_study_is_shown_reported_and_drawn_again(study, tmp_path, capsys) -> None:
    config, _ = study
    assert main(["show", str(config.folder)]) == 0
    assert "dense model" in capsys.readouterr().out
    page = config.folder / "report.html"
    before = page.read_text()
    assert main(["report", str(config.folder), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == before
    assert main(["frontier", str(config.folder), "--out", str(tmp_path / "f.png")]) == 0
    assert capsys.readouterr().out.endswith((config.folder / "frontier.csv").read_text())
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert main(["report", str(config.folder), "--objective", "5x"]) == 2
    assert f"no answer for '5x'; there are {OBJECTIVE}" in capsys.readouterr().err
