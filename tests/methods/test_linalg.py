"""The running sum of `x^T x` against the product of all rows at once."""

import pytest
import torch

from methods.linalg import Gram


@pytest.mark.parametrize("d", [5, 144, 300])
def test_gram_is_the_product_of_all_rows(monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    monkeypatch.setattr("methods.linalg._ROWS", 50)
    x = torch.randn(170, d, generator=torch.Generator().manual_seed(d)) + 0.5
    gram = Gram(d)
    for rows in torch.split(x, [1, 20, 100, 49]):
        gram.add(rows)
    found = gram.mean(170)
    exact = x.double().T @ x.double() / 170
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    gram.add(x)
    torch.testing.assert_close(gram.mean(340).double(), exact, rtol=1e-5, atol=1e-6)


def test_many_small_batches_lose_nothing_to_a_large_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one: in fp32 alone the sum would stop growing at 2**24."""
    monkeypatch.setattr("methods.linalg._ROWS", 4)
    gram = Gram(1)
    gram.add(torch.full((4, 1), 4096.0))
    for _ in range(100):
        gram.add(torch.ones(4, 1))
    assert gram.mean(1).item() == 4 * 4096.0**2 + 400


def test_gram_leaves_the_batch_alone() -> None:
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    before, gram = x.clone(), Gram(7)
    gram.add(x)
    gram.mean(9)
    assert torch.equal(x, before)
