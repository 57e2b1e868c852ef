"""Attention, norms, embedding and sampling as cells: what they compute, what they cost, and that a wrong one is not timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.kv.format import parse_cache_format
from methods.model.describe import describe
from profilers import attention, campaign, plan, roofline
from profilers.cached_attention import Attend, Attended, AttendPrompt, Heads, Sdpa, _masked, heads_of
from profilers.cells import operator_cells, outside_cells, widths_of
from profilers.datasheets import DATASHEETS
from profilers.kv_cache import new_cache
from profilers.operators import OPERATORS, Between, footprint, kind_of
from profilers.sweep import measure
from profilers.table import KernelKey, LatencyTable, header_of
from profilers.target import Target, local_cpu
from profilers.workload import Workload
from tests.profilers.machines import GPU
from tests.search.run_server import MS_PER_BYTE, fixed_prices
from tests.tiny import tiny_model

TARGET = local_cpu(1)
HEADS = Heads(6, 3, 16)
DECODE = [
    KernelKey(HEADS.op(), name, 3, 1, 21)
    for name in ("kv-fp32", "kv-bf16", "kv-int8", "kv-fp8", "kv-int4-g8", "kv-kivi2-g8-w16", "kv-turbo3-s2")
]
OTHERS = [
    KernelKey(HEADS.op(), "kv-fp32", 2, 13, 0),
    KernelKey(HEADS.op(), "kv-int8", 2, 13, 0),
    KernelKey(HEADS.op(), "kv-bf16", 2, 150, 0),
    KernelKey("attention-5x5x24", "kv-bf16", 2, 1, 9),  # no head of the project's kernel
    KernelKey("norm", "fp32", 3, 48, 1),
    KernelKey("embedding", "fp32", 5, 24, 77),
    KernelKey("sampling", "fp32", 3, 77, 1),
    KernelKey(HEADS.op("elementwise"), "fp32", 5, 48, 80),
    KernelKey(HEADS.op("elementwise"), "fp32", 5, 48, 0),
]


def table() -> LatencyTable:
    return LatencyTable(TARGET.fingerprint, TARGET.description, header=header_of(TARGET))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("key", [*DECODE, *OTHERS], ids=lambda key: f"{key.op}-{key.format}-{key.n}")
def test_exactly_one_way_runs_a_cell_and_is_right(key: KernelKey, dtype: Any) -> None:
    target = replace(TARGET, compute_dtype=dtype)
    (operator,) = (each for each in OPERATORS[kind_of(key.op)] if each.supports(key, target) is None)
    made = operator.prepare(key, target)
    assert made.problem() is None
    first, again, copied = made(), made(), made.clone()()
    assert torch.equal(first, again)
    assert key.op == "embedding" or torch.equal(first, copied)
    assert made.size_bytes() > 0


def running(key: KernelKey, target: Target) -> list[str]:
    return [each.name for each in OPERATORS[kind_of(key.op)] if each.supports(key, target) is None]


def test_a_cell_runs_what_models_run() -> None:
    decode, prompt = DECODE[1], OTHERS[2]
    plain = replace(TARGET, compute_dtype="bf16", capabilities=frozenset())
    tiles = replace(plain, capabilities=frozenset({"amx_bf16"}))
    own = "attend-prompt" if attention.prompt_kernel(plain) else "sdpa"
    assert running(decode, plain) == ["attend"] and running(OTHERS[3], plain) == ["sdpa"]
    assert [running(prompt, target) for target in (plain, tiles)] == [[own], ["sdpa"]]
    assert running(decode, GPU) == running(prompt, GPU) == ["sdpa"]
    assert "attend here" in str(Sdpa().supports(decode, plain)) and "whole prompts" in str(
        AttendPrompt().supports(decode, plain)
    )
    assert "calibrated" in str(Attend().supports(replace(DECODE[0], format="kv-kvquant3"), TARGET))
    assert "behind a context" in str(Sdpa().supports(replace(OTHERS[0], k=4), plain))
    with pytest.raises(ValueError, match="unknown cache format"):
        Attend().supports(replace(DECODE[0], format="int8"), TARGET)


@pytest.mark.parametrize("name", ["kv-fp32", "kv-int8", "kv-kivi2-g8-w16"])
def test_a_cells_cache_is_that_of_a_model(name: str) -> None:
    """The same tokens into the cache that `generate` and whole-model runs use give the same keys and values."""
    target = replace(TARGET, compute_dtype="fp32")
    made = Attend().prepare(replace(DECODE[0], format=name), target)
    assert made.past is not None
    layer = new_cache(tiny_model("llama"), parse_cache_format(name)).layers[0]
    layer.update(*made.past)
    for theirs, ours in zip(layer.update(made.k, made.v), (made.keys.seen(made.k), made.values.seen(made.v)), strict=True):
        assert torch.equal(theirs, ours)


def _other_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention.attend(q, k, v, 0.3)


def test_wrong_attention_and_wrong_caches_are_found() -> None:
    good = Attend().prepare(DECODE[2], TARGET)
    assert "relative error" in str(replace(good, run=_other_scale).problem())
    assert "gives back its tokens" in str(replace(good, keys=good.values).problem())
    assert "gives back its tokens" in str(replace(good, fmt=parse_cache_format("kv-fp32")).problem())
    assert good.past is not None
    short = replace(good, past=(good.past[0][:, :, 1:], good.past[1]))
    assert "new tokens" in str(short.problem())


@pytest.mark.parametrize("op", ["norm", "embedding", "sampling"])
def test_other_operators_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    made = OPERATORS[op][0].prepare(next(key for key in OTHERS if key.op == op), TARGET)
    call = type(made).__call__
    monkeypatch.setattr(type(made), "__call__", lambda self: call(self).roll(1, 0))
    assert made.problem() is not None


def test_rotary_embedding_and_activation_are_those_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own function on the same queries and keys, and the gate that finds a wrong activation."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    made = OPERATORS["elementwise"][0].prepare(OTHERS[-2], replace(TARGET, compute_dtype="fp32"))
    assert isinstance(made, Between)
    q, k = (x.view(1, 5, -1, 16).transpose(1, 2) for x in made.qkv.split([96, 48, 48], -1)[:2])
    theirs = apply_rotary_pos_emb(q, k, made.cos[None], made.sin[None])
    assert all(torch.equal(a[0], b) for a, b in zip(theirs, made.parts()[:2], strict=True))
    assert made.parts()[2].shape == (5, 80)
    silu = torch.nn.functional.silu
    monkeypatch.setattr("torch.nn.functional.silu", lambda x: silu(x) * (1 if x.dtype is torch.float64 else 1.01))
    assert "relative error" in str(made.problem())


def test_the_mask_of_a_cache_of_fixed_length_hides_nothing() -> None:
    """What CUDA decodes with, on this CPU."""
    made = Attend().prepare(DECODE[0], replace(TARGET, compute_dtype="fp32"))
    assert replace(made, run=_masked(HEADS, DECODE[0].k, TARGET)).problem() is None


def test_a_wrong_operator_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Attended, "problem", lambda self: "relative error 1.0")
    found = table()
    measure(TARGET, DECODE[:1], found, lock_folder=tmp_path)
    assert not found.has(DECODE[0]) and found.reasons(DECODE[0])["attend"] == "relative error 1.0"


def test_cells_are_measured_once_and_apart_from_linears(tmp_path: Path) -> None:
    """A norm and a linear of the same sizes are not one shape; cold in decode, and every cell in its own format."""
    found = LatencyTable.open(tmp_path, TARGET)
    norm = KernelKey("norm", TARGET.compute_dtype, 1, 64, 1)
    prefill = KernelKey(HEADS.op(), "kv-int8", 2, 35, 0)
    keys = [norm, replace(norm, op="linear", format="bf16"), *DECODE[:2], prefill]
    with fixed_prices():
        assert measure(TARGET, keys, found) == []
    assert found.missing(keys) == [] and all(found.has(key) for key in keys)
    assert found.best(DECODE[0])[0] == "attend" and [found.best(prefill)[0]] == running(prefill, TARGET)
    assert (
        found.rows["attend", DECODE[0]].cold
        and not found.rows["rms-norm", norm].cold
        and not found.rows[found.best(prefill)[0], prefill].cold
    )
    again = LatencyTable.open(tmp_path, TARGET)
    assert again.missing(keys) == [] and again.missing([DECODE[2]]) == [DECODE[2]]
    again.add([replace(again.rows["attend", DECODE[0]], source="old")])
    assert again.missing(keys) == [DECODE[0]]


def test_attention_takes_as_long_as_the_bytes_of_its_context(tmp_path: Path) -> None:
    """With the stopwatch reading bytes: a token more costs its keys and values in the cache's format, whatever the context is."""
    found, contexts = table(), (24, 40, 136)
    keys = {name: [KernelKey(HEADS.op(), name, 2, 1, k) for k in contexts] for name in ("kv-bf16", "kv-int8")}
    target = replace(TARGET, compute_dtype="bf16")
    with fixed_prices():
        measure(target, [key for own in keys.values() for key in own], found, lock_folder=tmp_path)
    for name, own in keys.items():
        ms = [found.best(key)[1].median_ms for key in own]
        fmt, layer = parse_cache_format(name), HEADS.layer("bf16")
        token = 2 * sum(fmt.token_bytes(layer, side) for side in ("keys", "values"))
        slopes = [(b - a) / (l - k) for a, b, k, l in zip(ms, ms[1:], contexts, contexts[1:], strict=False)]
        assert ms[0] < ms[1] < ms[2]
        assert slopes == pytest.approx([1.002 * MS_PER_BYTE * token] * 2, rel=1e-6)


def test_what_a_step_computes_besides_its_linears() -> None:
    model = tiny_model("llama")
    structure = describe(model, "bf16")
    decode = dict(outside_cells(structure, Workload(batch=2, context=30), "fp32"))
    assert decode == {
        KernelKey("attention-6x3x16", "kv-fp32", 2, 1, 30): 3,
        KernelKey("norm", "fp32", 2, 96, 1): 7,
        KernelKey("embedding", "fp32", 2, 96, 128): 1,
        KernelKey("sampling", "fp32", 2, 128, 1): 1,
        KernelKey("elementwise-6x3x16", "fp32", 2, 96, 160): 3,
        KernelKey("linear", "bf16", 2, 128, 96): 1,
    }
    prefill = operator_cells(widths_of(structure), Workload("prefill", 2, prompt=30), "bf16", "kv-int8")
    assert [key.m for key, _ in prefill] == [2, 60, 60, 2, 60] and prefill[0][0] == KernelKey(
        "attention-6x3x16", "kv-int8", 2, 30, 0
    )
    assert heads_of(HEADS.op()) == HEADS
    assert widths_of(describe(tiny_model("gpt2"), "fp32")).inner == 0


def test_the_plan_spans_batches_contexts_and_cache_formats() -> None:
    widths = plan.MODELS["smollm2-135m"].widths
    keys = plan.operators([widths, widths], "bf16", [Workload(batch=3, context=99)])
    decode = [key for key in keys if key.op == "attention-9x3x64" and key.n == 1]
    assert {(key.m, key.k) for key in decode} == {(m, k) for m in (1, 8) for k in plan.CONTEXTS} | {(3, 99)}
    assert {key.format for key in decode} == {"kv-bf16", *plan.CACHES} and len(keys) == len(set(keys))
    assert [len(group) for group in plan.by_shape(decode)] == [4] * 9
    assert {key.m for key in keys if key.op == "norm"} == {1, 3, 8, *plan.PREFILL_ROWS}


def test_the_bare_sweep_has_them_after_the_first_rows_of_all_shapes() -> None:
    arguments = ["--out", "x", "--models", "smollm2-135m", "--plan", "0", "--formats", "bf16"]
    keys = campaign._planned(campaign._parser().parse_args(arguments), TARGET)
    kinds = [kind_of(key.op) for key in keys]
    assert kinds[:10] == ["linear"] * 10 and set(kinds[10:20]) == {"attention"} and kinds[-1] == "linear"
    assert len(keys) == len(set(keys))


def test_memory_that_a_cell_needs_is_counted() -> None:
    small = replace(TARGET, memory_bytes=64 << 20)
    wide = KernelKey("attention-32x8x128", "kv-bf16", 8, 1, 8192)
    assert footprint(wide) > 2 * 2 * 8 * 8192 * 8 * 128
    assert not campaign.fits(small, wide) and campaign.fits(small, DECODE[0])
    assert not campaign.fits(small, KernelKey("embedding", "bf16", 1, 4096, 128256))


def test_the_roofline_of_attention_is_that_of_its_caches_bytes() -> None:
    sheet, key = DATASHEETS["h100"], KernelKey("attention-32x8x128", "kv-bf16", 8, 1, 8192)
    ideal = {name: roofline.operator(sheet, replace(key, format=name)).p10_ms for name in ("kv-bf16", "kv-int8", "kv-fp8")}
    assert ideal["kv-bf16"] == pytest.approx(2 * 8 * 8193 * 8 * 128 * 2 / (sheet.bandwidth * 1e6))
    assert ideal["kv-fp8"] / ideal["kv-bf16"] == pytest.approx((128 + 2) / 256)
    assert ideal["kv-int8"] / ideal["kv-bf16"] == pytest.approx((128 + 4) / 256)
    structure = replace(Heads(32, 8, 128).layer("bf16"), d_model=4096, n_vocab=1000, blocks=("a", "b"))
    load = Workload(batch=8, context=8192)
    dense, fp8 = (roofline.rest(sheet, structure, load, name) for name in ("kv-bf16", "kv-fp8"))
    assert dense == roofline.rest(sheet, structure, load) and dense.p10_ms - fp8.p10_ms == pytest.approx(
        2 * (ideal["kv-bf16"] - ideal["kv-fp8"])
    )
    assert roofline.operator(sheet, KernelKey("norm", "bf16", 4, 4096, 1)).label == "modelled"
    with pytest.raises(ValueError, match="model-decode"):
        roofline.operator(sheet, KernelKey("model-decode-x", "bf16", 1, 512, 32))
