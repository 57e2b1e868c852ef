"""What a cache format costs in quality: text read through the cache a few tokens at a time, against the dense cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheQuality:
    """Nats per token, one entry a sequence: divergence from the model with a dense cache, its own and that one's likelihood.

    size_bytes: measured memory of the cache at the end of the last sequence. n_tokens: predictions counted in all.
    """

    kl_each: tuple[float, ...]
    nll_each: tuple[float, ...]
    dense_nll_each: tuple[float, ...]
    size_bytes: int
    n_tokens: int

    @property
    def kl(self) -> float:
        """Mean KL divergence from the dense cache, nats per token."""
        return sum(self.kl_each) / len(self.kl_each)

    @property
    def nll_rise(self) -> float:
        """Mean rise of the negative log-likelihood, nats per token."""
        return (sum(self.nll_each) - sum(self.dense_nll_each)) / len(self.nll_each)


@torch.inference_mode()
def evaluate(
    model: Any,
    tokens: Tensor,
    caches: Mapping[str, Callable[[], Any]],
    *,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, CacheQuality]:
    """Quality of several caches on tokens (n_sequences, length), all read side by side; caches: how each is made, by name.

    A call reads `chunk` tokens, which see each other in full precision and everything before them as it is stored: 1 is decoding token
    by token, larger is faster and flatters formats without a window. Predictions of the first chunk are not counted.
    """
    from methods.kv.cache import stored_bytes

    n, length = tokens.shape
    if not 1 <= chunk < length:
        raise ValueError(f"cache quality: chunk={chunk} of {length} tokens; use 1 to {length - 1}")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in caches}
    sizes = dict.fromkeys(caches, 0)
    for index in range(n):
        made = {name: make() for name, make in caches.items()}
        for name, row in _sequence(model, tokens[index : index + 1], made, chunk).items():
            found[name].append(row)
            sizes[name] = stored_bytes(made[name])
        if progress:
            progress(index + 1, n)
    return {name: _quality(rows, sizes[name], n * (length - 1 - chunk)) for name, rows in found.items()}


def _quality(rows: Sequence[tuple[float, float, float]], size_bytes: int, n_tokens: int) -> CacheQuality:
    kl, nll, dense_nll = zip(*rows, strict=True)
    return CacheQuality(kl, nll, dense_nll, size_bytes, n_tokens)


def _sequence(model: Any, ids: Tensor, caches: Mapping[str, Any], chunk: int) -> dict[str, tuple[float, float, float]]:
    from transformers import DynamicCache

    reference = DynamicCache(config=model.config)
    sums = {name: [0.0, 0.0, 0.0] for name in caches}
    count = 0
    for start in range(0, ids.shape[1], chunk):
        piece, targets = ids[:, start : start + chunk], ids[0, start + 1 : start + chunk + 1]
        dense = _log_probabilities(model, piece, reference)[: len(targets)]
        for name, cache in caches.items():
            own = _log_probabilities(model, piece, cache)[: len(targets)]
            if start:
                kl = (dense.exp() * (dense - own)).sum(-1)
                rows = kl, *(-x.gather(-1, targets[:, None])[:, 0] for x in (own, dense))
                sums[name] = [total + float(row.double().sum()) for total, row in zip(sums[name], rows, strict=True)]
        count += len(targets) if start else 0
    assert count and all(math.isfinite(total) for row in sums.values() for total in row)
    return {name: (row[0] / count, row[1] / count, row[2] / count) for name, row in sums.items()}


def _log_probabilities(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits[0].float().log_softmax(-1)
