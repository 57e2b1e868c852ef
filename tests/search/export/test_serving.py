"""The flags of key/value caches: only those that exist and compute what is meant, and a loss for everything else."""

import json
from pathlib import Path
from typing import Any

import pytest

from methods.kv.format import parse_cache_format
from methods.model.load import LoadedModel
from search.export import compressed_tensors, dense
from search.export.serving import cache_flags, transformers_entry, vllm_entries, with_cache
from tests.search.export.wide import compressed, wide_model

FORMATS = (
    *("kv-bf16", "kv-fp16", "kv-fp32", "kv-fp8", "kv-fp8-head", "kv-fp8-tensor", "kv-fp8-w32", "kv-int8", "kv-int8-g32"),
    *(
        "kv-int4-g32",
        "kv-int-k8v4-g32",
        "kv-int3-g32",
        "kv-int8-g32-s4",
        "kv-int8-g32-rot",
        "kv-kivi2-g32",
        "kv-kvquant3",
        "kv-turbo4",
    ),
)
ENGINES = ("vllm", "vllm-cpu", "llama.cpp", "transformers", "isolatency")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return wide_model(tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize(
    ("engine", "fmt", "words"),
    [
        ("vllm", "kv-fp8", ("--kv-cache-dtype", "fp8_per_token_head")),
        ("vllm", "kv-fp16", ("--kv-cache-dtype", "float16")),
        ("vllm", "kv-int8", ()),
        ("vllm", "kv-turbo4", ()),
        ("vllm-cpu", "kv-fp8", ("--kv-cache-dtype", "fp8")),
        ("vllm-cpu", "kv-int8", ()),
        ("vllm-cpu", "kv-fp16", ()),
        ("llama.cpp", "kv-int8-g32", ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")),
        ("llama.cpp", "kv-int-k8v4-g32", ("-ctk", "q8_0", "-ctv", "q4_1", "-fa", "on")),
        ("llama.cpp", "kv-fp16", ("-ctk", "f16", "-ctv", "f16")),
        ("llama.cpp", "kv-int8", ()),
        ("llama.cpp", "kv-fp8", ()),
        ("transformers", "kv-fp8", ()),
    ],
)
def test_engines_get_the_flags_that_they_have(engine: str, fmt: str, words: tuple[str, ...]) -> None:
    assert cache_flags(engine, parse_cache_format(fmt)).words == words


def test_a_format_is_served_as_it_is_or_the_difference_is_told() -> None:
    for engine in ENGINES:
        for name in FORMATS:
            found = cache_flags(engine, parse_cache_format(name))
            assert found.differs or parse_cache_format(name).kind == "dense"
            assert found.words or name in found.differs


def test_no_flag_is_one_that_corrupts_silently() -> None:
    """vLLM's CPU build accepts these and computes something else; see also the types that nothing here asks for."""
    words = {word for engine in ENGINES for name in FORMATS for word in cache_flags(engine, parse_cache_format(name)).words}
    assert not {word for word in words if "int8_per_token" in word or "int4_per_token" in word or "turboquant" in word}
    on_cpu = {word for name in FORMATS for word in cache_flags("vllm-cpu", parse_cache_format(name)).words}
    assert on_cpu == {"--kv-cache-dtype", "fp8"}


def test_a_cache_in_the_dtype_of_the_checkpoint_needs_nothing() -> None:
    serve = {"transformers": transformers_entry("bf16"), **vllm_entries("bf16", cpu=True)}
    for fmt in (None, parse_cache_format("kv-bf16")):
        assert with_cache(serve, fmt, "bf16") == (serve, [])
    changed, losses = with_cache(serve, parse_cache_format("kv-fp8"), "bf16")
    assert changed["vllm"]["command"] == [*serve["vllm"]["command"], "--kv-cache-dtype", "fp8_per_token_head"]
    assert changed["transformers"] == serve["transformers"] and "--kv-cache-dtype" not in serve["vllm"]["command"]
    assert [loss["why"].partition(":")[0] for loss in losses] == ["transformers", "vllm", "vllm-cpu"]


@pytest.mark.parametrize("module", [compressed_tensors, dense], ids=["compressed-tensors", "dense"])
def test_an_exported_folder_carries_the_policys_cache(tmp_path: Path, model: LoadedModel, module: Any) -> None:
    file, edits = compressed(model, ("w4a16-g32",), cache="kv-fp8")
    module.export(tmp_path / "out", model, file, edits)
    serve = json.loads((tmp_path / "out" / "serve.json").read_text())
    lost = [loss["why"] for loss in json.loads((tmp_path / "out" / "losses.json").read_text()) if loss["lost"] == "cache"]
    assert len(lost) == len(serve) and "transformers: nothing in it stores keys and values as kv-fp8" in lost[0]
    if module is compressed_tensors:
        assert serve["vllm-cpu"]["command"][-2:] == ["--kv-cache-dtype", "fp8"]


def test_a_cache_that_needs_a_calibration_is_refused(tmp_path: Path, model: LoadedModel) -> None:
    file, edits = compressed(model, ("w4a16-g32",), cache="kv-fp8-tensor")
    with pytest.raises(ValueError, match="needs a calibration"):
        compressed_tensors.export(tmp_path / "out", model, file, edits)
    assert not (tmp_path / "out").exists()
