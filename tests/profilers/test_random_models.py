"""Random models in a sweep: the decoder against transformers', what is planned, timed, refused and gone on with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.formats.format import parse_format
from profilers import campaign, random_models, runtime
from profilers.checks import summary
from profilers.clocks import Clocks
from profilers.decoder import EPS, Block, Decoder, norm_of
from profilers.end_to_end import Limits
from profilers.kernels.dense import Dense
from profilers.plan import FORMATS, MODELS, Sizes
from profilers.random_models import KERNEL, RandomModel, block_cells, depth_of, planned, uniform_formats
from profilers.table import Check, KernelKey, LatencyTable, Row, header_of
from profilers.target import local_cpu
from profilers.workload import Workload
from tests.profilers.machines import GPU, FakeDevice, timing
from tests.tiny import tiny_model, tiny_tokens

TARGET = local_cpu(1)
FP32 = replace(TARGET, compute_dtype="fp32")
TINY = Sizes(hidden=96, inner=160, heads=6, kv_heads=3, head_dim=16, vocabulary=128)
QUICK = Limits(rounds=3, min_rounds=3)
DECODE = RandomModel(TINY, Workload("decode", context=9), ("fp32", "w8a16-g32"), 4)


def table(target: Any = FP32) -> LatencyTable:
    return LatencyTable(target.fingerprint, target.description, header=header_of(target))


def decoder_of(model: Any) -> Decoder:
    """A llama's weights on the dense kernel."""

    def linear(*modules: Any) -> Any:
        weight = torch.cat([module.weight for module in modules])
        return Dense().prepare(parse_format("fp32"), {"weight": weight}, FP32)

    def block(layer: Any) -> Block:
        a, f = layer.self_attn, layer.mlp
        return Block(
            norm_of(layer.input_layernorm.weight, FP32),
            linear(a.q_proj, a.k_proj, a.v_proj),
            linear(a.o_proj),
            norm_of(layer.post_attention_layernorm.weight, FP32),
            linear(f.gate_proj, f.up_proj),
            linear(f.down_proj),
        )

    inner = model.model
    blocks = [block(layer) for layer in inner.layers]
    head, norm = linear(model.lm_head), norm_of(inner.norm.weight, FP32)
    return Decoder(TINY, blocks, inner.embed_tokens.weight, norm, head, FP32, batch=2, length=24)


@pytest.mark.parametrize("native", (True, False))
def test_the_decoder_is_transformers_llama(native: bool) -> None:
    model = tiny_model("llama")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = EPS
    tokens = tiny_tokens(2, 21)
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        ours = decoder_of(model)
        ours._native = ours._native and native
        got = [ours(tokens[:, :18], 0)] + [ours(tokens[:, at : at + 1], at) for at in (18, 19, 20)]
        assert torch.equal(ours(tokens[:, 20:], 20), got[-1])
    error = (torch.stack(got, 1) - expected[:, 17:]).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert (expected[:, 17] - expected[:, 18]).abs().max() > 0.1


@pytest.mark.skipif(TARGET.compute_dtype != "bf16", reason="the prompt kernel is for bf16")
def test_prompts_on_the_projects_kernel_are_torchs() -> None:
    model = RandomModel(TINY, Workload("prefill", prompt=40), ("bf16",), 4)
    with torch.inference_mode():
        made, _ = random_models._made(TARGET, model, table(TARGET))
        whole, tokens = made[model.key("bf16", 4)], tiny_tokens(1, 40)
        native = whole(tokens, 0)
        whole._native = False
        plain = whole(tokens, 0)
    assert torch.isfinite(native).all() and (native - plain).norm() / plain.norm() < 3e-2


def test_the_first_blocks_are_a_decoder_with_the_same_weights() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        whole = decoder_of(model)
        short = whole.first(1)
        tokens = tiny_tokens(2, 7)
        model.model.layers = model.model.layers[:1]
        assert torch.allclose(short(tokens, 0).argmax(-1), decoder_of(model)(tokens, 0).argmax(-1))
    assert short.blocks[0] is whole.blocks[0] and short._cache.data_ptr() != whole._cache.data_ptr()
    assert whole.size_bytes() - short.size_bytes() == 2 * whole.blocks[0].size_bytes()


def test_a_model_is_planned_dense_and_in_a_format_of_every_width() -> None:
    assert uniform_formats(MODELS["llama-3.1-8b"], FORMATS["cpu"]) == ("bf16", "w8a8-g64", "w4a8-g32-asym", "w2a8-g32-asym")
    assert uniform_formats(MODELS["llama-3.1-8b"], FORMATS["cuda"]) == ("bf16", "w8a16-g64", "w4a16-g64", "w2a16-g64")
    assert uniform_formats(TINY, ("w4a8-g64", "bf16", "w4a8-g32")) == ("bf16", "w4a8-g32")
    assert planned([TINY], ("w4a8-g32",)) == []
    found = planned([TINY, MODELS["smollm2-135m"]], ("bf16", "w8a8-g32"))
    assert [model.workload.phase for model in found] == ["decode", "prefill"] * 2 and found[0].formats == ("bf16", "w8a8-g32")
    assert found[0].n_blocks == 4 and depth_of(MODELS["smollm2-135m"]) == 8 and depth_of(MODELS["llama-3.1-8b"]) == 4


def test_keys_say_the_sizes() -> None:
    assert DECODE.key("bf16", 4) == KernelKey("random-decode-96x160x6x3x16x128", "bf16", 1, 9, 4)
    assert len(set(DECODE.cells())) == 4 and {key.k for key in DECODE.cells()} == {2, 4}


def test_a_blocks_cells_are_its_linears_and_what_a_step_computes_for_it() -> None:
    found = block_cells(DECODE, "w8a16-g32", FP32)
    linears = {(key.n, key.k): count for key, count in found.items() if key.op == "linear"}
    assert linears == {(192, 96): 1, (96, 96): 1, (320, 96): 1, (96, 160): 1}
    others = {key.op.partition("-")[0]: count for key, count in found.items() if key.op != "linear"}
    assert others.items() >= {"attention": 1, "norm": 2}.items() and not {"embedding", "sampling"} & others.keys()


def test_models_larger_than_the_memory_do_not_fit() -> None:
    large = planned([MODELS["llama-3.1-8b"]], FORMATS["cpu"])[0]
    assert large.fits(replace(TARGET, memory_bytes=200 << 30)) and not large.fits(replace(TARGET, memory_bytes=8 << 30))
    found = table(TARGET)
    tiny = replace(TARGET, memory_bytes=1 << 10)
    assert campaign.sweep(tiny, [], found, models=[DECODE]) == [] and not found.rows


def cells_known(found: LatencyTable, ms: float) -> None:
    keys = {key for fmt in DECODE.formats for key in block_cells(DECODE, fmt, FP32)}
    found.add(Row("grouped", key, "ok", "", timing=timing(ms)) for key in keys)


@pytest.mark.parametrize("workload", (DECODE.workload, Workload("prefill", prompt=12)))
def test_every_format_is_timed_at_two_depths(workload: Workload) -> None:
    model, found = replace(DECODE, workload=workload), table()
    assert model.missing(found, FP32) == model.cells()
    random_models.measure(FP32, model, found, limits=QUICK)
    rows = [found.rows[KERNEL, key] for key in model.cells()]
    assert [row.status for row in rows] == ["ok"] * 4 and all(row.timing and row.timing.median_ms > 0 for row in rows)
    deep, half = (found.rows[KERNEL, model.key("w8a16-g32", depth)] for depth in (4, 2))
    per_block = TINY.hidden * 192 + 96 * 96 + 320 * 96 + 96 * 160
    assert (deep.size_bytes - half.size_bytes) / 2 == pytest.approx(per_block * (1 + 2 / 32), rel=0.05)
    assert model.missing(found, FP32) == [] and not found.checks
    timed = dict(found.rows)
    random_models.measure(FP32, model, found, limits=QUICK)
    assert found.rows == timed


def test_a_blocks_time_is_held_against_its_cells() -> None:
    """On a device where a step takes as long as it has blocks, and 2 ms besides."""
    found = table(GPU)

    class Depths(FakeDevice):
        def captured(self, calls: Any) -> Any:
            return calls[0]

        def seconds(self, call: Any) -> float:
            return 1e-3 * (2 + len(call.args[0].model.blocks))

    target = replace(FP32, device="cuda")
    host = random_models.Chooser(FP32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_models, "Chooser", lambda target, table: host)
        patch.setattr(random_models, "_made", lambda target, model, table, made=random_models._made: made(FP32, model, table))
        cells_known(found, 0.2)
        random_models.measure(target, DECODE, found, limits=QUICK, device=Depths([Clocks(1000.0)] * 2))
    assert [check.kind for check in found.checks] == ["block", "block"]
    n_calls = sum(block_cells(DECODE, "fp32", FP32).values())
    for check in found.checks:
        assert check.again_ms == pytest.approx(1.0) and check.first_ms == pytest.approx(0.2 * n_calls) and check.key.k == 4
    assert "2 blocks of random models, by the difference of two depths, take " in summary(found)


def test_formats_without_a_kernel_are_said_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, real = table(), runtime.supported
    monkeypatch.setattr(runtime, "supported", lambda fmt, *shape: real(fmt, *shape) if fmt.dense else [])
    random_models.measure(FP32, DECODE, found, limits=QUICK)
    row = found.rows[KERNEL, DECODE.key("w8a16-g32", 4)]
    assert row.status == "unsupported" and "no kernel runs w8a16-g32" in row.reason
    assert found.has(DECODE.key("fp32", 2)) and DECODE.missing(found, FP32) == []


def test_what_does_not_run_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*rest: Any) -> Any:
        raise RuntimeError("no such operator\nlong advice")

    found = table()
    monkeypatch.setattr(random_models, "random_payload", torn)
    random_models.measure(FP32, DECODE, found, limits=QUICK)
    assert {(row.status, row.reason) for row in found.rows.values()} == {("failed", "no such operator")} and len(
        found.rows
    ) == 4


def test_a_sweep_goes_on_where_its_budget_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "LIMITS", QUICK)
    monkeypatch.setattr(random_models.measure, "__kwdefaults__", {**random_models.measure.__kwdefaults__, "limits": QUICK})
    prefill, found, looks = replace(DECODE, workload=Workload("prefill", prompt=12)), table(), [0.0]

    def now() -> float:
        looks[0] += 1.0
        return looks[0]

    left = campaign.sweep(FP32, [], found, models=[DECODE, prefill], budget_s=1.5, now=now)
    assert left == prefill.cells() and all(found.has(key) for key in DECODE.cells())
    before = dict(found.rows)
    assert campaign.sweep(FP32, [], found, models=[DECODE, prefill]) == []
    assert before.items() <= found.rows.items() and len(found.rows) == 8


def test_old_checks_and_block_checks_survive_the_disk(tmp_path: Path) -> None:
    kept = LatencyTable.open(tmp_path, TARGET)
    check = Check("block", KERNEL, DECODE.key("bf16", 4), 1.0, 1.25, 10, 0.5, 1000.0)
    kept.add_checks([check])
    assert LatencyTable.open(tmp_path, TARGET).checks == [check]


def test_a_bare_sweep_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['pyarrow'] = None\n"
        "import profilers.campaign, profilers.random_models\n"
        "assert not {'optuna', 'ray', 'sklearn', 'scipy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
