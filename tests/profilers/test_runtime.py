"""Materialised models against the reference numerics, and whole-model timing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.apply import Installer
from methods.formats.format import parse_format
from methods.method import Edit
from methods.model.describe import describe
from profilers import attention, end_to_end, norms
from profilers.kernels.kernel import Prepared
from profilers.kv_cache import new_cache
from profilers.norms import KernelNorm, TorchNorm
from profilers.runtime import Chooser, FusedSite, KernelLinear, Runtime, RuntimeRefusal, dense_candidates, materialize
from profilers.table import KernelKey, LatencyTable, Row
from profilers.target import local_cpu, local_cuda
from profilers.timer import ENOUGH_SHARE, Sample, Samples, Timing
from profilers.workload import Workload
from tests.edits import edits_of
from tests.tiny import HIDDEN, INNER, tiny_model, tiny_tokens

TARGET = local_cpu(1)
FP32 = replace(TARGET, compute_dtype="fp32")


def _uniform(model: Any, structure: Any, fmt: str) -> dict[str, Edit]:
    return edits_of(model, structure, {site.name: fmt for site in structure.sites})[1]


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits.float().clone()


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("arch", ("llama", "llama-untied", "gpt2", "opt", "gemma", "gemma2", "qwen3", "phi", "neox", "mixtral"))
def test_dense_and_compressed_logits_are_the_references(arch: str) -> None:
    model = tiny_model(arch)
    structure = describe(model, "fp32")
    tokens = tiny_tokens()
    dense = materialize(model, structure, {}, FP32)
    assert _error(_logits(dense, tokens), _logits(model, tokens)) < 1e-4
    edits = _uniform(model, structure, "w4a16-g16-asym")
    compressed = materialize(model, structure, edits, FP32)
    with Installer(model, structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        expected = _logits(model, tokens)
    assert _error(_logits(compressed, tokens), expected) < 1e-4
    assert _error(expected, _logits(model, tokens)) > 1e-2


@pytest.mark.parametrize("fmt", ("w8a8-token", "w4a8-g16-asym", "w2a8-g32"))
def test_formats_with_int8_activations(fmt: str) -> None:
    model = tiny_model("qwen2")
    structure = describe(model)
    edits = _uniform(model, structure, fmt)
    tokens = tiny_tokens()
    with Installer(model, structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        expected = _logits(model, tokens)
    # A rounding tie that falls the other way moves an activation by a whole step.
    assert _error(_logits(materialize(model, structure, edits, FP32), tokens), expected) < 2e-2
    if TARGET.compute_dtype == "bf16":
        assert _error(_logits(materialize(model, structure, edits, TARGET), tokens), expected) < 1e-1


def test_mixed_policy_replaced_tensors_and_a_dense_rest() -> None:
    model = tiny_model("llama")
    structure = describe(model, "fp32")
    first, norm = structure.sites[0], structure.sites[0].norm
    assert norm is not None
    _, edits = edits_of(model, structure, {first.name: "w8a16"})
    gain = torch.full_like(model.get_parameter(f"{norm}.weight"), 0.5)
    edits = {first.name: replace(edits[first.name], tensors={f"{norm}.weight": gain})}
    tokens = tiny_tokens()
    with Installer(model, structure) as installer:
        installer.install(first.name, edits[first.name])
        expected = _logits(model, tokens)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert _error(_logits(materialize(model, structure, edits, FP32), tokens), expected) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_decoding_with_a_cache_is_the_same_as_reading_it_all() -> None:
    model = tiny_model("llama")
    structure = describe(model, "fp32")
    runtime = Runtime(model, structure, FP32)
    ours = runtime.materialize(_uniform(model, structure, "w4a16-g16"))
    tokens = tiny_tokens(2, 20)
    with torch.inference_mode():
        cache = new_cache(ours)
        parts = [ours(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([9, 1, 1, 9], 1)]
    assert _error(torch.cat(parts, 1), _logits(ours, tokens)) < 1e-4
    assert ours.config._attn_implementation == attention.NAME and model.config._attn_implementation == "sdpa"
    assert sum(isinstance(module, KernelNorm) for module in ours.modules()) == 7


@pytest.mark.parametrize("arch", ("mistral", "gemma3"))
def test_sliding_windows_and_batches_decode_right(arch: str) -> None:
    model = tiny_model(arch)
    structure = describe(model, "fp32")
    ours = materialize(model, structure, {}, FP32)
    tokens = tiny_tokens(2, 16)
    with torch.inference_mode():
        cache = new_cache(ours)
        parts = [
            ours(input_ids=piece, past_key_values=cache, use_cache=True).logits
            for piece in tokens.split([11, 1, 1, 1, 1, 1], 1)
        ]
    assert _error(torch.cat(parts, 1), _logits(model, tokens)) < 1e-4


def test_generate_runs_and_agrees_with_the_model() -> None:
    model = tiny_model("llama-untied")
    ours = materialize(model, describe(model, "fp32"), {}, FP32)
    tokens = tiny_tokens(2, 7)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    assert torch.equal(ours.generate(tokens, **options), expected)
    assert torch.equal(ours.generate(tokens, past_key_values=new_cache(ours), **options), expected)


def test_beam_search_reorders_the_cache() -> None:
    model = tiny_model("llama")
    ours = materialize(model, describe(model, "fp32"), {}, FP32)
    tokens = tiny_tokens(1, 7)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 4, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    assert torch.equal(ours.generate(tokens, past_key_values=new_cache(ours), **options), expected)


def test_padded_batches_use_their_mask() -> None:
    model = tiny_model("llama")
    ours = materialize(model, describe(model, "fp32"), {}, FP32)
    tokens, mask = tiny_tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("shape", ((1, 9, 3, 40, 64), (2, 6, 2, 17, 16), (3, 4, 4, 1, 80), (1, 2, 1, 33, 256)))
def test_attention_against_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, length, dim = shape
    generator = torch.Generator().manual_seed(length)
    q = 3 * torch.randn(batch, 1, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, length + 3, dim, generator=generator).to(dtype)[:, :, :length] for _ in range(2))
    got = attention.attend(q, k, v, dim**-0.5).transpose(1, 2)
    expected = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert _error(got.double(), expected) < (4e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.skipif(not attention.prompt_kernel(TARGET), reason="this CPU multiplies no bf16 pairs, or has tiles for it")
@pytest.mark.parametrize(
    "shape", ((1, 9, 3, 40, 64), (2, 6, 2, 131, 16), (3, 4, 4, 2, 80), (1, 2, 1, 33, 256), (1, 4, 2, 512, 96))
)
def test_attention_of_prompts_against_torch(shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, length, dim = shape
    generator = torch.Generator().manual_seed(length)
    q = 3 * torch.randn(batch, length, heads, dim, generator=generator).bfloat16().transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, length + 3, dim, generator=generator).bfloat16()[:, :, :length] for _ in range(2))
    assert attention.fits_prompt(q, k, v, None, {"scaling": 0.1})
    got = attention.attend_prompt(q, k, v, dim**-0.5, threads=1 + batch % 2).transpose(1, 2)
    double = q.double(), k.double(), v.double()
    expected = nn.functional.scaled_dot_product_attention(*double, is_causal=True, enable_gqa=True)
    assert _error(got.double(), expected) < 4e-3
    for row in (0, length // 2, length - 1):
        assert _error(got[:, :, row].double(), expected[:, :, row]) < 6e-3


def test_attention_that_is_not_plain_goes_to_torch() -> None:
    prompt = torch.randn(1, 2, 5, 16).bfloat16()
    assert attention.fits_prompt(prompt, prompt, prompt, None, {"is_causal": True, "dropout": 0.0})
    assert not attention.fits_prompt(prompt, prompt, prompt, None, {"is_causal": False})
    assert not attention.fits_prompt(prompt, prompt, prompt, torch.ones(1, 1, 5, 5), {})
    assert not attention.fits_prompt(prompt[:, :, 2:], prompt, prompt, None, {})
    assert not attention.fits_prompt(prompt, prompt, prompt, None, {"softcap": 30.0})
    assert not attention.fits_prompt(*(3 * [prompt.float()]), None, {})
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    assert attention.fits(q, k, k, None, {"scaling": 0.1, "dropout": 0.0})
    assert not attention.fits(q, k, k, torch.ones(1, 1, 1, 5), {})
    assert not attention.fits(q.expand(1, 2, 3, 16), k, k, None, {})
    assert not attention.fits(q, k, k, None, {"softcap": 30.0})
    assert not attention.fits(q, k, k, None, {"dropout": 0.1})
    assert not attention.fits(q[..., :8], k[..., :8], k[..., :8], None, {})


class _Counted:
    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.weight.T


def _site(rows: int = 32) -> tuple[FusedSite, _Counted, _Counted]:
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    few, many = _Counted(weight), _Counted(weight)
    casted: tuple[Prepared, Prepared] = (few, many)  # type: ignore[assignment]
    return FusedSite(*casted, rows, [6, 4, 2]), few, many


def test_a_fused_site_computes_once_for_one_input() -> None:
    site, few, _ = _site()
    layers = [KernelLinear(site, index, 5) for index in range(3)]
    x, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    outputs = [layer(x) for layer in layers]
    assert few.calls == 1
    assert torch.equal(torch.cat(outputs, -1), x @ few.weight.T)
    assert site._input is None
    assert torch.equal(layers[0](other), (other @ few.weight.T)[..., :6]) and few.calls == 2
    assert torch.equal(layers[0](other), (other @ few.weight.T)[..., :6]) and few.calls == 3


def test_layers_with_different_inputs_are_right() -> None:
    site, few, _ = _site()
    layers = [KernelLinear(site, index, 5) for index in range(3)]
    inputs = [torch.randn(2, 5) for _ in range(3)]
    for layer, x, at in zip(layers, inputs, (slice(0, 6), slice(6, 10), slice(10, 12)), strict=True):
        assert torch.equal(layer(x), (x @ few.weight.T)[:, at])
    assert few.calls == 3


def test_many_rows_take_the_other_kernel() -> None:
    site, few, many = _site(rows=4)
    site.run(torch.randn(2, 2, 5))
    site.run(torch.randn(5, 5))
    assert (few.calls, many.calls) == (1, 1)


def test_the_table_chooses_the_kernel() -> None:
    from methods.formats.format import parse_format

    fmt, key = parse_format("bf16"), KernelKey("linear", "bf16", 1, 96, 64)
    table = LatencyTable(TARGET.fingerprint, "here")
    assert Chooser(TARGET, table)(fmt, 96, 64, 1).name == "dense-prepacked"
    for name, ms in (("dense-prepacked", 2.0), ("dense", 1.0), ("gone", 0.5)):
        table.add([Row(name, key, "ok", "hash", timing=Timing(ms, ms, ms, 5))])
    assert Chooser(TARGET, table)(fmt, 96, 64, 1).name == "dense"
    assert Chooser(TARGET)(parse_format("w4a8-g32"), 96, 64, 512).name == "decoded"
    with pytest.raises(RuntimeRefusal, match="no kernel runs w4a8-g64 at n=96, k=96"):
        Chooser(TARGET)(parse_format("w4a8-g64"), 96, 96, 1)


def test_edits_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    structure = describe(model)
    site = structure.sites[0]
    _, edits = edits_of(model, structure, {site.name: "w8a16"})
    first = site.layers[0].name
    with pytest.raises(RuntimeRefusal, match="compressed as a whole"):
        materialize(model, structure, {site.name: Edit({first: edits[site.name].linears[first]})}, TARGET)
    other = edits_of(model, structure, {site.name: "w4a16-g16"})[1][site.name].linears[first]
    with pytest.raises(RuntimeRefusal, match="share one format"):
        materialize(model, structure, {site.name: Edit({**edits[site.name].linears, first: other})}, TARGET)
    with pytest.raises(KeyError, match="no site 'nowhere'"):
        materialize(model, structure, {"nowhere": edits[site.name]}, TARGET)


def test_models_share_what_they_have_in_common() -> None:
    model = tiny_model("llama")
    structure = describe(model)
    runtime = Runtime(model, structure, TARGET)
    _, edits = edits_of(model, structure, {structure.sites[0].name: "w8a16"})
    one, two = runtime.materialize({}), runtime.materialize(edits)
    assert one.get_input_embeddings().weight.data_ptr() == two.get_input_embeddings().weight.data_ptr()
    assert one.lm_head.site is two.lm_head.site
    sites = [site.layers[0].name for site in structure.sites[:2]]
    shared = [one.get_submodule(name).site is two.get_submodule(name).site for name in sites]
    assert shared == [False, True]


@pytest.mark.parametrize("workload", (Workload("decode", batch=2, context=12), Workload("prefill", prompt=40)))
def test_whole_models_are_timed_in_turns(workload: Workload) -> None:
    model = tiny_model("llama")
    structure = describe(model)
    models = dense_candidates(Runtime(model, structure, TARGET, None, workload))
    models["small"] = materialize(model, structure, _uniform(model, structure, "w4a8-g16"), TARGET, None, workload)
    found = end_to_end.measure(models, workload, TARGET, rounds=6, min_rounds=2)
    assert set(found) == {"dense bf16", "eager fp32", "small"}
    for measurement in found.values():
        assert len(measurement.samples.all) == 6 * (end_to_end.BURST if workload.phase == "decode" else 1)
        assert measurement.lo_ms <= measurement.median_ms <= measurement.hi_ms
    ratio = found["small"].ratio_to(found["dense bf16"])
    assert 0 < ratio.lo <= ratio.mid <= ratio.hi
    assert found["small"].ratio_to(found["small"]).mid == 1.0


def test_steps_on_a_slow_machine_do_not_count_where_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look finds the machine slow for a while; waiting for it ends."""
    looks: list[bool] = []

    class Moody:
        def full(self) -> bool:
            looks.append(len(looks) % 40 >= 20)
            return looks[-1]

    monkeypatch.setattr(end_to_end, "pace_of", lambda target: Moody())
    model = tiny_model("llama")
    found = end_to_end.measure({"a": model, "b": model}, Workload(context=12), TARGET, rounds=8)
    samples = found["a"].samples
    assert 0 < sum(sample.slow for sample in samples.all) < len(samples.all) == 8 * end_to_end.BURST
    counting = dict(samples.seconds())
    few = samples.contended or samples.rejected > 1 - ENOUGH_SHARE  # where the machine that runs the test interrupted the rest
    assert few or not any(sample.slow for sample in samples.all if sample.turn in counting)
    assert len(looks) > 2 * len(samples.all)


def test_a_decode_step_leaves_the_cache_as_it_was() -> None:
    model = tiny_model("mistral")
    ours = materialize(model, describe(model), {}, TARGET)
    with torch.inference_mode():
        step = end_to_end.Step(ours, Workload("decode", batch=2, context=12))
        first = step()
        assert step._cache.get_seq_length() == 13
        step.reset()
        assert step._cache.get_seq_length() == 12
        assert torch.equal(step(), first)


def test_ratios_are_paired_by_round() -> None:
    def found(seconds: list[float], interrupted: list[bool]) -> end_to_end.Measurement:
        samples = Samples([Sample(turn, s, s / 2, bad) for turn, (s, bad) in enumerate(zip(seconds, interrupted, strict=True))])
        return end_to_end.Measurement(samples.timing(), samples, 0.0)

    ours = found([1.0, 2.0, 30.0, 4.0], [False, False, True, False])
    theirs = found([2.0, 4.0, 6.0, 8.0], [False] * 4)
    assert ours.ratio_to(theirs).mid == pytest.approx(0.5)
    robbed = found([10.0, 20.0, 30.0, 40.0], [True] * 4)
    assert robbed.contended
    assert robbed.ratio_to(theirs).mid == pytest.approx(5.0)


@pytest.mark.parametrize("arch", ("llama", "gemma"))
def test_on_a_gpu_norms_are_torchs_operator_and_attention_stays(arch: str) -> None:
    model, gpu = tiny_model(arch), replace(FP32, device="cuda")
    result = copy.deepcopy(model)
    assert norms.install(result, model, {}, gpu) == 7
    assert sum(isinstance(module, TorchNorm) for module in result.modules()) == 7
    assert _error(_logits(result, tiny_tokens()), _logits(model, tiny_tokens())) < 1e-5
    assert not attention.install(result, gpu) and result.config._attn_implementation == "sdpa"


def test_torchs_norm_takes_a_gain_narrow_only_where_nothing_is_lost() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.linspace(0.5, 2, 32).bfloat16().float()
    for gain, dtype in ((exact, torch.bfloat16), (exact + 2**-12, torch.float32)):
        norm = TorchNorm(gain, 1e-5, torch.bfloat16)
        wide = x.double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain
        assert norm.gain.dtype is dtype and norm(x).dtype is torch.bfloat16
        assert float((norm(x).double() - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ("w4a16-g32", "w8a8-token"))
def test_a_model_on_a_gpu_computes_the_references_logits(fmt: str) -> None:
    target = local_cuda()
    assert target is not None
    model = tiny_model("llama")
    structure, tokens = describe(model), tiny_tokens()
    edits = _uniform(model, structure, fmt)
    with Installer(model, structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        expected = _logits(model, tokens)
    runtime = Runtime(model, structure, target)
    assert _error(_logits(runtime.materialize(edits), tokens.cuda()).cpu(), expected) < 1e-1


def test_a_stand_in_runs_the_kernels_of_its_formats_on_weights_of_its_own_in_every_site() -> None:
    """What speed depends on is that of the real model: kernels, shapes, bytes, and that no weight is read twice."""
    model = tiny_model("llama-untied")
    structure = describe(model, "fp32")
    formats = {site.name: "w4a16-g16-asym" if site.block else "w8a8-g16" for site in structure.sites if site.block < 2}
    runtime = Runtime(model, structure, FP32)
    made = runtime.stand_in({name: parse_format(fmt) for name, fmt in formats.items()})
    real = runtime.materialize(edits_of(model, structure, formats)[1])
    seen: set[int] = set()
    for site, layer in structure.layers():
        ours, theirs = (each.get_submodule(layer.name) for each in (made, real))
        assert type(ours.site.few) is type(theirs.site.few) and type(ours.site.many) is type(theirs.site.many)
        assert ours.site.few.size_bytes() == theirs.site.few.size_bytes() and ours.site.rows == theirs.site.rows
        assert ours.out_features == theirs.out_features
        if site.name not in formats:
            assert ours.site is theirs.site
        elif layer is site.layers[0]:
            assert id(ours.site.few) not in seen and ours.site.few is not theirs.site.few
            seen.add(id(ours.site.few))
    streams = [made.get_submodule(site.layers[0].name).site.few.stream.data_ptr() for site in structure.sites if site.block < 2]
    assert len(set(streams)) == len(streams)
    assert torch.isfinite(_logits(made, tiny_tokens())).all()
    with pytest.raises(KeyError, match="no site"):
        runtime.stand_in({"nowhere": parse_format("w8a8-g16")})


@pytest.mark.parametrize(("dtype", "compute", "names"), [
    ("fp16", "bf16", ("dense fp16", "dense bf16, rounded from fp16", "eager fp32")),
    ("fp32", "bf16", ("dense fp32", "dense bf16, rounded from fp32", "eager fp32")),
    ("bf16", "bf16", ("dense bf16", "eager fp32")),
    ("fp16", "fp32", ("dense fp16", "eager fp32")),
])  # fmt: skip
def test_the_baseline_is_what_people_would_run_and_is_named_as_that(dtype: str, compute: str, names: tuple[str, ...]) -> None:
    """A checkpoint in fp16 is multiplied in fp32 where a CPU has no such products: rounded to bf16 it is the faster dense model."""
    model = tiny_model("llama")
    found = dense_candidates(Runtime(model, describe(model, dtype), replace(TARGET, compute_dtype=compute)))
    assert tuple(found) == names
    if len(names) == 3:
        site = found[names[1]].get_submodule("model.layers.0.mlp.down_proj").site  # type: ignore[union-attr]
        assert site.few.size_bytes() == 2 * HIDDEN * INNER


def test_a_gpu_is_compared_with_the_rounded_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dense kernel multiplies other dtypes than bf16 in fp32 as well, so that half the time would be had for nothing."""
    monkeypatch.setattr(Runtime, "materialize", lambda engine, _: engine.structure.dtype)
    model = tiny_model("llama")
    for dtype, found in (
        ("fp16", {"dense fp16": "fp16", "dense bf16, rounded from fp16": "bf16"}),
        ("bf16", {"dense bf16": "bf16"}),
    ):
        target = replace(TARGET, device="cuda", compute_dtype="bf16")
        assert dense_candidates(Runtime(model, describe(model, dtype), target)) == found
