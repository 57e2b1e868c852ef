"""Scales that fp16 holds too: for runtimes whose files keep them in fp16, where bf16 reaches further down and up."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats import scales
from methods.formats.numerics import Compressed, encode
from methods.formats.sides import plain
from methods.formats.turns import POWER, turned

LARGEST = 65280.0
"""The largest bf16 number that fp16 holds."""

LEAST = 2.0**-24
"""The smallest number above zero that fp16 holds."""


def in_halves(compressed: Compressed) -> Compressed:
    """The weight with bf16 scales and offsets that are fp16 numbers as well, and nearest codes in the groups where one changed.

    bf16 numbers from 2**-17 to 65280 are fp16 numbers already; smaller ones become multiples of 2**-24, scales not less than that. The
    same object where nothing changes or the format keeps its scales otherwise.
    """
    fmt, payload = compressed.format, compressed.payload
    beside = {part: tensor for part, tensor in payload.items() if part != POWER}
    if fmt.dense or not plain(beside) or payload.get("scale", torch.empty(0)).dtype != torch.bfloat16:
        return compressed
    parts = {role: _rounded(payload[role], role) for role in ("scale", "offset") if role in payload}
    changed = torch.stack([parts[role] != payload[role] for role in parts]).any(0)
    if not changed.any():
        return compressed
    d_out = len(payload["codes"])
    used = {role: scales.spread(fmt, scales.read(fmt, role, parts), d_out) for role in ("scale", "offset") if role in parts}
    codes = encode(turned(compressed.dense, payload).float(), fmt, used["scale"], used.get("offset"))
    groups = scales.spread(fmt, changed, d_out).repeat_interleave(codes.shape[1] // changed.shape[1], 1)
    return Compressed.of(fmt, {**payload, **parts, "codes": torch.where(groups, codes, payload["codes"])})


def _rounded(values: Tensor, role: str) -> Tensor:
    held = values.float().clamp(-LARGEST, LARGEST).half().float()
    if role == "scale":
        held = torch.where(held == 0, torch.full_like(held, LEAST).copysign(values.float()), held)
    return held.to(values.dtype)
