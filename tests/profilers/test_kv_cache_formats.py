"""Cache formats where models are timed: the dense cache stays what it was, others are packed."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from methods.kv.cache import stored_bytes
from methods.kv.calibrate import calibrate
from methods.kv.format import parse_cache_format
from methods.model.describe import describe
from profilers.end_to_end import measure
from profilers.kv_cache import new_cache
from profilers.runtime import materialize
from profilers.steps import Step
from profilers.target import local_cpu
from profilers.workload import Workload
from tests.tiny import tiny_model, tiny_tokens

FP32 = replace(local_cpu(1), compute_dtype="fp32")


def kinds(cache: Any) -> set[str]:
    return {type(layer).__name__ for layer in cache.layers}


def test_the_models_own_dtype_is_the_dense_cache() -> None:
    model = tiny_model("gemma3")
    for fmt in (None, parse_cache_format("kv-fp32")):
        assert kinds(new_cache(model, fmt)) == {"GrowingLayer", "DynamicSlidingWindowLayer"}
    for name in ("kv-bf16", "kv-int8"):
        assert kinds(new_cache(model, parse_cache_format(name))) == {"PackedLayer", "PackedSlidingLayer"}
    calibrated = parse_cache_format("kv-fp8-head")
    made = new_cache(model, calibrated, calibrate(model, calibrated, tiny_tokens(1, 9)))
    assert kinds(made) == {"PackedLayer", "PackedSlidingLayer"}


def test_the_dense_cache_grows_on_the_device_of_its_tokens() -> None:
    model, cache = tiny_model("llama"), new_cache(tiny_model("llama"))
    model(input_ids=tiny_tokens(2, 5), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape == (2, 3, 5, 16) and cache.layers[0].keys.device == model.device
    # Room for more is part of what it takes.
    assert stored_bytes(cache) == 3 * 2 * 2 * 3 * (5 + 256) * 16 * 4


def test_models_on_kernels_decode_with_a_packed_cache() -> None:
    model = tiny_model("llama")
    ours = materialize(model, describe(model, "fp32"), {}, FP32)
    tokens, fmt = tiny_tokens(2, 20), parse_cache_format("kv-int4-g8")
    results = []
    with torch.inference_mode():
        for each in (model, ours):
            cache = new_cache(each, fmt)
            pieces = [each(input_ids=p, past_key_values=cache, use_cache=True).logits for p in tokens.split([9, 1, 1, 9], 1)]
            results.append(torch.cat(pieces, 1))
    assert (results[0] - results[1]).abs().max() < 0.02 * results[0].abs().max()


def test_a_timed_step_leaves_the_packed_cache_as_it_was() -> None:
    model = tiny_model("llama")
    make = functools.partial(new_cache, fmt=parse_cache_format("kv-kivi2-g8-w16"))
    with torch.inference_mode():
        step = Step(model, Workload(context=23), make_cache=make)
        before = stored_bytes(step._cache)
        first = step()
        assert step._cache.get_seq_length() == 24
        step.reset()
        assert step._cache.get_seq_length() == 23 and stored_bytes(step._cache) == before
        assert torch.equal(step(), first)


def test_models_are_timed_with_their_caches() -> None:
    model, seen = tiny_model("llama"), []

    def make(given: Any) -> Any:
        seen.append(given)
        return new_cache(given, parse_cache_format("kv-int8"))

    found = measure({"a": model, "b": model}, Workload(context=9), FP32, make_caches={"b": make}, rounds=2, min_rounds=1)
    assert found.keys() == {"a", "b"} and seen == [model]
