"""What a model is made of: blocks, linears and the sites at which something is decided. Values only; `describe` finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """One linear of a block.

    name: module path in the loaded model; kind: `q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `gate_up`, `down`, `expert_…` or `other`;
    transposed: the parameter is stored (d_in, d_out), as GPT-2's Conv1D does.
    """

    name: str
    kind: str
    block: int
    d_in: int
    d_out: int
    bias: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Feed:
    """The rows of a linear that write a site's inputs, each input by one row and in proportion to it: up for down, v for o.

    layer: module path of the linear. Input j is written by row `first + j // block // shared * stride + j % block`: blocks of inputs are
    the heads of o, `shared` of which read one head of v, and the whole input of down.
    """

    layer: str
    first: int
    block: int
    stride: int
    shared: int = 1

    def rows(self, d_in: int) -> list[int]:
        """The row that writes each of `d_in` inputs."""
        return [self.first + j // self.block // self.shared * self.stride + j % self.block for j in range(d_in)]


@dataclass(frozen=True)
class Site:
    """Linears that share one decision, because runtimes fuse them (q+k+v, gate+up) or because they are one layer's experts.

    name: `model.layers.0.self_attn.q_proj+k_proj+v_proj`, the parent's path and the leaves joined by `+`;
    shares_input: all layers read the same tensor, so one kernel call may compute them all;
    norm: path of the norm whose output only these layers read, where a per-channel scale folds exactly; None otherwise;
    feed: the rows that write the inputs, where a scale of the one divides out in the other; None otherwise.
    """

    name: str
    kind: str
    block: int
    layers: tuple[LayerSpec, ...]
    shares_input: bool = True
    norm: str | None = None
    feed: Feed | None = None

    @property
    def d_in(self) -> int:
        """Inputs of each layer (equal for all of them)."""
        return self.layers[0].d_in

    @property
    def d_out(self) -> int:
        """Outputs of all layers together."""
        return sum(layer.d_out for layer in self.layers)

    @property
    def n_weights(self) -> int:
        """Weights of all layers together."""
        return sum(layer.d_in * layer.d_out for layer in self.layers)


@dataclass(frozen=True)
class Structure:
    """A decoder-only language model, described.

    blocks: module paths of the decoder blocks, in order; head: path of the output projection; tied: it shares the embedding's tensor;
    dtype: the dtype the checkpoint stores its weights in (`bf16`, `fp16`, `fp32`).
    """

    architecture: str
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    head: str
    embedding: str
    tied: bool
    d_model: int
    n_vocab: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: str
    n_parameters: int

    def site(self, name: str) -> Site:
        """The site of a name; raises KeyError with the nearest names otherwise."""
        for site in self.sites:
            if site.name == name:
                return site
        near = [s.name for s in self.sites if s.name.split(".")[-1] == name.split(".")[-1]][:3]
        raise KeyError(f"no site {name!r} in this {self.architecture}; for example {near or [s.name for s in self.sites[:3]]}")

    def in_block(self, block: int) -> tuple[Site, ...]:
        """The sites of one block, in the order of computation."""
        return tuple(site for site in self.sites if site.block == block)

    def layers(self) -> Iterator[tuple[Site, LayerSpec]]:
        """Every linear with its site."""
        for site in self.sites:
            for layer in site.layers:
                yield site, layer
