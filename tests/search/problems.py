"""Random small problems for the tests of the allocators."""

from itertools import product

import numpy as np

from methods.policy import Decision
from search.strategies.problem import Problem


def problem(seed: int, n_sites: int = 5, n_choices: int = 4, *, ties: bool = False) -> Problem:
    """Random costs without any order; with `ties`, small whole numbers."""
    g = np.random.default_rng(seed)
    sites = tuple(f"site{i}" for i in range(n_sites))
    counts = [n_choices - i % 2 for i in range(n_sites)]
    choices = tuple(tuple(Decision.of("rtn", bits=j) for j in range(n)) for n in counts)

    def column(scale: float) -> tuple[np.ndarray, ...]:
        if ties:
            return tuple(g.integers(0, 4, n).astype(float) for n in counts)
        return tuple(np.exp(g.normal(0, 1, n)) * scale for n in counts)

    return Problem(sites, choices, column(1e-3), column(0.05), column(1e5))


def every(p: Problem) -> list[tuple[tuple[int, ...], tuple[float, float, float]]]:
    """All policies with their totals: the obvious solver."""
    return [(indices, p.totals(indices)) for indices in product(*(range(len(c)) for c in p.choices))]


def middle(p: Problem, share: float = 0.4) -> float:
    """A budget between the fastest and the slowest total."""
    return p.fastest_ms + share * (p.slowest_ms - p.fastest_ms)
