"""Work that is shared out gives what it gives alone, in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from methods.threads import shared_out, workers


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_items", "at_once", "each"), [(1, 1, 4), (2, 2, 2), (3, 3, 1), (9, 4, 1)])
def test_threads_are_divided_between_the_items_at_hand(four_threads: None, n_items: int, at_once: int, each: int) -> None:
    assert workers(n_items) == at_once
    found = list(shared_out(lambda item: (item, torch.get_num_threads()), range(n_items)))
    assert found == [(item, each) for item in range(n_items)]
    assert torch.get_num_threads() == 4


def test_an_error_is_raised_in_its_place_and_nothing_more_begins(four_threads: None) -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ValueError("one")
        return item

    results = shared_out(work, range(400))
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        next(results)
    assert len(begun) < 400 and torch.get_num_threads() == 4


def test_nothing_is_nothing(four_threads: None) -> None:
    assert list(shared_out(lambda item: item, [])) == []
