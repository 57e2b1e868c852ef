"""Which exports an answer can have is told, and what cannot be written is refused, before a weight is read or a text calibrated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from methods.formats.format import Format, parse_format
from methods.model.load import LoadedModel, load
from methods.model.outline import outlined
from search.cli import main
from search.config import ConfigError, RunConfig
from search.export.registry import EXPORTERS
from search.writable import check_exports, listed, unwritable
from spaces.runtimes import runtime
from spaces.space import Space, build
from tests.search.export.test_architectures import FORMATS, REFUSALS
from tests.search.run_server import fixed_prices, one_core
from tests.search.test_bad_input import SMALL
from tests.search.test_dry_run import nothing_is_done as nothing_is_done
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


def _outline(arch: str) -> LoadedModel:
    """A model's shapes alone."""
    config = tiny_model(arch, stock=True).config
    found = outlined(config, "bf16")
    assert found is not None
    return LoadedModel(found.model, None, found.structure, arch, arch, digest="")


@pytest.fixture(scope="module")
def outlines() -> Callable[[str], LoadedModel]:
    known: dict[str, LoadedModel] = {}

    def get(arch: str) -> LoadedModel:
        return known.setdefault(arch, known.get(arch) or _outline(arch))

    return get


@pytest.mark.parametrize("arch", [*REFUSALS, "llama-untied", "qwen3-moe"])
def test_shapes_tell_what_an_export_refuses(outlines: Callable[[str], LoadedModel], arch: str) -> None:
    """`tests/search/export/test_architectures.py` has what each export does with the weights."""
    loaded = outlines(arch)
    for name in EXPORTERS:
        fmt = parse_format("w4a16" if arch == "qwen3-moe" else FORMATS[name])
        (reason,) = unwritable(name, loaded, [fmt]).values() or ("",)
        if arch == "qwen3-moe":
            assert ("expert" in reason or "Moe" in reason) == (name not in ("dense", "compressed-tensors")), (name, reason)
        elif name == "gguf":
            assert "is not written to GGUF" in reason
        else:
            expected = REFUSALS.get(arch, {}).get(name)
            assert bool(reason) == (expected is not None), (name, reason)


def test_the_dtype_counts_too() -> None:
    found = outlined(tiny_model("llama", stock=True).config, "fp32")
    assert found is not None
    loaded = LoadedModel(found.model, None, found.structure, "llama", "llama", digest="")
    assert "stored in fp32" in unwritable("gptq", loaded, [parse_format("w4a16-g32")])["w4a16-g32"]


def _space(loaded: LoadedModel, *formats: str) -> Space:
    return build(loaded.structure, formats, ("rtn",), runtime("isolatency"), lambda *_: None)


def test_every_export_is_listed_with_what_it_holds(outlines: Callable[[str], LoadedModel]) -> None:
    loaded = outlines("mistral")
    loaded.model.config.sliding_window = None
    told = listed(loaded, _space(loaded, "w4a16-g32", "w8a8-token", "w4a16-g32-asym"))
    symmetric = "w4a16-g32, w8a8-token"
    assert told == (
        f"compressed-tensors ({symmetric}), auto-round (w4a16-g32), gptq (w4a16-g32), torchao ({symmetric}), gguf, dense, "
        "mlx (w4a16-g32-asym); not modelopt"
    )


def test_an_export_that_was_asked_for_is_refused_by_name_or_told_of(outlines: Callable[[str], LoadedModel]) -> None:
    loaded = outlines("neox-even")
    space = _space(loaded, "w4a16-g32", "w4a16-g32-asym", "w3a16-g32")
    assert check_exports(RunConfig(), loaded, space) == []
    (note,) = check_exports(RunConfig(export=("dense", "auto-round")), loaded, space)
    assert note.startswith("an answer with w4a16-g32-asym is not exported as auto-round: zero points are whole numbers")
    with pytest.raises(
        ConfigError, match=r"--export gguf: no answer of this model in .* as gguf: GPTNeoXForCausalLM is not wr"
    ):
        check_exports(RunConfig(export=("dense", "gguf")), loaded, space)
    with pytest.raises(ConfigError, match=r"--export mlx: .* in w8a8-token can be exported as mlx: w8a8-token is not exported"):
        check_exports(RunConfig(export=("mlx",)), loaded, _space(loaded, "w8a8-token"))
    falcon = outlines("falcon-7b")
    with pytest.raises(
        ConfigError, match=r"--runtime transformers: no .* as compressed-tensors: .*query_key_value of FalconForCausalLM"
    ):
        check_exports(RunConfig(runtime="transformers"), falcon, _space(falcon, "w4a16-g32"))
    assert check_exports(RunConfig(runtime="transformers", export=("dense",)), falcon, _space(falcon, "w4a16-g32")) == []


def test_a_tokenizer_that_a_gguf_cannot_hold_is_told_by_the_model_that_has_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    loaded = load(str(save_tiny(tmp_path / "m")), tmp_path / "cache")
    formats: list[Format] = [parse_format("w4a16-g32")]
    assert unwritable("gguf", loaded, formats) == {}
    assert "this model has none" in unwritable("gguf", replace(loaded, tokenizer=None), formats)["w4a16-g32"]
    assert unwritable("gguf", replace(loaded, tokenizer=None, digest=""), formats) == {}
    described = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), unk_token="<unk>")
    assert "knows no rule" in unwritable("gguf", replace(loaded, tokenizer=other), formats)["w4a16-g32"]


@pytest.mark.usefixtures("nothing_is_done")
def test_a_run_refuses_it_before_the_weights_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model", "gptj")
    own = ("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"))
    asked = ("--formats", "w4a16-g32", "--export", "auto-round", "--workload", "decode:batch=1,context=8")
    for more in ((), ("--dry-run",)):
        assert main(["run", "--model", str(model), "--latency", "0.9x", *asked, *own, *more]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(
            "search: --export auto-round: no answer of this model in w4a16-g32 can be exported as auto-round: "
        )
        assert "embed_positions is not stored" in said
        assert not list((tmp_path / "results").glob("*"))
    assert (
        main(["run", "--model", str(model), "--latency", "0.9x", *asked, *own, "--dry-run", "--json", "--export", "dense"]) == 0
    )
    assert (
        json.loads(capsys.readouterr().out)["exports"]
        == "compressed-tensors, torchao, dense; not auto-round, gptq, gguf, modelopt, mlx"
    )


def test_a_run_on_a_prepared_study_refuses_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model")
    own = ["--results", str(tmp_path / "results"), "--study", "s", "--cache", str(tmp_path / "cache"), "--quiet"]
    run = ["run", "--model", str(model), *SMALL, *own]
    with one_core(), fixed_prices(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.run.validate_study", lambda *_: pytest.fail("the search began"))
        assert main([*run, "--latency", "0.9x", "--export", "mlx"]) == 2
        assert "--export mlx: no answer of this model" in capsys.readouterr().err
        patch.setattr("search.run.validate_study", _stop)
        assert main([*run, "--latency", "0.9x"]) == 2 and "prepared" in capsys.readouterr().err
        assert main([*run, "--latency", "0.9x", "--export", "mlx"]) == 2
        assert "--export mlx: no answer of this model" in capsys.readouterr().err


def _stop(*_: object) -> Any:
    raise ConfigError("prepared")
