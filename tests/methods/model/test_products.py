"""Fast linears are torch's, but for the rounding of sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from methods.model import products

HERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a processor where oneDNN is faster; counts its products."""
    if not HERE:
        pytest.skip("this torch has no oneDNN")
    count: list[int] = []
    own = products._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        count.append(1)
        return own(x, weight, bias)

    monkeypatch.setattr(products, "_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", counted)
    return count


def test_linears_take_the_fast_product_inside_the_context_alone(fast: list[int]) -> None:
    layer, x = nn.Linear(24, 16), torch.randn(2, 5, 24)
    with torch.no_grad():
        wanted = layer(x)
        assert not fast
        with products.fast_linears():
            found = layer(x)
        assert len(fast) == 1
        layer(x)
    assert len(fast) == 1
    torch.testing.assert_close(found, wanted)


def test_gradients_are_those_of_torch(fast: list[int]) -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 24), (16, 24), (16,)))

    def gradients() -> tuple[Tensor, ...]:
        out = nn.functional.linear(x, weight, bias)
        return torch.autograd.grad(out.square().mean(), [x, weight, bias])

    wanted = gradients()
    with products.fast_linears():
        found = gradients()
    assert len(fast) == 3  # forward, and one each for the inputs and the weight
    torch.testing.assert_close(found, wanted)


def test_second_derivatives_go_through(fast: list[int]) -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def twice() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(nn.functional.linear(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)

    wanted = twice()
    with products.fast_linears():
        found = twice()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cut", [lambda x: x.T.contiguous().T, lambda x: x[:, 3:20], lambda x: x[:, ::2], lambda x: x[::2]])
def test_any_strides(fast: list[int], cut: Callable[[Tensor], Tensor]) -> None:
    x, weight = cut(torch.randn(40, 40)), cut(torch.randn(24, 40))
    torch.testing.assert_close(products.product(x, weight), x @ weight.T)
    assert fast


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)),
        (torch.ones(8), torch.ones(4, 8)),
        (torch.ones(0, 8), torch.ones(4, 8)),
    ],
)
def test_what_it_does_not_fit_is_left_to_torch(fast: list[int], x: Tensor, weight: Tensor) -> None:
    with torch.no_grad(), products.fast_linears():
        assert torch.equal(nn.functional.linear(x, weight), x @ weight.T)
    assert not fast
