"""Random weights in any format, for what is only timed: speed does not depend on values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import DTYPES
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest


def random_payload(fmt: Format, n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes with scales of the size that real weights have; other than integer grids, random weights rounded to the format.

    Zeros lie anywhere, as many as the format says.
    """
    if fmt.rank:
        down, up = (torch.randn(*shape, generator=generator) / math.sqrt(shape[1]) for shape in ((fmt.rank, k), (n, fmt.rank)))
        return {"down": down.to(DTYPES[fmt.dense]), "up": up.to(DTYPES[fmt.dense])}
    weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
    if fmt.every:
        places = torch.rand(n, k // fmt.every, fmt.every, generator=generator).argsort(-1)
        weight.view(places.shape)[places >= fmt.kept(1, fmt.every)] = 0
    elif fmt.zeros:
        weight.view(-1)[torch.randperm(n * k, generator=generator)[fmt.kept(n, k) :]] = 0
    if fmt.dense:
        return {"weight": weight.to(DTYPES[fmt.dense])}
    if not fmt.integer:
        return dict(nearest(weight, fmt, minmax(weight, fmt)))
    codes = torch.randint(fmt.code_range[0], fmt.levels, (n, k), generator=generator, dtype=torch.uint8)
    spread = 2 / (fmt.levels * math.sqrt(k))
    scale = ((0.5 + torch.rand(n, fmt.groups(k), generator=generator)) * spread).bfloat16()
    if fmt.symmetric:
        return {"codes": codes, "scale": scale}
    shift = 0.4 + 0.2 * torch.rand(n, fmt.groups(k), generator=generator)
    return {"codes": codes, "scale": scale, "offset": (-fmt.levels * shift * scale.float()).bfloat16()}
