"""The evaluation of cache formats against a plain loop."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

from methods.kv.cache import new_cache
from methods.kv.format import parse_cache_format
from methods.kv.quality import evaluate
from methods.model.describe import describe
from tests.tiny import tiny_model, tiny_tokens


def test_divergence_and_likelihood_against_a_loop() -> None:
    model, tokens, fmt = tiny_model("llama"), tiny_tokens(2, 12), parse_cache_format("kv-int2")
    found = evaluate(model, tokens, {"int2": functools.partial(new_cache, model, fmt)}, chunk=1)["int2"]
    for row in range(2):
        dense = model(input_ids=tokens[row : row + 1]).logits[0].log_softmax(-1)
        cache, kl, nll = new_cache(model, fmt), [], []
        for place in range(12):
            out = model(input_ids=tokens[row : row + 1, place : place + 1], past_key_values=cache, use_cache=True)
            own = out.logits[0, 0].log_softmax(-1)
            kl.append(float((dense[place].exp() * (dense[place] - own)).sum()))
            nll.append(-float(own[tokens[row, place + 1]]) if place < 11 else 0.0)
        assert found.kl_each[row] == pytest.approx(sum(kl[1:11]) / 10, abs=1e-5)
        assert found.nll_each[row] == pytest.approx(sum(nll[1:11]) / 10, abs=1e-4)
    assert found.n_tokens == 20 and found.kl > 1e-3
    assert found.size_bytes == fmt.size_bytes(describe(model, "fp32"), 1, 12)


def test_the_dense_cache_costs_nothing() -> None:
    model = tiny_model("gemma2")
    found = evaluate(model, tiny_tokens(2, 22), {"dense": lambda: DynamicCache(config=model.config)}, chunk=5)["dense"]
    assert found.kl == 0 and found.nll_rise == 0 and found.n_tokens == 2 * 16


def test_larger_chunks_flatter_a_format_without_window() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 40)
    make = {"int2": functools.partial(new_cache, model, parse_cache_format("kv-int2"))}
    assert evaluate(model, tokens, make, chunk=20)["int2"].kl < evaluate(model, tokens, make, chunk=1)["int2"].kl


def test_a_chunk_is_shorter_than_the_text() -> None:
    with pytest.raises(ValueError, match="chunk=8"):
        evaluate(tiny_model("llama"), torch.ones(1, 8, dtype=torch.long), {}, chunk=8)
