"""Output projections that a GGUF stores apart from the embedding though they are the same matrix, rounded to another grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from methods.model.baseline import BLOCK, bits_of
from methods.model.gguf_header import Header

FLOAT_BITS = {"BF16": 8, "F16": 11, "F32": 24}
"""Significant bits of a float type."""

EQUAL = 0.9
"""Share of weights that must lie within the two roundings; a quantiser that fits its scales cuts off the rest, the blocks' extremes."""

ROWS = 4096
"""Rows compared at a time."""


def tie_again_(model: Any, header: Header) -> str | None:
    """Ties a head to the embedding that it equals within their grids, in place; says so, None where there is nothing to tie.

    Both become the finer of the two, which is nearer to the matrix that they were rounded from.
    """
    stored = [header.tensors.get(name) for name in ("token_embd.weight", "output.weight")]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if stored[0] is None or stored[1] is None or embedding.weight.shape != head.weight.shape or head.bias is not None:
        return None
    kinds = stored[0].kind, stored[1].kind
    if not equal_within_grids(embedding.weight, head.weight, kinds):
        return None
    if _fineness(kinds[1]) > _fineness(kinds[0]):
        embedding.weight.data = head.weight.data
    head.weight = embedding.weight
    model.config.tie_word_embeddings = True
    return (
        f"the file holds the embedding ({kinds[0]}) and the output projection ({kinds[1]}) apart, equal within their rounding: they were "
        f"tied again, to the finer of the two, or {head.weight.numel():,} parameters would be counted twice"
    )


def equal_within_grids(first: Tensor, second: Tensor, kinds: tuple[str, str]) -> bool:
    """Whether two matrices (n, d) can be roundings of one; kinds: the types that they were stored in."""
    within = 0
    for start in range(0, len(first), ROWS):
        a, b = first[start : start + ROWS].double(), second[start : start + ROWS].double()
        within += int(((a - b).abs() <= 1.02 * (_half_step(a, kinds[0]) + _half_step(b, kinds[1]))).sum())
        if within < EQUAL / 2 * first[: start + ROWS].numel():
            return False
    return within >= EQUAL * first.numel()


def _half_step(weight: Tensor, kind: str) -> Tensor:
    """Half the distance of neighbouring values about each weight (n, d), for a uniform grid over each block."""
    bits = FLOAT_BITS.get(kind)
    if bits is not None:
        half: Tensor = weight.abs() / 2**bits
        return half
    width = BLOCK if weight.shape[1] % BLOCK == 0 else weight.shape[1]
    blocks = weight.reshape(len(weight), -1, width)
    span = blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)
    steps: float = 2 ** bits_of(kind) - 1
    return (span / steps / 2).expand_as(blocks).reshape(weight.shape)


def _fineness(kind: str) -> int:
    return FLOAT_BITS.get(kind) or bits_of(kind)
