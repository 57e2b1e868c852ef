"""`search methods`, and `search materialize` and `search generate` on what only the reference numerics run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from methods import catalogue, checkpoint, policy_file
from methods.catalogue import METHODS, MODEL_METHODS
from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode
from methods.formats.sides import plain
from methods.method import Edit, Need, Stage
from methods.model.load import load
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from methods.recipes.gptq import GPTQ
from methods.recipes.rtn import RTN
from profilers.kernels.catalogue import supported
from profilers.runtime import Runtime, RuntimeRefusal
from profilers.target import local_cpu
from search.cli import main
from search.generate import simulated_sites
from search.method_list import REPRESENTATIVES, allowed, bits, details, has_kernel, listing, refusals, rows, runs
from tests.tiny import save_tiny


def test_every_method_is_listed_within_the_width() -> None:
    lines = listing().splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert sorted(heads) == sorted([*METHODS, *MODEL_METHODS])
    words = " ".join(listing().split())
    assert all(" ".join(row["summary"].split()) in words for row in rows())


def test_the_listing_needs_no_torch() -> None:
    code = "import sys; from search.cli import main; main(['methods']); main(['methods', 'gptq']); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_the_command_line_shows_all_one_and_json(capsys) -> None:
    assert main(["methods"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == listing()
    assert main(["methods", "gptq"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == details("gptq")
    assert main(["methods", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [*METHODS, *MODEL_METHODS]
    assert main(["methods", "gptq", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["class"], row["stage"], row["needs"], row["simulated"]) == ("rounding", "quantize", ["first", "hessian"], "")
    assert row["knobs"]["act_order"] == {"default": True, "allowed": "true or false"}
    assert main(["methods", "gtpq"]) == 2
    assert "did you mean gptq" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, recipe in METHODS.items() if recipe.stage is Stage.QUANTIZE])
def test_the_representatives_cover_every_method(name: str) -> None:
    assert allowed(METHODS[name])


def _only(predicate) -> str:
    def refuses(fmt: Format) -> str | None:
        return None if predicate(fmt) else f"{fmt.name} is not wanted"

    return bits(replace(RTN, formats=refuses))


def test_formats_are_said_in_words() -> None:
    assert _only(lambda fmt: True) == "every grid, dense dtypes"
    assert _only(lambda fmt: not fmt.dense and fmt.element != "lut") == "every grid but lut"
    assert _only(lambda fmt: fmt.plain and fmt.bits in (2, 3, 8)) == "int 2-3 8"
    plain_four = lambda fmt: fmt.plain and fmt.bits == 4  # noqa: E731
    assert _only(lambda fmt: plain_four(fmt) and not fmt.symmetric) == "int 4 (with offset)"
    assert (
        _only(lambda fmt: plain_four(fmt) and fmt.act_bits == 8 and fmt.group == -1)
        == "int 4 (inputs rounded, a scale a channel)"
    )
    assert _only(lambda fmt: fmt.name in ("nf4", "nf4-dq")) == "nf (nf4 nf4-dq)"


def test_what_runs_is_what_kernels_support() -> None:
    target = local_cpu(1)
    for names in REPRESENTATIVES.values():
        for name in names:
            fmt = parse_format(name)
            assert has_kernel(fmt) == bool(supported(fmt, 1024, 1024, 1, target)), name
    assert runs(GPTQ) == "int kernels"
    assert runs(replace(GPTQ, simulated="for a reason")) == "simulated"
    assert runs(replace(RTN, formats=lambda fmt: None if fmt.name == "nf4" else "no")) == "simulated"
    assert runs(METHODS["none"]) == "dense kernels"


def test_a_method_that_was_published_for_other_models_says_so() -> None:
    adapted = {name: recipe.source.adapted for name, recipe in METHODS.items() if recipe.source.adapted}
    assert adapted == {
        "adaround": "vision models",
        "adaround-block": "vision models",
        "bcq": "recurrent language models",
        "gobo": "encoders",
        "obq": "vision models and encoders",
        "outlier-suppression": "encoders and sequence-to-sequence models",
        "peg": "encoders",
        "stochastic": "the training of vision models",
        "vs-quant": "vision models and encoders",
    }
    told = " ".join(details("gobo").split())
    assert "arXiv 2005.03842, section 4; adapted, the original was for encoders" in told
    assert "adapted" not in details("gptq")


def test_details_tell_what_is_refused_and_where_the_limits_are() -> None:
    text = details("awq")
    assert "follows no norm" in " ".join(text.split())
    assert "fitter = minmax" in text
    assert refusals(GPTQ)["bf16"].startswith("bf16 has no grid")
    assert "exactly gptq" in details("gptaq")
    assert all(row["summary"] and row["source"] for row in rows())


DECISIONS = {
    "q_proj+k_proj+v_proj": Decision.of("awq", format="w4a16-g16-asym"),
    "o_proj": Decision.of("llm-int8", format="w8a8-token", threshold=0.5),
    "gate_proj+up_proj": Decision.of("signround", format="w3a16-g16-asym", steps=2, batch=1),
    "down_proj": Decision.of("squeezellm", format="lut4a16"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def text(path: Path) -> Path:
    """Paragraphs of made-up words, enough for every role."""
    letters = torch.randint(97, 123, (400, 20, 5), generator=torch.Generator().manual_seed(0))
    words = [" ".join("".join(map(chr, word)) for word in paragraph) for paragraph in letters.tolist()]
    path.write_text("\n\n".join(words))
    return path


def materialized(model: Path, cache: Path, out: Path, transforms: tuple[Decision, ...] = (), **decisions: Decision) -> Path:
    """The checkpoint that the command makes of a policy: a decision by the leaves of a site's name, in every block."""
    structure = load(str(model), cache).structure
    chosen = {s.name: d for s in structure.sites for leaf, d in decisions.items() if s.name.endswith(leaf)}
    policy = Policy({site: (decision,) for site, decision in chosen.items()}, transforms)
    path = out.with_suffix(".yaml")
    policy_file.write(path, PolicyFile(policy), structure)
    flags = [
        "--model",
        model,
        "--cache",
        cache,
        "--sequence",
        32,
        "--calibration-tokens",
        256,
        "--data",
        text(out.parent / "text.txt"),
    ]
    assert main([str(item) for item in ["materialize", path, "--out", out, *flags]]) == 0
    return out


@pytest.fixture(scope="module")
def mixed(model, cache, tmp_path_factory) -> Path:
    """Four recipes of four families, which read five statistics, three of them with parts that no kernel runs."""
    needs = frozenset(need for decision in DECISIONS.values() for need in METHODS[decision.method].needs)
    assert {Need.BLOCK, Need.FISHER, Need.ABS_MAX, Need.SAMPLE} <= needs
    return materialized(model, cache, tmp_path_factory.mktemp("mixed") / "out", **DECISIONS)


def test_very_different_recipes_become_one_checkpoint(mixed, model, cache) -> None:
    held = checkpoint.read(mixed)
    decoded = checkpoint.load_dense(mixed).model
    dense = load(str(model), cache).model
    assert len(held.edits) == 12
    sides = set()
    for name, edit in held.edits.items():
        decision = next(d for leaf, d in DECISIONS.items() if name.endswith(leaf))
        for layer, compressed in edit.linears.items():
            assert compressed.format.name == decision.knob("format")
            assert torch.equal(decode(compressed.format, compressed.payload), decoded.get_submodule(layer).weight)
            change = (compressed.dense - dense.get_submodule(layer).weight).norm() / compressed.dense.norm()
            assert change < 1.5
            if not plain(compressed.payload):
                sides.add(decision.method)
    assert sides == {"llm-int8", "squeezellm"}
    assert all(edit.tensors for name, edit in held.edits.items() if name.endswith("v_proj"))


def test_every_block_has_a_line_of_progress(model, cache, tmp_path, capsys) -> None:
    materialized(model, cache, tmp_path / "out", o_proj=Decision.of("rtn", format="w4a16-g16"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("] ")[1].split(",")[0] for line in lines if "block" in line] == [
        f"block {block} of 3: 1 sites" for block in (1, 2, 3)
    ]
    assert any("5.00 bits a weight" in line for line in lines)


def test_an_interrupted_checkpoint_goes_on_where_it_was(model, cache, tmp_path, capsys, monkeypatch) -> None:
    """Stopped in the third of three blocks: the same command compresses that block alone, to the same weights."""
    decision = Decision.of("gptq", format="w4a16-g16")
    whole = materialized(model, cache, tmp_path / "whole", o_proj=decision)
    real, asked = catalogue.apply_block, []

    def counted(views, *rest):
        asked.append(len(views))
        if asked == [1, 1, 1]:
            raise KeyboardInterrupt
        return real(views, *rest)

    monkeypatch.setattr(catalogue, "apply_block", counted)
    with pytest.raises(AssertionError):
        materialized(model, cache, tmp_path / "out", o_proj=decision)
    assert "the same command goes on from there" in capsys.readouterr().err and not (tmp_path / "out").exists()
    asked.clear()
    held, expected = (checkpoint.read(f) for f in (materialized(model, cache, tmp_path / "out", o_proj=decision), whole))
    assert asked == [0, 0, 1]
    assert not list((cache / "materialized").iterdir())
    for site, edit in expected.edits.items():
        for name, compressed in edit.linears.items():
            assert torch.equal(compressed.dense, held.edits[site].linears[name].dense)


def test_what_keeps_nothing_does_not_say_that_it_goes_on(monkeypatch, capsys) -> None:
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("search.cli.Path", stopped)
    assert main(["export", "study", "--format", "dense"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_generate_says_what_runs_decoded(mixed, capsys) -> None:
    assert main(["generate", str(mixed), "--prompt", "the quick", "--tokens", "3", "--threads", "1"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert all("3 sites are simulated" in note and "decoded" in note for note in notes)
    assert any("(columns beside the grid)" in note for note in notes)


def test_the_runtime_refuses_what_lies_beside_the_grid(mixed, model, cache) -> None:
    held, loaded, target = checkpoint.read(mixed), load(str(model), cache), local_cpu(1)
    engine = Runtime(loaded.model, loaded.structure, target)
    assert len(simulated_sites(loaded.structure, held.edits, target)) == 2
    name = next(name for name in held.edits if name.endswith("o_proj"))
    with pytest.raises(RuntimeRefusal, match=r"o_proj: its payload holds columns\.index, columns\.value beside the grid"):
        engine.materialize({name: held.edits[name]})
    bare = {
        layer: replace(c, payload={part: tensor for part, tensor in c.payload.items() if "." not in part})
        for layer, c in held.edits[name].linears.items()
    }
    engine.materialize({name: Edit(bare)})


def test_a_rotated_model_with_a_small_cache_is_one_checkpoint(model, cache, tmp_path, capsys) -> None:
    transforms = (Decision.of("quarot", seed=3), Decision.of("kv-cache", format="kv-int8"))
    out = materialized(model, cache, tmp_path / "out", transforms, down_proj=Decision.of("gptq", format="w8a16-g16"))
    rotated, dense = checkpoint.load_dense(out).model, load(str(model), cache).model
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = dense(ids).logits, rotated(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05
    name = "model.layers.1.self_attn.q_proj.weight"
    change = rotated.get_parameter(name) - dense.get_parameter(name)
    assert float(change.norm() / dense.get_parameter(name).norm()) > 0.5
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "the quick", "--tokens", "3", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens"] >= 1


def test_a_cache_that_needs_calibration_is_refused(model, cache, tmp_path, capsys) -> None:
    structure = load(str(model), cache).structure
    policy_file.write(
        tmp_path / "p.yaml", PolicyFile(Policy({}, (Decision.of("kv-cache", format="kv-fp8-tensor"),))), structure
    )
    flags = ["--model", str(model), "--cache", str(cache)]
    assert main(["materialize", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), *flags]) == 2
    assert "needs a calibration, for which a checkpoint has no place" in capsys.readouterr().err


def test_a_simulated_method_is_refused_for_a_latency_objective(model, cache, tmp_path, capsys) -> None:
    flags = ["--model", str(model), "--cache", str(cache), "--results", str(tmp_path), "--latency", "1ms", "--quiet"]
    assert main(["run", *flags, "--methods", "gptq,llm-int8", "--formats", "w8a8-token"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search:")]
    assert "llm-int8 is simulated (" in line
    assert "leave it out of --methods" in line
