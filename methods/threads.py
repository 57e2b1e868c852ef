"""Shares independent pieces of work out between the threads that torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def workers(n_items: int) -> int:
    """How many items `shared_out` works on at once."""
    return max(1, min(torch.get_num_threads(), n_items))


def shared_out(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work(item)` of every item, in order, several items at once; torch's threads are divided between them.

    Pieces that are computed alone never wait for each other, which threads that share every single operation do thousands of times, and
    most of the time where something else runs on the machine. What `work` raises is raised here, and no further item begins.
    """
    n = torch.get_num_threads()
    at_once = workers(len(items))
    if at_once == 1:
        yield from map(work, items)
        return
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(n // at_once,)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(n)  # the number that threads which are yet to come begin with
