"""Kernels of weights with zeros and of low rank: what they hold, what they refuse, and models that run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods.apply import Installer
from methods.formats.format import Format, parse_format
from methods.formats.numerics import Compressed, decode
from methods.method import Edit
from methods.model.describe import describe
from methods.model.structure import Site
from profilers.kernels import gate
from profilers.kernels.catalogue import supported
from profilers.kernels.csr import Csr
from profilers.kernels.dense import Dense
from profilers.kernels.low_rank import LowRank, LowRankFused, tiled, untiled
from profilers.kernels.payloads import random_payload
from profilers.runtime import RuntimeRefusal, materialize
from profilers.sweep import measure
from profilers.table import KernelKey, LatencyTable
from profilers.target import local_cpu
from tests.tiny import tiny_model, tiny_tokens

TARGET = local_cpu(1)
FP32 = replace(TARGET, compute_dtype="fp32")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ("bf16-s90", "fp32-s93"))
@pytest.mark.parametrize(("n", "k"), ((40, 192), (13, 592)))
def test_zeros_cost_what_the_format_says(name: str, n: int, k: int) -> None:
    fmt = parse_format(name)
    target = TARGET if fmt.dense == TARGET.compute_dtype else FP32
    target = replace(target, compute_dtype=fmt.dense)
    prepared = Csr().prepare(fmt, random_payload(fmt, n, k, torch.Generator().manual_seed(1)), target)
    assert prepared.size_bytes() * 8 == pytest.approx(fmt.bits_per_weight(k, n) * n * k, abs=1e-6)


def test_columns_beyond_signed_numbers_and_rows_without_weights() -> None:
    fmt = parse_format("fp32-s99")
    weight = torch.zeros(19, 40000)
    weight[3, [0, 32767, 32768, 39999]] = torch.tensor([1.0, 2.0, 4.0, -8.0])
    weight[18, 39999] = 16.0
    prepared = Csr().prepare(fmt, {"weight": weight}, FP32)
    assert torch.equal(prepared.dequant(), weight)
    for m in (1, 2, 19, 33):
        x = _random(m, 40000)
        torch.testing.assert_close(prepared(x), x @ weight.T)
        assert not prepared(x)[:, 4:18].any()
    assert "above 65536" in str(Csr().supports(fmt, 16, 65552, 1, FP32))


def test_too_few_zeros_are_refused() -> None:
    fmt = parse_format("bf16-s90")
    payload = random_payload(fmt, 40, 192, torch.Generator().manual_seed(0))
    place = (payload["weight"] == 0).nonzero()[0]
    payload["weight"][place[0], place[1]] = 1.0
    with pytest.raises(ValueError, match=r"769 of 7680 weights are not zero; bf16-s90 has at most 768"):
        Csr().prepare(fmt, payload, TARGET)
    assert Csr().supports(parse_format("bf16-s89"), 40, 192, 1, TARGET) and Csr().supports(
        parse_format("bf16"), 40, 192, 1, TARGET
    )


def test_dense_kernels_run_zeros_and_no_factors() -> None:
    for kernel in (Dense(), Dense(prepacked=True)):
        assert kernel.supports(parse_format("bf16-s90"), 40, 192, 1, TARGET) is None
        assert "one matrix" in str(kernel.supports(parse_format("bf16-r64"), 40, 192, 1, TARGET))
    assert {entry.name for entry in supported(parse_format("bf16-r64"), 40, 192, 64, TARGET)} == {"low-rank"}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_tiles_hold_the_inputs_of_a_step_next_to_each_other(dtype: torch.dtype) -> None:
    factor = torch.arange(35 * 23).view(35, 23).to(dtype)
    tiles = tiled(factor)
    step = 2 if dtype == torch.bfloat16 else 1
    assert tiles.shape == (3, 32 // step, 16, step)
    assert torch.equal(tiles[1, 3, 5], factor[21, 3 * step : 4 * step])
    assert torch.equal(untiled(tiles)[:35, :23], factor) and not untiled(tiles)[35:].any() and not untiled(tiles)[:, 23:].any()


@pytest.mark.parametrize("rank", (1, 16, 37))
def test_both_ways_of_two_products_agree(rank: int) -> None:
    fmt = parse_format(f"bf16-r{rank}")
    payload = random_payload(fmt, 72, 192, torch.Generator().manual_seed(0))
    bias = _random(72)
    for m in (1, 2, 5, 16):
        x = _random(m, 192).to(TARGET.dtype)
        for kernel in (LowRank(), LowRankFused()):
            assert gate.check(kernel.prepare(fmt, payload, TARGET, bias, m=m), fmt, payload, x, bias) is None, (kernel.name, m)
    assert "at most 16 rows" in str(LowRankFused().supports(fmt, 72, 192, 17, TARGET))


@pytest.mark.parametrize("kernel", (LowRank(), LowRankFused()))
def test_factors_of_another_rank_are_refused(kernel: LowRank | LowRankFused) -> None:
    payload = random_payload(parse_format("bf16-r24"), 40, 192, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"bf16-r64: the factors have ranks 24 and 24; both have to be 64"):
        kernel.prepare(parse_format("bf16-r64"), payload, TARGET)


def test_a_sweep_times_them_next_to_the_dense_kernels(tmp_path: Path) -> None:
    table = LatencyTable(TARGET.fingerprint, TARGET.description)
    zeros, rank = (KernelKey("linear", name, 1, 64, 192) for name in ("bf16-s90", "bf16-r16"))
    assert not measure(TARGET, [zeros, rank], table, lock_folder=tmp_path)
    assert {"csr", "dense-prepacked", "dense"} == set(table.timings(zeros))
    assert {"low-rank", "low-rank-fused"} == set(table.timings(rank))


def _pruned(fmt: Format, weight: Tensor, site: Site) -> Compressed:
    least = weight.abs().flatten().argsort()[: weight.numel() - fmt.kept(*weight.shape)]
    kept = weight.detach().clone()
    kept.view(-1)[least] = 0
    return Compressed.of(fmt, {"weight": kept})


def _factorised(fmt: Format, weight: Tensor, site: Site) -> Compressed:
    down = _random(fmt.rank, weight.shape[1], seed=len(site.name)) / weight.shape[1] ** 0.5
    return Compressed.of(fmt, {"down": down, "up": _random(weight.shape[0], fmt.rank, seed=weight.shape[0])})


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tiny_tokens()).logits.float().clone()


@pytest.mark.parametrize(("name", "make"), (("fp32-s90", _pruned), ("fp32-r24", _factorised)))
def test_models_run_them_as_they_were_evaluated(name: str, make: Callable[[Format, Tensor, Site], Compressed]) -> None:
    model, fmt = tiny_model("llama"), parse_format(name)
    structure = describe(model, "fp32")
    edits = {
        site.name: Edit({layer.name: make(fmt, model.get_submodule(layer.name).weight, site) for layer in site.layers})
        for site in structure.sites
    }
    with Installer(model, structure) as installer:
        for site, edit in edits.items():
            installer.install(site, edit)
        expected = _logits(model)
    got = _logits(materialize(model, structure, edits, FP32))
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    assert float((expected - _logits(model)).norm() / expected.norm()) > 1e-2


def test_fused_layers_share_the_factor_that_reads_their_input() -> None:
    model, fmt = tiny_model("llama"), parse_format("fp32-r24")
    structure = describe(model, "fp32")
    site = structure.sites[0]
    linears = {
        layer.name: Compressed.of(fmt, {"down": _random(24, layer.d_in, seed=i), "up": _random(layer.d_out, 24)})
        for i, layer in enumerate(site.layers)
    }
    with pytest.raises(RuntimeRefusal, match="`down` factors of their own"):
        materialize(model, structure, {site.name: Edit(linears)}, FP32)


def test_what_low_rank_stands_for_is_the_product() -> None:
    payload = {"down": torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]]), "up": torch.tensor([[2.0, 0.0], [1.0, 4.0]])}
    assert decode(parse_format("fp32-r2"), payload).tolist() == [[2.0, 4.0, 6.0], [1.0, 6.0, -1.0]]
