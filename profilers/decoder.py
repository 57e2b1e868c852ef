"""A small decoder in torch alone: what a bare sweep runs end to end where there is no transformers, on weights that nobody trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from profilers.attention import HEAD_DIMS, attend, attend_prompt, prompt_kernel
from profilers.kernels.build import NoCompiler, library
from profilers.kernels.kernel import Prepared
from profilers.norms import KernelNorm, TorchNorm
from profilers.plan import Sizes
from profilers.target import Target

EPS = 1e-5
THETA = 10000.0


@dataclass(frozen=True)
class Block:
    """Attention and gated feed-forward with a root-mean-square norm before each; linears: q+k+v (n, k), o, gate+up, down."""

    first_norm: nn.Module
    qkv: Prepared
    o: Prepared
    second_norm: nn.Module
    gate_up: Prepared
    down: Prepared

    def clone(self) -> Self:
        """The same block in other memory, its norms' few values aside."""
        others = (self.qkv.clone(), self.o.clone(), self.gate_up.clone(), self.down.clone())
        return type(self)(self.first_norm, others[0], others[1], self.second_norm, others[2], others[3])

    def size_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return sum(linear.size_bytes() for linear in (self.qkv, self.o, self.gate_up, self.down))


class Decoder:
    """Llama's architecture on prepared kernels, with a key/value cache (batch, kv_heads, length, head_dim) a block, allocated once."""

    def __init__(
        self,
        sizes: Sizes,
        blocks: Sequence[Block],
        embedding: Tensor,
        norm: nn.Module,
        head: Prepared,
        target: Target,
        *,
        batch: int,
        length: int,
    ) -> None:
        """embedding: (vocabulary, hidden) in the target's compute dtype, on its device; the caches hold random values at first."""
        self.sizes, self.blocks, self.embedding, self.norm, self.head = sizes, blocks, embedding, norm, head
        self.target, self.batch, self.length = target, batch, length
        shape = (len(blocks), 2, batch, sizes.kv_heads, length, sizes.head_dim)
        self._cache = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(embedding.device, embedding.dtype)
        turns = THETA ** -(torch.arange(0, sizes.head_dim, 2).float() / sizes.head_dim)
        angles = torch.outer(torch.arange(length).float(), torch.cat((turns, turns)))
        self._cos, self._sin = (part.to(embedding.device, embedding.dtype) for part in (angles.cos(), angles.sin()))
        self._native = sizes.head_dim in HEAD_DIMS and _compiled(target)

    def __call__(self, ids: Tensor, place: int) -> Tensor:
        """Tokens (batch, tokens) behind the `place` that the cache holds -> logits of the last (batch, vocabulary).

        Their keys and values are written to the cache, over what was there. `place` is 0 where there are several tokens.
        """
        x = functional.embedding(ids, self.embedding)
        for block, (keys, values) in zip(self.blocks, self._cache, strict=True):
            x = x + block.o(self._attention(block.qkv(block.first_norm(x)), keys, values, place))
            gate, up = block.gate_up(block.second_norm(x)).chunk(2, -1)
            x = x + block.down(functional.silu(gate) * up)
        return self.head(self.norm(x[:, -1:]))[:, 0]

    def first(self, n_blocks: int) -> Decoder:
        """The decoder of its first blocks, with the same weights and caches of its own."""
        shared = (self.embedding, self.norm, self.head, self.target)
        return Decoder(self.sizes, self.blocks[:n_blocks], *shared, batch=self.batch, length=self.length)

    def size_bytes(self) -> int:
        """Bytes of the weights that a step reads; of the embedding that is a few rows."""
        return sum(block.size_bytes() for block in self.blocks) + self.head.size_bytes()

    def _attention(self, qkv: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """qkv (batch, tokens, q+k+v) -> (batch, tokens, heads * head_dim)."""
        sizes, (batch, n_new) = self.sizes, qkv.shape[:2]
        heads = qkv.view(batch, n_new, -1, sizes.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
        cos, sin = self._cos[place : place + n_new], self._sin[place : place + n_new]
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        keys[:, :, place : place + n_new] = k
        values[:, :, place : place + n_new] = v
        keys, values = keys[:, :, : place + n_new], values[:, :, : place + n_new]
        if n_new == 1 and self._native:
            y = attend(q, keys, values, sizes.head_dim**-0.5, self.target.threads)
        elif n_new > 1 and self._native and prompt_kernel(self.target):
            y = attend_prompt(q, keys, values, sizes.head_dim**-0.5, self.target.threads)
        else:
            shared = sizes.heads != sizes.kv_heads
            y = functional.scaled_dot_product_attention(q, keys, values, is_causal=n_new > 1, enable_gqa=shared).transpose(1, 2)
        return y.reshape(batch, n_new, -1)


def norm_of(gain: Tensor, target: Target) -> nn.Module:
    """A norm of a gain (hidden,) on the project's kernel where that was compiled for the target, else torch's."""
    kind = KernelNorm if _compiled(target) else TorchNorm
    return kind(gain.to(target.device), EPS, target.dtype)


def _compiled(target: Target) -> bool:
    if target.device != "cpu":
        return False
    try:
        library()
    except NoCompiler:
        return False
    return True


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, heads, tokens, dim) at positions of cos and sin (tokens, dim)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
