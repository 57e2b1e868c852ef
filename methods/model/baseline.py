"""An honest baseline out of a model that was quantised before: the same function, but off the grid that its weights lie on.

A format that contains the old grid would reproduce such a model without any loss, a result that says nothing. Exact
symmetries of the network move the weights off it: a permutation of the residual channels, permutations of the MLP's neurons,
and a rotation of every value head.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.model.structure import LayerSpec, Structure
from methods.model.trace import logits_of, probe_tokens
from methods.model.weights import bias_of, is_transposed, weight_of

BLOCK = 32
"""Consecutive inputs that share a scale in GGUF's low-bit types."""

READS_RESIDUAL = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up"})
WRITES_RESIDUAL = frozenset({"o", "down"})

Change = tuple[nn.Parameter, Tensor]


FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of a GGUF that hold any weight; what lies in them may have been on a grid before."""


@dataclass(frozen=True)
class Grid:
    """Weights on a lattice of at most 2**bits levels in each block; share: of the linears' weights; kinds: the types they are stored in."""

    bits: int
    share: float
    kinds: tuple[str, ...] = ()


def bits_of(kind: str) -> int:
    """Bits of the levels in a low-bit type of GGUF, by its name: 4 for `Q4_K`, 2 for ternary ones."""
    ternary = kind.startswith(("TQ", "IQ1"))
    return 2 if ternary else int(re.findall(r"\d+", kind)[0])


def detect_grids(
    model: nn.Module, structure: Structure, kinds: Mapping[str, str] | None = None, n_rows: int = 16
) -> tuple[Grid, ...]:
    """The grids of at most 8 bits that linears lie on, by bits, the fewest first; empty where all weights are free.

    kinds: the GGUF type of a linear by its name, where it is known: a low-bit type is a grid by its name. Of others `n_rows` rows are
    looked at, knowing no quantiser: in a block on a grid, all gaps between sorted weights are whole multiples of the smallest gap.
    """
    weights: Counter[int] = Counter()
    named: dict[int, Counter[str]] = defaultdict(Counter)
    total = 0
    for _, layer in structure.layers():
        kind = (kinds or {}).get(layer.name)
        n_weights = layer.d_in * layer.d_out
        total += n_weights
        known = kind is not None and kind not in FLOATS
        bits = bits_of(str(kind)) if known else _bits(weight_of(model.get_submodule(layer.name)), n_rows)
        if bits is not None:
            weights[bits] += n_weights
            named[bits].update({kind: n_weights} if kind else {})
    return tuple(Grid(bits, weights[bits] / total, tuple(k for k, _ in named[bits].most_common())) for bits in sorted(weights))


def float_offset_error(weight: Tensor, bits: int = 4, group: int = BLOCK) -> float:
    """Relative error of rounding (d_out, d_in) to min + scale * code with a float minimum a group: about 0 where a grid hides."""
    if weight.shape[1] % group:
        raise ValueError(f"float_offset_error: group={group} does not divide d_in={weight.shape[1]}; choose a divisor")
    groups = weight.double().reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float64).tiny)
    rounded = low + scale * ((groups - low) / scale).round()
    return float((rounded - groups).norm() / groups.norm())


@torch.no_grad()
def leave_grid_(model: Any, structure: Structure, seed: int = 0) -> tuple[str, ...]:
    """Moves all linears off their grid, in place, with the function unchanged; returns what could not be done, in plain words.

    Each of the three transforms is computed in fp64 or is a permutation, and is taken back where the logits move by more
    than 1e-3 of their range: it is not legal for that model then. Deterministic in the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = probe_tokens(structure.n_vocab)
    reference = logits_of(model, ids)
    transforms: dict[str, Callable[[], Iterator[Change]]] = {
        "permuting the residual channels": lambda: _residual(model, structure, generator),
        "permuting the neurons of the MLPs": lambda: _neurons(model, structure, generator),
        "rotating the value heads": lambda: _values(model, structure, generator),
    }
    failed = []
    for name, transform in transforms.items():
        changes = list(transform())
        before = [(parameter, parameter.data) for parameter, _ in changes]
        _assign(changes)
        moved = (logits_of(model, ids) - reference).abs().max() / reference.abs().max()
        if not changes or not moved <= 1e-3:
            _assign(before)
            failed.append(f"{name} is not possible in a {structure.architecture}; some linears may keep their low-bit grid")
    return tuple(failed)


def _bits(weight: Tensor, n_rows: int) -> int | None:
    d_out, d_in = weight.shape
    if d_in % BLOCK:
        return None
    rows = weight[torch.linspace(0, d_out - 1, min(n_rows, d_out)).long()]
    gaps = rows.double().reshape(-1, BLOCK).sort(1).values.diff(dim=1)
    span = gaps.sum(1)
    gaps, span = gaps[span > 0], span[span > 0]
    step = torch.where(gaps > 1e-6 * span[:, None], gaps, torch.inf).amin(1)
    steps = gaps / step[:, None]
    lattice = ((steps - steps.round()).abs() < 0.02).all(1) & (span / step <= 255.5)
    if not len(span) or lattice.double().mean() <= 0.5:
        return None
    return int(torch.ceil(torch.log2((span / step)[lattice].max().round() + 1)))


def _assign(changes: list[Change]) -> None:
    for parameter, tensor in changes:
        parameter.data = tensor.to(parameter.dtype)


def _rows(module: nn.Module, order: Tensor) -> Iterator[Change]:
    yield _weight_change(module, weight_of(module)[order])
    bias = bias_of(module)
    if bias is not None:
        yield module.get_parameter("bias"), bias[order]


def _columns(module: nn.Module, order: Tensor) -> Iterator[Change]:
    yield _weight_change(module, weight_of(module)[:, order])


def _weight_change(module: nn.Module, weight: Tensor) -> Change:
    """The change that gives a linear the weight (d_out, d_in), in the layout of its parameter."""
    return module.get_parameter("weight"), weight.T if is_transposed(module) else weight


def _residual(model: Any, structure: Structure, generator: torch.Generator) -> Iterator[Change]:
    """One permutation of the residual stream: everything as wide as it, the columns that read it, the rows that write it."""
    order = torch.randperm(structure.d_model, generator=generator)
    kinds = {layer.name: layer.kind.removeprefix("expert_") for _, layer in structure.layers()}
    if not set(kinds.values()) <= READS_RESIDUAL | WRITES_RESIDUAL:
        return
    seen: set[int] = set()
    for name, module in model.named_modules():
        kind = kinds.get(name)
        if kind is not None:
            yield from _columns(module, order) if kind in READS_RESIDUAL else _rows(module, order)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.shape[-1] == structure.d_model and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, parameter.data[..., order]


def _neurons(model: Any, structure: Structure, generator: torch.Generator) -> Iterator[Change]:
    """A permutation of the neurons of every MLP: rows of gate and up, columns of down."""
    layers = [layer for _, layer in structure.layers()]
    for down in layers:
        if down.kind.removeprefix("expert_") != "down":
            continue
        order = torch.randperm(down.d_in, generator=generator)
        parent = down.name.rpartition(".")[0]
        for layer in layers:
            kind = layer.kind.removeprefix("expert_")
            if layer.name.rpartition(".")[0] != parent or kind not in ("gate", "up", "gate_up"):
                continue
            both = torch.cat([order, order + down.d_in]) if kind == "gate_up" else order
            yield from _rows(model.get_submodule(layer.name), both)
        yield from _columns(model.get_submodule(down.name), order)


def _values(model: Any, structure: Structure, generator: torch.Generator) -> Iterator[Change]:
    """A rotation of each key/value head: on the rows of v, its transpose on the columns of o in all query heads that read it."""
    by_kind: dict[int, dict[str, LayerSpec]] = {}
    for _, layer in structure.layers():
        by_kind.setdefault(layer.block, {})[layer.kind] = layer
    n_kv, size = structure.n_kv_heads, structure.head_dim
    reader = torch.arange(structure.n_heads) // (structure.n_heads // n_kv)
    for layers in by_kind.values():
        if "v" not in layers or "o" not in layers:
            return
        v, o = (model.get_submodule(layers[kind].name) for kind in ("v", "o"))
        rotation = _rotations(n_kv, size, generator)
        heads = weight_of(v).double().view(n_kv, size, -1)
        yield _weight_change(v, (rotation @ heads).flatten(0, 1).to(weight_of(v).dtype))
        bias = bias_of(v)
        if bias is not None:
            yield v.get_parameter("bias"), (rotation @ bias.double().view(n_kv, size, 1)).flatten()
        columns = weight_of(o).double().reshape(-1, structure.n_heads, size)
        rotated = torch.einsum("dhj,hij->dhi", columns, rotation[reader])
        yield _weight_change(o, rotated.flatten(1).to(weight_of(o).dtype))


def _rotations(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orthogonal matrices (n, size, size) in fp64."""
    q, r = torch.linalg.qr(torch.randn(n, size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return rotation
