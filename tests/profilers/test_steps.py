"""Steps on a cache of fixed length, and whole models timed on a device that is none: what runs on CUDA, but for CUDA itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.kv.format import parse_cache_format
from methods.model.describe import describe
from profilers import cuda_timer, end_to_end
from profilers.clocks import Clocks
from profilers.kv_cache import fixed_cache, new_cache
from profilers.runtime import materialize
from profilers.steps import FixedStep, Step, _last_logits, once
from profilers.target import local_cpu, local_cuda
from profilers.workload import Workload
from search.generate import continued, generate
from tests.profilers.machines import GPU, FakeDevice
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

STEADY = Clocks(1000.0)
DECODE = Workload("decode", batch=2, context=12)


class Uncapturable(FakeDevice):
    """As a step that waits for the device in its middle finds it."""

    def captured(self, calls: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nlong advice")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_on_a_fixed_cache_says_what_the_growing_one_says_again_and_again(arch: str) -> None:
    """Sliding windows of 8 tokens are passed: contexts are below, at and above them."""
    model = tiny_model(arch)
    with torch.inference_mode():
        for context in (5, 7, 8, 21):
            workload = replace(DECODE, context=context)
            fixed = FixedStep.of(model, workload)
            expected = Step(model, workload)()
            first = fixed().clone()
            assert torch.equal(first, expected) and torch.equal(fixed(), expected)
            logits, grown = (_last_logits(model, fixed.token, cache) for cache in (fixed.cache, Step(model, workload)._cache))
            assert torch.allclose(logits, grown, atol=1e-4)


def test_its_cache_is_read_up_to_its_place_and_never_moves() -> None:
    model = tiny_model("mistral")
    with torch.inference_mode():
        step = FixedStep.of(model, DECODE)
        layers = step.cache.layers
        where = [layer.keys.data_ptr() for layer in layers]
        before = [layer.keys[:, :, :12].clone() for layer in layers]
        first = step().clone()
        for layer in layers:
            layer.keys[:, :, 12] = 50.0  # what lies behind the place is written before it is read
        assert torch.equal(step(), first) and int(step.place) == 12 == int(step.cache.get_seq_length())
        assert all(torch.equal(layer.keys[:, :, :12], keys) for layer, keys in zip(layers, before, strict=True))
        assert where == [layer.keys.data_ptr() for layer in layers]
        with pytest.raises(ValueError, match="the cache is full"):
            step.advance()
        with pytest.raises(ValueError, match="no room"):
            FixedStep(model, tiny_tokens(1, 9), 9)


@pytest.mark.parametrize("arch", ("llama", "gemma3", "opt"))
def test_text_written_by_replays_is_the_models(arch: str) -> None:
    model = tiny_model(arch)
    prompt = tiny_tokens(1, 6)
    expected = model.generate(prompt, do_sample=False, max_new_tokens=9, min_new_tokens=9)[0, 6:].tolist()
    with torch.inference_mode():
        for device in (FakeDevice([]), Uncapturable([]), None):
            plain = [int(model(input_ids=prompt).logits[0, -1].argmax())]
            assert list(continued(model, prompt, 1, device=device)) == plain
        replayed = list(continued(model, prompt, 9, device=FakeDevice([])))
        assert replayed == list(continued(model, prompt, 9)) and len(replayed) == 9
        packed = parse_cache_format("kv-fp32")
        assert list(continued(model, prompt, 9, packed, FakeDevice([]))) == replayed
    if 2 not in replayed:  # transformers keeps the end's token from being said
        assert replayed == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_writing_on_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuda: not here"):
        generate(tmp_path, "Once", 2, None, "cuda")


def test_models_that_cache_something_else_are_refused() -> None:
    class Odd:
        def __init__(self) -> None:
            self.config = tiny_model("llama").config
            self.config.layer_types = ["linear_attention"] * 3

        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(2, 2)

    with pytest.raises(ValueError, match="holds more than keys and values"):
        fixed_cache(Odd(), 8)


@pytest.mark.parametrize("workload", (DECODE, Workload("prefill", prompt=20)))
def test_whole_models_on_a_device_take_turns(workload: Workload) -> None:
    models = {"a": tiny_model("llama"), "b": tiny_model("gemma3")}
    device, told = FakeDevice([STEADY] * 2), []
    found = end_to_end.measure(
        models, workload, GPU, rounds=5, device=device, progress=lambda done, of: told.append((done, of))
    )
    decodes = workload.phase == "decode"
    assert told == [(turn, 5) for turn in range(5)] and device.captures == (2 if decodes else 0)
    for run in found.values():
        assert len(run.samples.all) == 5 * (end_to_end.BURST if decodes else 1)
        assert [sample.turn for sample in run.samples.all] == list(range(len(run.samples.all)))
        assert run.median_ms == pytest.approx(1.0) and run.how == ("graph" if decodes else "events") and not run.why
    assert found["a"].ratio_to(found["b"]).mid == pytest.approx(1.0)
    assert found["a"].minus(found["b"]) == pytest.approx((0.0, 0.0, 0.0))


def test_a_step_that_cannot_be_captured_is_timed_as_it_is_and_says_so() -> None:
    made = []

    def packed(model: Any) -> Any:
        made.append(model)
        return new_cache(model, parse_cache_format("kv-int8"))

    models = {"dense": tiny_model("llama"), "packed": tiny_model("llama")}
    device, said = Uncapturable([STEADY] * 2), []
    found = end_to_end.measure(models, DECODE, GPU, rounds=2, device=device, make_caches={"packed": packed}, notify=said.append)
    assert made == [models["packed"]]
    why = "CUDA error: operation not permitted when stream is capturing"
    assert said == [f"2 of 2 models decode without a CUDA graph, timed with their launches ({why})"]
    for run in found.values():
        assert run.how == "events" and run.why == why
    hot = end_to_end.measure(models, DECODE, GPU, rounds=2, device=FakeDevice([STEADY, Clocks(800.0)] * 2))
    assert all(run.contended for run in hot.values())


def test_memory_that_is_short_is_no_reason_to_go_on() -> None:
    class Full(FakeDevice):
        def captured(self, calls: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        cuda_timer.captured(lambda: None, Full([]))


class Ticking:
    """A second of wall time passes at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def wall(self) -> float:
        self.now += 1.0
        return self.now

    def cpu(self) -> float:
        return self.now

    def switches(self) -> int:
        return 0


def test_a_budget_ends_the_turns_on_a_device_too() -> None:
    models = {"a": tiny_model("llama")}
    found = end_to_end.measure(
        models, DECODE, GPU, rounds=50, min_rounds=3, budget_s=4.5, device=FakeDevice([STEADY] * 2), clock=Ticking()
    )
    assert len(found["a"].samples.all) == 7 * end_to_end.BURST


def test_a_failed_step_leaves_the_growing_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        step = Step(materialize(model, describe(model), {}, local_cpu(1)), DECODE)
        first = once(step)
        monkeypatch.setattr(step.model.lm_head, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            once(step)
        monkeypatch.undo()
        assert step._cache.get_seq_length() == 12 and torch.equal(once(step), first)


@pytest.mark.gpu
def test_a_whole_model_on_a_gpu_is_a_graph_that_says_the_same() -> None:
    target = local_cuda()
    assert target is not None
    model = tiny_model("llama")
    ours = materialize(model, describe(model), {}, target)
    found = end_to_end.measure({"dense": ours}, DECODE, target, rounds=4)
    assert found["dense"].how == "graph", found["dense"].why
    prompt = tiny_tokens(1, 6).cuda()
    with torch.inference_mode():
        replayed = list(continued(ours, prompt, 9, device=cuda_timer.CudaDevice(target)))
        assert replayed == list(continued(ours, prompt, 9))
