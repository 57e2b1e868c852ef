"""Fitter `output-clip`: clips each group at where the layer's output suffers least."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import decode
from methods.quant import first
from methods.quant.grid import Grid, fit_in_chunks, grouped
from methods.quant.minmax import minmax
from methods.quant.nearest import nearest
from methods.quant.task import Task


def by_clip(task: Task) -> Grid:
    """AWQ's clipping as a part of a recipe; knobs `least` and `steps`, 0.5 and 20 where there are none."""
    least, steps = float(task.knobs.get("least", 0.5)), int(task.knobs.get("steps", 20))
    return output_clip(task.weight, first.hessian(task), task.fmt, least=least, steps=steps)


def output_clip(weight: Tensor, hessian: Tensor, fmt: Format, *, least: float = 0.5, steps: int = 20) -> Grid:
    """For every group, the grid of `minmax` for its weights clipped at a part of its largest magnitude, of least output error.

    weight: (d_out, d_in); hessian: (d_in, d_in), the second moment of the inputs. The parts go from 1 to `least` in `steps` steps; an
    error is the mean square of the group's own share of the output, so that groups do not depend on each other.
    Never worse than `minmax` in any group; steps = 0 is `minmax`. AWQ (Lin 2024), its search of clipping after scaling.
    Deviation: errors are over all tokens instead of a sample, by their second moment, in which inputs are not rounded.
    """
    n_groups, size = fmt.groups(weight.shape[1]), fmt.group_size(weight.shape[1])
    blocks = hessian.view(n_groups, size, n_groups, size)
    moments = torch.stack([blocks[group, :, group] for group in range(n_groups)])
    parts = [1 - (1 - least) * step / steps for step in range(1, steps + 1)]
    return fit_in_chunks(weight, lambda rows: _fit(rows, moments, fmt, parts))


def _fit(weight: Tensor, moments: Tensor, fmt: Format, parts: list[float]) -> Grid:
    groups = grouped(weight, fmt)
    largest = groups.abs().amax(-1, keepdim=True)
    best = minmax(weight, fmt)
    least = _output_error(weight, best, moments, fmt)
    for part in parts:
        clipped = groups.clamp(-largest * part, largest * part).view_as(weight)
        grid = minmax(clipped, fmt)
        error = _output_error(weight, grid, moments, fmt)
        better = error < least
        least = torch.where(better, error, least)
        offset = None if grid.offset is None or best.offset is None else torch.where(better, grid.offset, best.offset)
        best = Grid(torch.where(better, grid.scale, best.scale), offset)
    return best


def _output_error(weight: Tensor, grid: Grid, moments: Tensor, fmt: Format) -> Tensor:
    """Mean square of each group's share of the output error (rows, n_groups); moments: (n_groups, group, group), its inputs'."""
    rounded = decode(fmt, nearest(weight, fmt, grid))
    error = grouped(rounded - weight, fmt).transpose(0, 1)
    return ((error @ moments) * error).sum(-1).T
