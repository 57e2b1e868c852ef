"""How a Triton product is divided into programs, and the memory in which parts of it meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WAVES = 2
_MOST_PARTS = 16
_SPLIT_ROWS = 64


@dataclass(frozen=True)
class Launch:
    """rows, cols, depth: a tile in tokens, outputs and inputs (or words of them); parts: among how many programs a tile's inputs are
    split; warps, stages: Triton's."""

    rows: int
    cols: int
    depth: int
    parts: int
    warps: int = 4
    stages: int = 3

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Tiles along tokens and outputs."""
        return -(-m // self.rows), -(-n // self.cols)


def parts(n_tiles: int, n_steps: int, n_processors: int) -> int:
    """Inputs are split until all processors have work twice over, each part has a step, and summing up stays cheap."""
    wanted = max(1, _WAVES * n_processors // max(1, n_tiles))
    return max(1, min(_MOST_PARTS, n_steps, 1 << (wanted.bit_length() - 1)))


def for_matrices(m: int, n: int, k: int, n_processors: int, *, depth: int, cols: int = 64, stages: int = 3) -> Launch:
    """Tiles for matrix instructions; cols: outputs of a tile of 128 tokens, smaller ones have 64. Few tokens have their inputs split."""
    rows = max(16, min(128, next_power(m)))
    launch = Launch(rows, cols if rows == 128 else 64, depth, 1, warps=8 if rows == 128 else 4, stages=stages)
    tokens, outputs = launch.tiles(m, n)
    split = parts(tokens * outputs, -(-k // depth), n_processors) if m <= _SPLIT_ROWS else 1
    return replace(launch, parts=split)


def next_power(count: int) -> int:
    """The smallest power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


class Meeting:
    """Where programs leave their parts of a product, and count who has arrived. For one product at a time."""

    def __init__(self) -> None:
        self._arrived = torch.zeros(0, dtype=torch.int32)

    def memory(self, launch: Launch, out: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Room for the parts (fp32) and a zero for every tile (int32), which a launch leaves zero; nothing where it has one part."""
        split = launch.parts > 1
        n = out.shape[-1]
        room = torch.empty(launch.parts * m * n if split else 0, dtype=torch.float32, device=out.device)
        tokens, outputs = launch.tiles(m, n)
        if split and (self._arrived.numel() < tokens * outputs or self._arrived.device != out.device):
            self._arrived = torch.zeros(tokens * outputs, dtype=torch.int32, device=out.device)
        return room, self._arrived
