"""What a payload may hold beside the grid: elements and columns kept in 16 bits, low-rank corrections, rotations to be undone.

Each side is a few payload parts named `side.part`; `with_sides` applies all that are there, in a fixed order. The arithmetic is in
fp64 where it adds up, so that the fp32 result does not depend on how a product was split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.packing import pack, unpack
from methods.formats.turns import is_turned, turned_back

Payload = Mapping[str, Tensor]

SIDE_DTYPE = torch.bfloat16
"""Values beside the grid are stored in bf16, as scales are."""


def plain(payload: Payload) -> bool:
    """Whether there is nothing beside the grid, so that a kernel of the format runs the whole weight."""
    return not any("." in part for part in payload)


def with_sides(dense: Tensor, payload: Payload) -> Tensor:
    """The weight (d_out, d_in) fp32 that a payload stands for, from what its grid decodes to. `dense` is not modified.

    What stands on the grid first, pairs and further terms, then what replaces it, kept elements and columns, then low rank, then the
    rotation: all are in the basis in which the grid was fitted.
    """
    if "pairs.mark" in payload:
        dense = _with_pairs(dense, payload)
    dense = _with_residuals(dense, payload)
    if "elements.value" in payload:
        dense = _with_elements(dense, payload)
    if "columns.value" in payload:
        dense = dense.index_copy(1, payload["columns.index"].long(), payload["columns.value"].float())
    if "low_rank.left" in payload:
        product = payload["low_rank.left"].double() @ payload["low_rank.right"].double()
        dense = (dense.double() + product).float()
    return turned_back(dense, payload).float() if is_turned(payload) else dense


def elements(values: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Kept elements as compressed sparse rows; values: (d_out, d_in); kept: (d_out, d_in) bool.

    Parts: `elements.value` (n,) bf16, `elements.column` (n,) and the `elements.count` of each row (d_out,), both int16 (int32 above
    32,767 inputs).
    """
    narrow = torch.int16 if kept.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    column, count = kept.nonzero()[:, 1].to(narrow), kept.sum(1).to(narrow)
    return {"elements.value": values[kept].to(SIDE_DTYPE), "elements.column": column, "elements.count": count}


def columns(values: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Whole columns kept; values: (d_out, d_in); index: (n,). Parts: `columns.value` (d_out, n) bf16, `columns.index` (n,) int32."""
    return {"columns.value": values[:, index].to(SIDE_DTYPE), "columns.index": index.to(torch.int32)}


def low_rank(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """A correction `left @ right`; left: (d_out, r), right: (r, d_in), stored in bf16."""
    return {"low_rank.left": left.to(SIDE_DTYPE), "low_rank.right": right.to(SIDE_DTYPE)}


def residual(term: int, rows: Tensor, payload: Payload, bits: int) -> dict[str, Tensor]:
    """Term 1, 2, … of an expansion: the payload of an integer grid for some rows, whose values are added to them.

    rows: (n,); payload: `codes` (n, d_in) of `bits` bits, `scale` (n, n_groups) and, if asymmetric, `offset`. Parts: those of the grid
    but for the codes, `residual1.packed` (bytes,) uint8, from whose length the width is read, and `residual1.row` (n,) int32.
    """
    parts = {part: tensor for part, tensor in payload.items() if part != "codes"}
    own = {**parts, "packed": pack(payload["codes"], bits), "row": rows.to(torch.int32)}
    return {f"residual{term}.{part}": tensor for part, tensor in own.items()}


def pairs() -> dict[str, Tensor]:
    """Says that two neighbours' 4-bit codes stand for one of them where the other's is 0, see `abfloat`. Part: `pairs.mark` (0,)."""
    return {"pairs.mark": torch.empty(0, dtype=torch.uint8)}


def abfloat(codes: Tensor) -> Tensor:
    """The steps that 4-bit codes `s e e m` stand for in a pair whose other code is 0: (-1)**s * (2 + m) * 2**(e + 2), fp32.

    So they go on where the grid ends: 12, 16, 24, 32, 48, 64, 96 against 7. The other element of the pair is zero.
    OliVe (Guo 2023), section 3.3.
    """
    wide = codes.to(torch.int32)
    magnitude = (2 + (wide & 1)) << (((wide >> 1) & 3) + 2)
    return torch.where(wide >= 8, -magnitude, magnitude).float()


def _with_residuals(dense: Tensor, payload: Payload) -> Tensor:
    d_in, term = dense.shape[1], 1
    while f"residual{term}.row" in payload:
        row, packed, scale = (payload[f"residual{term}.{part}"] for part in ("row", "packed", "scale"))
        offset = payload.get(f"residual{term}.offset")
        bits = packed.numel() * 8 // (len(row) * d_in)
        codes = unpack(packed, bits, (len(row), d_in)).view(*scale.shape, -1).float()
        steps = codes - 2 ** (bits - 1) if offset is None else codes
        values = steps * scale.float()[..., None]
        values = values if offset is None else values + offset.float()[..., None]
        dense = dense.index_add(0, row.long(), values.view(len(row), d_in))
        term += 1
    return dense


def _with_pairs(dense: Tensor, payload: Payload) -> Tensor:
    codes, scale = payload["codes"], payload["scale"].float()
    d_out, d_in = codes.shape
    victim = (codes == 0).view(d_out, d_in // 2, 2)
    outlier = victim.flip(-1).reshape(d_out, d_in)
    steps = abfloat(codes).view(d_out, scale.shape[1], -1)
    result = torch.where(outlier, (steps * scale[..., None]).view(d_out, d_in), dense)
    return result.masked_fill(victim.view(d_out, d_in), 0.0)


def _with_elements(dense: Tensor, payload: Payload) -> Tensor:
    count = payload["elements.count"].long()
    rows = torch.repeat_interleave(torch.arange(len(count)), count)
    result = dense.clone()
    result[rows, payload["elements.column"].long()] = payload["elements.value"].float()
    return result
