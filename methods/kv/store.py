"""`Store`: the keys or the values of one layer, as an immutable value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from methods.kv.codecs import Codec


@dataclass(frozen=True)
class Store:
    """First tokens and newest tokens in full precision, and what lies between them packed; packed tokens are never packed again.

    codec: how tokens are packed; window: newest tokens kept in full precision; block: tokens that leave the window together, a multiple
    of the codec's unit; sinks: first tokens kept in full precision.
    head, recent: (b, h, t, d) or None; parts: the codec's; n_packed: tokens in them; n_gone: packed tokens dropped before them.
    """

    codec: Codec
    window: int = 0
    block: int = 1
    sinks: int = 0
    head: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    recent: Tensor | None = None
    length: int = 0
    n_packed: int = 0
    n_gone: int = 0

    def append(self, x: Tensor) -> Store:
        """With tokens x (b, h, t, d) behind; whatever leaves the window is packed."""
        n_head = min(max(0, self.sinks - self.length), x.shape[2])
        head = _joined(self.head, x[:, :, :n_head]) if n_head else self.head
        recent = _joined(self.recent, x[:, :, n_head:])
        n = recent.shape[2]
        ready = n // self.block * self.block if self.block > 1 else max(0, n - self.window)
        parts, n_packed = self.parts, self.n_packed
        if ready:
            new = self.codec.encode(recent[:, :, :ready], self.sinks + self.n_gone + n_packed)
            parts = {name: _joined(parts.get(name), part) for name, part in new.items()}
            n_packed += ready
            recent = recent[:, :, ready:].clone()
        return replace(self, head=head, parts=parts, recent=recent, length=self.length + x.shape[2], n_packed=n_packed)

    def read(self) -> Tensor | None:
        """All tokens held (b, h, t, d) in the dtype that came in; None while there are none."""
        if self.recent is None:
            return None
        kept = [] if self.head is None else [self.head]
        if self.n_packed:
            kept.append(self.codec.decode(self.parts, self.sinks + self.n_gone).to(self.recent.dtype))
        return torch.cat([*kept, self.recent], 2)

    def dropped(self, first: int) -> Store:
        """Without what stands before position `first`, but for a group's later tokens and the window."""
        result = self
        if self.head is not None and self.length > 0:
            n_head = min(self.sinks, self.length)
            kept = max(0, n_head - first)
            if kept < self.head.shape[2]:
                result = replace(result, head=self.head[:, :, self.head.shape[2] - kept :].clone())
        unit = self.codec.unit
        n = min(self.n_packed, max(0, first - self.sinks - self.n_gone) // unit * unit)
        if not n:
            return result
        parts = self._units(n // unit, self.n_packed // unit)
        return replace(result, parts=parts, n_packed=self.n_packed - n, n_gone=self.n_gone + n)

    def cut(self, n: int) -> Store:
        """Without the newest n tokens; raises ValueError where that would divide a group of packed tokens."""
        n = min(n, self.length)
        if self.recent is None or n == 0:
            return self
        n_recent = min(n, self.recent.shape[2])
        n_packed = min(n - n_recent, self.n_packed)
        n_head = n - n_recent - n_packed
        unit = self.codec.unit
        if n_packed % unit:
            raise ValueError(
                f"cache: the newest {n} tokens cannot be removed, since {n_packed} of them are packed in groups of {unit}; "
                f"use a cache format without groups of tokens, or remove at most {n_recent}"
            )
        return replace(
            self,
            head=self.head if self.head is None or not n_head else self.head[:, :, :-n_head].clone(),
            parts=self._units(0, (self.n_packed - n_packed) // unit),
            recent=self.recent[:, :, : self.recent.shape[2] - n_recent].clone(),
            length=self.length - n,
            n_packed=self.n_packed - n_packed,
        )

    def _units(self, first: int, end: int) -> dict[str, Tensor]:
        return {name: part[:, :, first:end].clone() for name, part in self.parts.items()} if end > first else {}

    def each(self, change: Callable[[Tensor], Tensor]) -> Store:
        """With every tensor changed along the batch, which is dimension 0 of all of them."""
        return replace(
            self,
            head=None if self.head is None else change(self.head),
            parts={name: change(part) for name, part in self.parts.items()},
            recent=None if self.recent is None else change(self.recent),
        )

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is stored."""
        yield from self.parts.values()
        for tensor in (self.head, self.recent):
            if tensor is not None:
                yield tensor


def _joined(before: Tensor | None, new: Tensor) -> Tensor:
    """A tensor of its own: what comes in may be a view that keeps much else alive."""
    return new.clone(memory_format=torch.contiguous_format) if before is None else torch.cat((before, new), 2)
