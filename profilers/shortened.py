"""A model with fewer blocks: two lengths of it, timed in turns, tell what the blocks between them take (repeated-block differencing)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from methods.model.structure import Structure
from profilers.end_to_end import Measurement, by_round
from profilers.timer import median_interval, quantile


def shortened(model: nn.Module, structure: Structure, n_blocks: int) -> nn.Module:
    """The model with its first blocks only, sharing all weights and everything else; raises ValueError on a number it does not have."""
    if not 0 < n_blocks <= len(structure.blocks):
        raise ValueError(f"n_blocks={n_blocks}: {structure.architecture} here has 1 to {len(structure.blocks)}")
    parent, _, _ = structure.blocks[0].rpartition(".")
    kept = nn.ModuleList(model.get_submodule(name) for name in structure.blocks[:n_blocks])
    return _replaced(model, parent.split("."), kept)


def _replaced(module: nn.Module, path: list[str], child: nn.Module) -> nn.Module:
    """A copy of the module that shares all but what lies on the path."""
    result = copy.copy(module)
    own = dict(module._modules)
    own[path[0]] = child if len(path) == 1 else _replaced(module.get_submodule(path[0]), path[1:], child)
    result._modules = own
    return result


@dataclass(frozen=True)
class Saving:
    """What one policy's blocks take less than another's, in ms: the median over rounds and its 95 % interval."""

    ms: float
    lo: float
    hi: float


def saving(dense: Measurement, dense_short: Measurement, policy: Measurement, policy_short: Measurement) -> Saving:
    """(dense - its shorter form) - (policy - its shorter form), all four of one interleaved run, round by round.

    What both lengths have (embedding, head, what the framework does once) cancels, and what both policies have in a block does too.
    """
    rounds = by_round((dense, dense_short, policy, policy_short))
    differences = sorted(1e3 * ((a - b) - (c - d)) for a, b, c, d in rounds)
    return Saving(quantile(differences, 0.5), *median_interval(differences))
