"""Who reads and writes the residual stream of a model, found by watching it run. Knows no architecture by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.hadamard import random_orthogonal
from methods.model.structure import LayerSpec, Structure
from methods.model.trace import Trace, probe_tokens, trace
from methods.model.weights import is_norm_like, is_transposed, norm_view, with_values


class RotationRefused(ValueError):
    """A model that no rotation of its residual stream leaves as it is; says why."""


@dataclass(frozen=True)
class HeadPair:
    """A value projection and the output projection behind it, of one block.

    first: the row of `value` at which its value heads begin (0 but for a fused q+k+v); n_heads query heads share n_kv_heads heads of
    `head_dim` values, the query heads of one group lying side by side.
    """

    value: str
    output: str
    first: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Wiring:
    """readers: by norm of the residual stream, the modules with a weight (…, d_model) that read what it puts out, the head among them.

    writers: linears whose output is added to the stream; unread: norms of d_model channels that no weight reads, in a refusal's words;
    heads: one pair a block, empty where a block has none of this kind.
    """

    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    heads: tuple[HeadPair, ...]
    unread: tuple[str, ...]


@torch.no_grad()
def wiring(model: nn.Module, structure: Structure) -> Wiring:
    """The wiring of a pre-norm model with RMS norms, which comes back unchanged; raises RotationRefused for any other.

    That everything was found is for `methods.rotate.model` to test, by comparing logits.
    """
    seen = trace(model, probe_tokens(structure.n_vocab), structure.blocks)
    _check_pre_norm(structure, seen)
    width = structure.d_model
    norms = [name for name in dict.fromkeys(seen.calls) if _is_norm_of(model, name, width)]
    readers: dict[str, list[str]] = {name: [] for name in norms}
    for name, address in seen.reads.items():
        norm = seen.normed.get(address)
        if norm in readers and _reads_channels(model, name, width):
            readers[norm].append(name)
    _add_experts(structure, readers)
    found = {norm: tuple(names) for norm, names in readers.items() if names}
    for norm in found:
        _check_norm(model, norm)
    writers = tuple(layer.name for _, layer in structure.layers() if layer.kind.removeprefix("expert_") in ("o", "down"))
    read = {name for names in found.values() for name in names}
    if structure.head not in read or not writers or read & set(writers):
        raise RotationRefused(
            f"{structure.architecture}: what reads and writes its residual stream is not understood (head read: "
            f"{structure.head in read}, writers: {len(writers)}); only pre-norm decoders with o and down projections are rotated"
        )
    transposed = [name for name in (*read, *writers) if is_transposed(model.get_submodule(name))]
    if transposed:
        raise RotationRefused(f"{transposed[0]} is stored transposed (Conv1D); such models are not rotated")
    return Wiring(found, writers, _heads(structure), tuple(norm for norm in norms if norm not in found))


def _check_pre_norm(structure: Structure, seen: Trace) -> None:
    for block in structure.blocks:
        norm = seen.normed.get(seen.reads[block])
        if norm is not None:
            raise RotationRefused(
                f"{structure.architecture}: {block} reads what {norm} puts out: its residual stream passes through norms, whose gains "
                "no rotation commutes with; only pre-norm models are rotated"
            )


def _is_norm_of(model: nn.Module, name: str, width: int) -> bool:
    module = model.get_submodule(name)
    return is_norm_like(module) and module.get_parameter("weight").numel() == width


def _reads_channels(model: nn.Module, name: str, width: int) -> bool:
    """Whether the module multiplies d_model channels by a matrix, as linears and routers do."""
    shapes = [tuple(p.shape) for p in model.get_submodule(name).parameters(recurse=False) if p.dim() == 2]
    return len(shapes) == 1 and shapes[0][1] == width


def _add_experts(structure: Structure, readers: dict[str, list[str]]) -> None:
    """Experts read copies of some rows of what the router beside them reads."""
    for site in structure.sites:
        if not site.kind.startswith("expert_") or site.kind == "expert_down":
            continue
        parent = site.name.partition(".*.")[0].rpartition(".")[0]
        for names in readers.values():
            if any(name.startswith(f"{parent}.") for name in names):
                names += [layer.name for layer in site.layers]


def _check_norm(model: nn.Module, name: str) -> None:
    """Raises where the norm does not commute with rotations of its input, its gain aside."""
    try:
        view = norm_view(model, name)
    except ValueError as error:
        raise RotationRefused(f"{name} is not understood, so its gain cannot be fused: {error}") from None
    module, width = with_values(model.get_submodule(name)), view.weight.numel()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator, dtype=torch.float64) + 1.0
    q = random_orthogonal(width, generator)

    def normalised(rows: Tensor) -> Tensor:
        ones = {"weight": torch.full_like(view.weight, 1 - view.unit_offset)}
        if view.bias is not None:
            ones["bias"] = torch.zeros_like(view.bias)
        result: Tensor = functional_call(module, ones, (rows.to(view.weight),))
        return result.double()

    if not float((normalised(x @ q) - normalised(x) @ q).abs().max()) < 1e-3:
        raise RotationRefused(
            f"{name} ({type(module).__name__}) does not commute with rotations: it subtracts the mean, as a LayerNorm does. Its model "
            "would need the mean taken out of everything that writes to the residual stream and RMS norms instead, which is another "
            "architecture than its checkpoint can name; use a method of a single site"
        )
    if view.bias is not None:
        raise RotationRefused(f"{name}: an RMS norm with a bias, which only readers with biases could take over; not supported")


def _heads(structure: Structure) -> tuple[HeadPair, ...]:
    """The pairs of all blocks, where every block has one; the layout of a fused q+k+v is taken to be q, k, v and tested by who uses it."""
    n_heads, n_kv_heads, head_dim = structure.n_heads, structure.n_kv_heads, structure.head_dim
    pairs = []
    for block in range(len(structure.blocks)):
        layers = {layer.kind: layer for site in structure.in_block(block) for layer in site.layers}
        value, output = layers.get("v") or layers.get("qkv"), layers.get("o")
        if value is None or output is None:
            return ()
        rows = n_kv_heads * head_dim
        if value.d_out < rows or output.d_in != n_heads * head_dim or n_heads % n_kv_heads or not _plain(value, rows):
            return ()
        pairs.append(HeadPair(value.name, output.name, value.d_out - rows, n_heads, n_kv_heads, head_dim))
    return tuple(pairs)


def _plain(value: LayerSpec, rows: int) -> bool:
    return value.kind == "qkv" or value.d_out == rows
