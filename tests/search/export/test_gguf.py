"""The GGUF export: `gguf`, transformers and llama.cpp read exactly the model that was evaluated, or the comparison says so."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import checkpoint
from methods.apply import Installer
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed
from methods.formats.sides import columns
from methods.method import Edit
from methods.model.load import LoadedModel, load
from methods.model.structure import LayerSpec, Site
from methods.model.weights import weight_of
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile, expanded_digest, read, render
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from search.cli import main
from search.export import gguf, gguf_layout, gguf_tokenizer, gguf_verify, llama_cpp
from search.export.gguf import export, supports, verify
from search.export.standalone import export_checkpoint, is_checkpoint
from search.export.verification import Verification
from spaces.runtimes import GGUF_ARCHITECTURES
from tests.cut import TEXT, cut_model
from tests.tiny import save_tiny, seeded, tiny_model, tiny_tokenizer, tiny_tokens

IDS = tiny_tokens(2, 60)
MIXED = ("q4_0", "w4a8-g32-asym", "q8_0", "iq4_nl", "q5_1")
CUT = {
    "qkv": ("q4_0", "q8_0", "iq4_nl", "w4a8-g64-asym"),
    "o": ("q5_0", "w8a8-g32", "q4_1", "w4a8-g32"),
    "gate_up": ("q5_1", "q4_1", "w8a16-g64", "iq4_nl"),
    "down": ("q4_k", "q6_k", "iq4_xs", "q3_k"),
}
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def _edits(loaded: LoadedModel, formats: Mapping[str, str]) -> tuple[PolicyFile, dict[str, Edit]]:
    edits = {}
    for site, name in formats.items():
        fmt, linears = parse_format(name), {}
        for layer in loaded.structure.site(site).layers:
            weight = weight_of(loaded.model.get_submodule(layer.name)).float()
            linears[layer.name] = Compressed.of(fmt, nearest(weight, fmt, minmax(weight, fmt)))
        edits[site] = Edit(linears)
    policy = Policy({site: (Decision.of("rtn", format=name),) for site, name in formats.items()})
    return PolicyFile(policy, id="mixed"), edits


def _mixed(loaded: LoadedModel) -> tuple[PolicyFile, dict[str, Edit]]:
    """A type a site in turn, with the last site left dense."""
    sites = loaded.structure.sites[:-1]
    return _edits(loaded, {site.name: MIXED[index % len(MIXED)] for index, site in enumerate(sites)})


def _verified(folder: Path, loaded: LoadedModel, edits: Mapping[str, Edit], ids: torch.Tensor = IDS) -> Verification:
    with Installer(loaded.model, loaded.structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        return verify(folder, loaded.model, ids)


def _tiny(folder: Path, arch: str) -> LoadedModel:
    if arch == "qwen3":
        # transformers does not read the heads' size of this architecture and takes that of the published models.
        with seeded(0):
            config = tiny_model("qwen3").config
            config.head_dim = 128
            model = type(tiny_model("qwen3"))(config).to(torch.bfloat16)
        model.save_pretrained(folder / arch)
        tiny_tokenizer().save_pretrained(folder / arch)
    else:
        save_tiny(folder / arch, arch, dtype=torch.float16 if arch == "mistral" else torch.bfloat16)
    if arch == "mistral":
        _configure(folder / arch, sliding_window=None)
    return load(str(folder / arch), folder / "cache")


def _configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    folder, known = tmp_path_factory.mktemp("models"), {}

    def get(arch: str) -> LoadedModel:
        if arch not in known:
            known[arch] = _tiny(folder, arch)
        return known[arch]

    return get


@pytest.fixture(scope="module")
def exported(models: Callable[[str], LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, exported."""
    folder = tmp_path_factory.mktemp("exported") / "gguf"
    file, edits = _mixed(models("llama"))
    export(folder, models("llama"), file, edits)
    return folder


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_loads_as_what_was_evaluated(tmp_path: Path, models: Callable[[str], LoadedModel], arch: str) -> None:
    loaded = models(arch)
    file, edits = _mixed(loaded)
    export(tmp_path / "gguf", loaded, file, edits)
    result = _verified(tmp_path / "gguf", loaded, edits)
    assert result.ok, result.message
    assert result.max_weight_diff == 0.0 and result.n_linears == sum(len(edit.linears) for edit in edits.values())
    assert read(tmp_path / "gguf" / "policy.yaml", loaded.structure) == file
    if llama_cpp.installed():
        assert "llama.cpp of" in result.message and abs(result.nll_loaded - result.nll_reference) < 0.01


def test_the_architectures_of_the_runtime_are_those_that_are_written() -> None:
    assert tuple(gguf_layout.FAMILIES) == GGUF_ARCHITECTURES


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return cut_model(tmp_path_factory.mktemp("cut") / "model")


def test_four_blocks_of_the_default_model_load_in_every_type(tmp_path: Path, cut: LoadedModel) -> None:
    file, edits = _edits(cut, {site.name: CUT[site.kind][site.block] for site in cut.structure.sites})
    export(tmp_path / "gguf", cut, file, edits)
    found = {tensor.name: tensor.tensor_type.name for tensor in _reader(tmp_path / "gguf").tensors}
    assert [found[f"blk.{block}.ffn_down.weight"] for block in range(4)] == ["Q4_K", "Q6_K", "IQ4_XS", "Q3_K"]
    assert [found[f"blk.{block}.attn_k.weight"] for block in range(4)] == ["Q4_0", "Q8_0", "IQ4_NL", "Q4_1"]
    assert found["token_embd.weight"] == "BF16" and "output.weight" not in found and found["blk.1.attn_norm.weight"] == "F32"
    ids = torch.tensor([cut.tokenizer(TEXT)["input_ids"]])
    assert ids.shape[1] > 49
    result = _verified(tmp_path / "gguf", cut, edits, ids)
    assert result.ok, result.message
    assert len(json.loads((tmp_path / "gguf" / "tokens.json").read_text())) == 7
    if llama_cpp.installed():
        assert "llama.cpp of" in result.message and "first 48 tokens" in result.message
        with pytest.raises(ValueError, match="gives the token 4096 no probability"):
            llama_cpp.LlamaCpp(tmp_path / "gguf" / gguf_layout.MODEL, 64, 4096).predictions([5, 4096])


def _reader(folder: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(folder / gguf_layout.MODEL)


def test_the_file_says_what_engines_need(exported: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    fields = {name: field.contents() for name, field in _reader(exported).fields.items()}
    config = loaded.model.config
    assert fields["general.architecture"] == "llama"
    assert fields["general.compression_policy_digest"] == expanded_digest(_mixed(loaded)[0].policy, loaded.structure)
    sizes = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    assert [fields[f"llama.{name}"] for name in sizes] == [3, 96, 160, 6, 3]
    assert fields["llama.rope.dimension_count"] == fields["llama.attention.key_length"] == 16
    assert fields["llama.context_length"] == 256 and fields["llama.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.model"] == "gpt2"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == 128 and [tokens[i] for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert kinds[:5] == [3, 3, 3, 3, 1]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert sorted(path.name for path in exported.iterdir()) == [
        *("losses.json", "model.gguf", "policy.yaml", "serve.json", "tokens.json")
    ]
    serve = json.loads((exported / "serve.json").read_text())
    assert serve["llama.cpp"]["command"] == ["llama-server", "--model", "model.gguf"]


def test_what_is_lost_is_said_in_words(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    names = [site.name for site in loaded.structure.sites]
    file, edits = _edits(loaded, {names[0]: "q4_0", names[1]: "w4a16-g96", names[2]: "w8a16-g32"})
    export(tmp_path / "gguf", loaded, file, edits)
    losses = json.loads((tmp_path / "gguf" / "losses.json").read_text())
    said = [loss["why"] for loss in losses if loss["lost"] == "activations"]
    assert (
        "inputs of 1 linears are rounded to int8 with an fp16 scale for every 32, which is not the rule of w4a16-g96" in said[0]
    )
    assert "inputs of 2 linears" in said[1] and "w8a16-g32" in said[1]
    assert said[2].startswith("transformers:")
    sizes = [loss["why"] for loss in losses if loss["lost"] == "size"]
    assert sizes[0].startswith("1 linears in w4a16-g96 are stored as Q4_0, which repeats their scales") and len(sizes) == 2
    assert "embeddings and head are BF16" in sizes[1]


def test_replaced_parameters_are_exported(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("qwen2")
    file, edits = _mixed(loaded)
    site = loaded.structure.sites[0]
    name = f"{site.norm}.weight"
    edits[site.name] = Edit(edits[site.name].linears, {name: loaded.model.get_parameter(name) * 1.7})
    export(tmp_path / "gguf", loaded, file, edits)
    assert _verified(tmp_path / "gguf", loaded, edits).ok
    assert "blk.0.attn_norm.weight does not decode" in _verified(tmp_path / "gguf", loaded, _mixed(loaded)[1]).message


def _change(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Changes the bytes of one tensor in the file."""
    from gguf import GGUFReader

    tensor = next(t for t in GGUFReader(folder / gguf_layout.MODEL, "r+").tensors if t.name == name)
    change(tensor.data)


def _one_code(folder: Path) -> None:
    def change(data: Any) -> None:
        data[7, 9] ^= 1

    _change(folder, "blk.1.attn_k.weight", change)


def _scales(folder: Path) -> None:
    def change(data: Any) -> None:
        data[:, 1] ^= 4

    _change(folder, "blk.0.attn_q.weight", change)


def _norm(folder: Path) -> None:
    def change(data: Any) -> None:
        data[5] *= 1.01

    _change(folder, "output_norm.weight", change)


def _truncated(folder: Path) -> None:
    path = folder / gguf_layout.MODEL
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_one_code, "blk.1.attn_k.weight does not decode to the evaluated weights"),
        (_scales, "blk.0.attn_q.weight does not decode to the evaluated weights"),
        (_norm, "output_norm.weight does not decode"),
        (_truncated, "cannot be read"),
    ],
)
def test_a_damaged_export_fails_the_comparison(
    tmp_path: Path, exported: Path, models: Callable[[str], LoadedModel], damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(exported, tmp_path / "gguf")
    damage(tmp_path / "gguf")
    result = _verified(tmp_path / "gguf", models("llama"), _mixed(models("llama"))[1])
    assert not result.ok and message in result.message and "\n" not in result.message


def test_another_type_fails_the_comparison_even_with_the_same_values(
    tmp_path: Path, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, stored = models("llama"), gguf._stored

    def wider(name: str, value: Any, structure: Any) -> tuple[str, Any]:
        held = isinstance(value, Compressed) and value.format.name == "q8_0"
        return ("F32", value.dense.numpy()) if held else stored(name, value, structure)

    monkeypatch.setattr(gguf, "_stored", wider)
    result = _export_wrongly(tmp_path, loaded)
    assert not result.ok and "blk.0.ffn_gate.weight is F32, the policy decides Q8_0" in result.message


def test_another_policy_fails_the_comparison(tmp_path: Path, exported: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    shutil.copytree(exported, tmp_path / "gguf")
    file = _edits(loaded, {loaded.structure.sites[0].name: "q8_0"})[0]
    (tmp_path / "gguf" / "policy.yaml").write_text(render(file, loaded.structure))
    assert (
        "blk.0.attn_q.weight is Q4_0, the policy decides Q8_0"
        in _verified(tmp_path / "gguf", loaded, _mixed(loaded)[1]).message
    )


def test_another_reference_fails_the_comparison(exported: Path, models: Callable[[str], LoadedModel]) -> None:
    assert not verify(exported, models("llama").model, IDS).ok


def _export_wrongly(tmp_path: Path, loaded: LoadedModel) -> Verification:
    file, edits = _mixed(loaded)
    export(tmp_path / "gguf", loaded, file, edits)
    return _verified(tmp_path / "gguf", loaded, edits)


def test_rows_left_as_they_are_fail_the_comparison(
    tmp_path: Path, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "row_order", lambda *_: None)
    result = _export_wrongly(tmp_path / "a", models("llama"))
    assert not result.ok and "blk.0.attn_q.weight does not decode" in result.message
    monkeypatch.setattr(gguf_verify, "row_order", lambda *_: None)
    result = _export_wrongly(tmp_path / "b", models("llama"))
    assert not result.ok and "self_attn" in result.message and "differs from the evaluated weights" in result.message
    if llama_cpp.installed():
        assert "llama.cpp has a loss of" in result.message


def test_another_rotation_fails_the_comparison(
    tmp_path: Path, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models("qwen2")
    write = gguf.add_metadata

    def other(writer: Any, structure: Any, config: Any, *rest: Any) -> None:
        changed = type(config)(**{**config.to_dict(), "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}})
        write(writer, structure, changed, *rest)

    monkeypatch.setattr(gguf, "add_metadata", other)
    result = _export_wrongly(tmp_path, loaded)
    assert not result.ok and "nats per token, more than 0.001 apart; its predictions have KL" in result.message


def test_another_tokenizer_fails_the_comparison(
    tmp_path: Path, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, make = models("llama"), gguf_tokenizer.vocabulary

    def swapped(tokenizer: Any, n_vocab: int) -> gguf_tokenizer.Vocabulary:
        held = make(tokenizer, n_vocab)
        tokens = list(held.tokens)
        tokens[71], tokens[72] = tokens[72], tokens[71]
        return replace(held, tokens=tokens)

    monkeypatch.setattr(gguf, "vocabulary", swapped)
    result = _export_wrongly(tmp_path, loaded)
    assert not result.ok and 'transformers reads other tokens in "The quick' in result.message
    if llama_cpp.installed():
        assert 'llama.cpp reads other tokens in "The quick' in result.message


@needs_llama_cpp
def test_a_rule_for_words_that_llama_cpp_does_not_know_fails_the_comparison(
    tmp_path: Path, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = gguf_tokenizer.vocabulary
    monkeypatch.setattr(gguf, "vocabulary", lambda *given: replace(make(*given), pre="letters"))
    result = _export_wrongly(tmp_path, models("llama"))
    assert not result.ok and "llama.cpp does not load" in result.message


def test_without_llama_cpp_the_outcome_says_so(
    exported: Path, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    result = _verified(exported, models("llama"), _mixed(models("llama"))[1])
    assert result.ok and result.message.endswith("llama.cpp was not run, because xllamacpp is not installed")
    with pytest.raises(ValueError, match="needs the package no_such_package"):
        llama_cpp.LlamaCpp(exported / gguf_layout.MODEL, 64, 128)


@needs_llama_cpp
def test_llama_cpp_computes_what_the_reference_does(exported: Path, models: Callable[[str], LoadedModel]) -> None:
    engine = llama_cpp.LlamaCpp(exported / gguf_layout.MODEL, 96, 128)
    ids = IDS[0].tolist()
    assert engine.predictions(ids) == engine.predictions(ids)
    probes = json.loads((exported / "tokens.json").read_text())
    text, tokens = next(iter(probes.items()))
    assert engine.reads_as(text, tokens)
    assert not engine.reads_as(text, [*tokens[:-1], tokens[-1] - 1])
    assert not engine.reads_as(text, [*tokens[:5], 40, *tokens[6:]])
    assert not engine.reads_as(text, tokens[:-1])
    assert engine.write(text, 4) and engine.write(tokens, 4) == engine.write(text, 4)
    with pytest.raises(ValueError, match="does not run the prompt"):
        engine.predictions([5] * 300)


@pytest.mark.parametrize(
    ("fmt", "d_in", "reason"),
    [
        ("q4_0", 576, None),
        ("iq4_nl", 576, None),
        ("w4a8-g64", 576, None),
        ("q4_k", 1536, None),
        ("q4_k", 576, "Q4_K has blocks of 256 inputs, which 576 inputs do not fill"),
        ("iq4_xs", 576, "IQ4_XS has blocks of 256 inputs"),
        ("w8a8-token", 80, "Q8_0 has blocks of 32 inputs"),
        ("w3a8-g32-asym", 576, "no GGML type has asymmetric 3-bit integers"),
        ("bf16", 576, "leave the site out"),
    ],
)
def test_types_that_do_not_fit_are_refused_and_never_replaced(fmt: str, d_in: int, reason: str | None) -> None:
    site = Site("x", "down", 0, (LayerSpec("x", "down", 0, d_in, 64),))
    found = supports(parse_format(fmt), site)
    assert (found is None) if reason is None else reason in str(found)
    assert "transposed" in str(supports(parse_format("q4_0"), Site("x", "o", 0, (replace(site.layers[0], transposed=True),))))
    assert "experts" in str(supports(parse_format("q4_0"), replace(site, kind="expert_down")))


def test_a_layer_that_no_type_holds_is_named(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    site = loaded.structure.sites[1]
    file, edits = _edits(loaded, {site.name: "w3a16-g32"})
    with pytest.raises(ValueError, match="o_proj has w3a16-g32: no GGML type has symmetric 3-bit"):
        export(tmp_path / "gguf", loaded, file, edits)
    file, edits = _edits(loaded, {site.name: "w4a16-g32"})
    ((name, compressed),) = edits[site.name].linears.items()
    tiny = {**compressed.payload, "scale": compressed.payload["scale"] * 2.0**-16}
    with pytest.raises(ValueError, match=r"o_proj: scale .* of w4a16-g32 is no fp16 number"):
        export(tmp_path / "gguf", loaded, file, {site.name: Edit({name: Compressed.of(compressed.format, tiny)})})
    beside = {**compressed.payload, **columns(compressed.dense, torch.tensor([3]))}
    with pytest.raises(ValueError, match=r"columns\.index, columns\.value beside the grid cannot be expressed"):
        export(tmp_path / "gguf", loaded, file, {site.name: Edit({name: Compressed.of(compressed.format, beside)})})
    assert not (tmp_path / "gguf").exists()


def _refused(loaded: LoadedModel, tmp_path: Path, message: str) -> None:
    file, edits = _edits(loaded, {loaded.structure.sites[0].name: "q4_0"})
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "gguf", loaded, file, edits)
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM is not written to GGUF; only LlamaForCausalLM, Mistral"),
        ("qwen3-moe", {}, "Qwen3MoeForCausalLM is not written"),
        ("llama-untied", {}, r"LlamaForCausalLM has a bias at model\.layers\.0\.self_attn\.q_proj"),
        ("mistral", {"sliding_window": 8}, "attends through a window of 8 tokens"),
        ("qwen3", {}, "has heads of 16, where transformers takes 128"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
            "scales its rotary embedding by the rule dynamic",
        ),
    ],
)
def test_models_that_a_file_does_not_describe_are_refused(
    tmp_path: Path, arch: str, changes: Mapping[str, Any], message: str
) -> None:
    save_tiny(tmp_path / "model", arch)
    _configure(tmp_path / "model", **changes)
    _refused(load(str(tmp_path / "model"), tmp_path), tmp_path, message)


def _with(loaded: LoadedModel, change: Callable[[dict[str, Any]], None]) -> LoadedModel:
    """The model with a changed description of its tokenizer."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    change(described)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), unk_token="<unk>")
    return replace(loaded, tokenizer=tokenizer)


def test_tokenizers_that_a_file_does_not_describe_are_refused(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    _refused(replace(loaded, tokenizer=None), tmp_path, "a GGUF holds the tokenizer, and this model has none")
    words = {"type": "Whitespace"}
    _refused(_with(loaded, lambda d: d.update(pre_tokenizer=words)), tmp_path, r"no rule that splits text .*\(Whitespace\)")
    lower = {"type": "Lowercase"}
    _refused(_with(loaded, lambda d: d.update(normalizer=lower)), tmp_path, "no rule that splits text")
    _refused(_with(loaded, lambda d: d["model"].update(byte_fallback=True)), tmp_path, "BPE with bytes as a fallback")
    _refused(_with(loaded, lambda d: d["model"].update(ignore_merges=True)), tmp_path, "no rule that splits text")
    _refused(replace(loaded, tokenizer=object()), tmp_path, "no fast one")
    with pytest.raises(ValueError, match="but the model has 100 embeddings"):
        gguf_tokenizer.vocabulary(loaded.tokenizer, 100)
    padded = gguf_tokenizer.vocabulary(loaded.tokenizer, 130)
    assert list(padded.tokens[127:]) == [padded.tokens[127], "[PAD128]", "[PAD129]"] and list(padded.types[128:]) == [5, 5]


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "pre"),
    [
        ([{"type": "Digits", "individual_digits": True}, True], False, "smollm"),
        ([gguf_tokenizer.QWEN2, False], False, "qwen2"),
        ([gguf_tokenizer.LLAMA3, False], True, "llama-bpe"),
    ],
)
def test_rules_for_words_have_llama_cpps_names(
    models: Callable[[str], LoadedModel], steps: list[Any], ignore_merges: bool, pre: str
) -> None:
    first, regex = steps
    if isinstance(first, str):
        first = {"type": "Split", "pattern": {"Regex": first}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": regex}

    def change(description: dict[str, Any]) -> None:
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, last]}
        description["model"]["ignore_merges"] = ignore_merges

    assert gguf_tokenizer.vocabulary(_with(models("llama"), change).tokenizer, 128).pre == pre


def test_checkpoints_are_exported_without_a_study(tmp_path: Path, models: Callable[[str], LoadedModel]) -> None:
    loaded = models("llama")
    file, edits = _mixed(loaded)
    checkpoint.write(tmp_path / "checkpoint", loaded, file, edits)
    assert is_checkpoint(tmp_path / "checkpoint") and not is_checkpoint(tmp_path)
    assert export_checkpoint(tmp_path / "checkpoint", "gguf", tmp_path / "gguf").ok
    assert _verified(tmp_path / "gguf", loaded, edits).ok
    with pytest.raises(ValueError, match="iq4_nl is not exported"):
        export_checkpoint(tmp_path / "checkpoint", "compressed-tensors", tmp_path / "ct")


def test_the_command_exports_a_checkpoint(
    tmp_path: Path, models: Callable[[str], LoadedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write(tmp_path / "checkpoint", models("llama"), *_mixed(models("llama")))
    command = ["export", str(tmp_path / "checkpoint"), "--format", "gguf"]
    assert main([*command, "--out", str(tmp_path / "gguf")]) == 0
    assert "weights differ by 0 over 20 linears" in capsys.readouterr().out
    assert main(command) == 2 and "--out says where" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_default_model_loads(tmp_path: Path) -> None:
    loaded = load(None, tmp_path / "cache")
    kinds = {"qkv": "q5_0", "o": "iq4_nl", "gate_up": "q4_1", "down": "q4_k"}
    formats = {
        site.name: "q6_k" if site.kind == "down" and site.block > 24 else kinds[site.kind] for site in loaded.structure.sites
    }
    file, edits = _edits(loaded, formats)
    export(tmp_path / "gguf", loaded, file, edits)
    ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    result = _verified(tmp_path / "gguf", loaded, edits, ids)
    assert result.ok, result.message
    if llama_cpp.installed():
        engine = llama_cpp.LlamaCpp(tmp_path / "gguf" / gguf_layout.MODEL, 64, loaded.structure.n_vocab)
        assert "Paris" in engine.write("The capital of France is", 8)
