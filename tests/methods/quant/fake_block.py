"""A block of plain linears that read one norm, for tests of what learns from a block's output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.format import Format
from methods.formats.numerics import quantize_activation
from methods.learn import through
from methods.method import BlockSample, NormView


def block_of(
    layers: Mapping[str, Tensor], x: Tensor, norm: NormView | None = None, *, batches: int = 5, now: Tensor | None = None
) -> BlockSample:
    """Linears (d_out, d_in) side by side on the rows x (n, d_in), the norm's outputs, in `batches` batches (1, n / batches, d_in).

    Targets are the dense outputs for x; inputs are those of `now`, by default the same rows.
    """
    gain = torch.ones(x.shape[1]) if norm is None else norm.weight.float() + norm.unit_offset
    bias = torch.zeros(x.shape[1]) if norm is None or norm.bias is None else norm.bias.float()

    def run(hidden: Tensor, weights: Mapping[str, Tensor], formats: Mapping[str, Format]) -> Tensor:
        inputs = hidden * gain + bias
        known = set(layers)
        if norm is not None and f"{norm.name}.weight" in weights:
            known |= {f"{norm.name}.weight", f"{norm.name}.bias"}
            inputs = hidden * (weights[f"{norm.name}.weight"] + norm.unit_offset) + weights.get(f"{norm.name}.bias", bias)
        assert set(weights) <= known, f"{sorted(weights)} are not all of this block"
        return torch.cat([_linear(inputs, weights.get(name, own), formats.get(name)) for name, own in layers.items()], -1)

    inputs = [
        (rows - bias) / gain
        for rows in (x if now is None else now)[: len(x) // batches * batches].view(batches, 1, -1, x.shape[1])
    ]
    dense = [(rows - bias) / gain for rows in x[: len(x) // batches * batches].view(batches, 1, -1, x.shape[1])]
    return BlockSample(inputs, [run(hidden, {}, {}) for hidden in dense], run)


def _linear(x: Tensor, weight: Tensor, fmt: Format | None) -> Tensor:
    if fmt is not None and fmt.act_bits != 16:
        x = through(x, quantize_activation(x.detach(), fmt))
    return x @ weight.T
