"""What stands beside the grid, against loops that decode it element by element."""

import pytest
import torch

from methods.formats.format import parse_format
from methods.formats.numerics import decode, payload_bits
from methods.formats.sides import (
    abfloat,
    columns,
    elements,
    low_rank,
    pairs,
    plain,
    residual,
    with_sides,
)
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest

FMT = parse_format("w4a16-g16")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return nearest(weight, FMT, minmax(weight, FMT))


def test_elements_replace_what_the_grid_has() -> None:
    weight = random(5, 48, seed=0)
    kept = random(5, 48, seed=1) > 1.2
    kept[3] = False
    payload = grid_of(weight)
    assert plain(payload) and not plain({**payload, **elements(weight, kept)})
    dense, expected = decode(FMT, {**payload, **elements(weight, kept)}), decode(FMT, payload).clone()
    for row in range(5):
        for column in range(48):
            if kept[row, column]:
                expected[row, column] = float(weight[row, column].bfloat16())
    assert torch.equal(dense, expected) and 3 < kept.sum() < 60
    assert payload_bits(FMT, elements(weight, kept)) == 32 * int(kept.sum()) + 16 * 5


def test_elements_of_a_wide_weight_count_in_32_bits() -> None:
    kept = torch.zeros(2, 2**15 + 16, dtype=torch.bool)
    kept[1, -1] = True
    parts = elements(torch.ones(kept.shape), kept)
    assert parts["elements.column"].tolist() == [2**15 + 15] and parts["elements.column"].dtype == torch.int32


def test_columns_replace_and_low_rank_adds() -> None:
    weight, index = random(6, 32, seed=2), torch.tensor([30, 4])
    left, right = random(6, 2, seed=3), random(2, 32, seed=4)
    payload = grid_of(weight)
    expected = decode(FMT, payload).clone()
    for column in index.tolist():
        expected[:, column] = weight[:, column].bfloat16()
    expected = (expected.double() + left.bfloat16().double() @ right.bfloat16().double()).float()
    assert torch.equal(decode(FMT, {**payload, **columns(weight, index), **low_rank(left, right)}), expected)


def test_further_terms_are_added_to_their_rows() -> None:
    weight = random(6, 32, seed=5)
    payload, first, second = grid_of(weight), grid_of(random(2, 32, seed=6)), grid_of(random(6, 32, seed=7))
    some, every = torch.tensor([1, 4]), torch.arange(6)
    sides = {**residual(1, some, first, 4), **residual(2, every, second, 4)}
    expected = decode(FMT, payload).clone()
    for place, row in enumerate(some.tolist()):
        expected[row] += decode(FMT, first)[place]
    expected += decode(FMT, second)
    assert torch.equal(decode(FMT, {**payload, **sides}), expected)
    assert payload_bits(FMT, sides) == payload_bits(FMT, first) + payload_bits(FMT, second) + 32 * 8


def test_kept_elements_replace_further_terms() -> None:
    weight, kept = random(3, 16, seed=8), torch.zeros(3, 16, dtype=torch.bool)
    kept[2, 5] = True
    sides = {**residual(1, torch.arange(3), grid_of(weight), 4), **elements(weight, kept)}
    assert decode(FMT, {**grid_of(weight), **sides})[2, 5] == weight[2, 5].bfloat16()


@pytest.mark.parametrize(("code", "steps"), [(1, 12.0), (2, 16.0), (3, 24.0), (6, 64.0), (7, 96.0), (9, -12.0), (15, -96.0)])
def test_abfloat_by_hand(code: int, steps: float) -> None:
    assert abfloat(torch.tensor([code], dtype=torch.uint8)).item() == steps


def test_pairs_share_their_codes() -> None:
    codes = torch.full((2, 32), 8, dtype=torch.uint8)
    codes[0, :6] = torch.tensor([0, 3, 15, 0, 9, 1])
    codes[1, 30:] = torch.tensor([0, 9])
    scale = torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.bfloat16)
    dense = decode(FMT, {"codes": codes, "scale": scale, **pairs()})
    assert dense[0, :6].tolist() == [0.0, 12.0, -48.0, 0.0, 0.5, -3.5]
    assert dense[1, 30:].tolist() == [0.0, -3.0]
    assert int((dense != 0).sum()) == 5


def test_what_the_grid_decoded_to_is_left_alone() -> None:
    weight, kept = random(3, 16, seed=9), torch.eye(3, 16, dtype=torch.bool)
    dense = weight.clone()
    sides = {
        **elements(weight + 1, kept),
        **columns(weight + 1, torch.tensor([7])),
        **residual(1, torch.arange(3), grid_of(weight), 4),
    }
    assert not torch.equal(with_sides(dense, sides), weight)
    assert torch.equal(dense, weight)
