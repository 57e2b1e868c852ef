"""Hadamard matrices and random rotations: orthogonal, of one size, and the fast transform is the slow product."""

import pytest
import torch

from methods.hadamard import (
    block_transform,
    hadamard,
    hadamard_factors,
    random_hadamard,
    random_orthogonal,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 60, 64, 96, 144, 240])
def test_is_orthogonal_with_entries_of_one_size(n: int) -> None:
    matrix = hadamard(n)
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-12
    assert (matrix.abs() - n**-0.5).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("n", "factors"), [(576, (36, 16)), (1536, (12, 128)), (896, (28, 32)), (128, (1, 128)), (960, (60, 16))]
)
def test_widths_of_models_have_one(n: int, factors: tuple[int, int]) -> None:
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", [3, 6, 22, 43 * 16])
def test_orders_without_one_are_refused(n: int) -> None:
    assert hadamard_factors(n) is None
    with pytest.raises(ValueError, match=f"no matrix of order {n}"):
        hadamard(n)


@pytest.mark.parametrize(("n", "block"), [(96, 16), (144, 48), (108, 36), (60, 20), (64, 64), (12, 1)])
def test_the_fast_transform_is_the_product_with_blocks(n: int, block: int) -> None:
    x = torch.randn(2, 5, n, generator=generator(), dtype=torch.float64)
    matrix = torch.block_diag(*[hadamard(block)] * (n // block))
    assert (block_transform(x, block) - x @ matrix.T).abs().max() < 1e-12
    assert (block_transform(x, block, inverse=True) - x @ matrix).abs().max() < 1e-12
    assert (block_transform(block_transform(x, block), block, inverse=True) - x).abs().max() < 1e-12


@pytest.mark.parametrize("block", [32, 22])
def test_blocks_have_to_divide_and_to_exist(block: int) -> None:
    with pytest.raises(ValueError, match=f"blocks of {block}"):
        block_transform(torch.zeros(3, 44), block)


@pytest.mark.parametrize("n", [96, 576, 43 * 4])
def test_random_hadamards_are_orthogonal_seeded_and_spread_an_outlier(n: int) -> None:
    one, same, other = (random_hadamard(n, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one @ one.T - torch.eye(n)).abs().max() < 1e-12
    assert one[3].abs().max() < 0.7  # A single channel of size 1 is spread over all of them.


def test_random_rotations_are_uniform() -> None:
    q = random_orthogonal(30, generator())
    assert (q.T @ q - torch.eye(30)).abs().max() < 1e-12
    # Without the correction by the signs of R, LAPACK's diagonal would all be of one sign.
    signs = torch.stack([random_orthogonal(3, generator(seed)).diagonal().sign() for seed in range(60)])
    assert 0.2 < float((signs > 0).double().mean()) < 0.8
