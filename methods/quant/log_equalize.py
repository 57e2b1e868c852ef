"""Transform `log-equalize`: brings the inputs to sizes that differ as their logarithms did."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def log_equalize(abs_max: Tensor) -> Tensor:
    """s_j = max|x_j| / log2(2 + max|x_j|), by which input j is divided and column j multiplied; 1 where an input is always zero.

    abs_max: (d_in,) -> (d_in,), positive. The largest value of an input becomes log2(2 + max|x_j|), 1 at least.
    FPTQ (Li 2023), the logarithmic activation equalisation.
    """
    scale = abs_max / (2 + abs_max).log2()
    return scale.where(abs_max > 0, scale.new_ones(()))


def input_rule(largest: float, quiet: float = 15.0, loud: float = 150.0) -> Literal["static", "equalised", "token"]:
    """How the inputs of a site are to be rounded, from the largest magnitude of them all.

    Up to `quiet` with one static scale; between the two also with one, behind `log_equalize`; from `loud` on with one scale a token.
    FPTQ (Li 2023).
    """
    if largest <= quiet:
        return "static"
    return "equalised" if largest < loud else "token"
