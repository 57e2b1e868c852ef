"""What an export predicts is compared token by token: equal mean losses do not hide other predictions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from search.export.gguf_verify import _agreement
from search.export.verification import EXACT, ROUNDED, UNJUDGED, Verification, agreement, compare, nll, predictions
from tests.tiny import tiny_model, tiny_tokens

IDS = tiny_tokens(2, 24)


def logits(seed: int, rows: int = 300) -> torch.Tensor:
    return torch.randn(1, rows, 50, generator=torch.Generator().manual_seed(seed))


def test_agreement_by_hand() -> None:
    p, q = logits(0), logits(1)
    kl, top1 = agreement(p, q)
    expected = kl_div(q[0].double().log_softmax(-1), p[0].double().log_softmax(-1), reduction="batchmean", log_target=True)
    assert kl == pytest.approx(float(expected), rel=1e-9)
    assert top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert agreement(p, p) == (0.0, 1.0)
    assert agreement(p, q * float("nan"))[0] == math.inf


def test_predictions_of_what_follows() -> None:
    model = tiny_model("llama")
    found = predictions(model, IDS)
    assert found.shape == (2, 23, 128)
    assert nll(found, IDS) == pytest.approx(
        float(cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    )


def test_equal_losses_hide_nothing(tmp_path: Path) -> None:
    """Two tokens that the text does not hold change places in the head: the weights as they are compared and the loss are the same."""
    reference, other = tiny_model("llama-untied"), tiny_model("llama-untied")
    free = [token for token in range(128) if token not in IDS][:2]
    head = other.get_output_embeddings().weight
    head.data[free] = head.data[free[::-1]]
    weights = dict(reference.state_dict())

    def loaded(_: Path) -> tuple[object, dict[str, list[str]]]:
        return other, {"missing_keys": [], "unexpected_keys": []}

    found = compare(tmp_path, reference, IDS, [], EXACT, loaded, lambda _: weights)
    assert found.max_weight_diff == 0.0 and abs(found.nll_loaded - found.nll_reference) < 1e-5
    assert not found.ok and "KL" in found.message and found.kl > 1e-3
    assert compare(tmp_path, reference, IDS, [], UNJUDGED, loaded, lambda _: weights).ok
    same = compare(tmp_path, reference, IDS, [], EXACT, lambda _: (reference, loaded(tmp_path)[1]), lambda _: weights)
    assert same.ok and same.kl < 1e-9 and same.top1 == 1.0
    assert EXACT.kl < ROUNDED.kl


def test_the_summary_says_it() -> None:
    words = Verification(0.0, 4.5, 4.5, 3, True, "", kl=0.0047, top1=0.96).summary
    assert "KL 0.0047 nats per token" in words and "same likeliest token at 96.0%" in words


def test_llama_cpp_is_compared_over_the_tokens_that_it_tells() -> None:
    p, q = logits(2, 4)[0], logits(3, 4)[0]
    log_q = q.double().log_softmax(-1)
    whole = [dict(enumerate(row.tolist())) for row in log_q]
    kl, top1 = _agreement(p, whole)
    assert (kl, top1) == (pytest.approx(agreement(p[None], q[None])[0], rel=1e-6), agreement(p[None], q[None])[1])
    told = [{int(k): float(row[k]) for k in row.topk(10).indices} for row in log_q]
    assert 0 < _agreement(p, told)[0] < kl and _agreement(p, told)[1] == top1
