"""A layer's store: what leaves the window when, what never changes, and what can be undone."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from methods.kv.codecs import BeforeRotary, Cast, Integer, IntegerByChannel
from methods.kv.format import parse_cache_format
from methods.kv.rotary import Rotary
from methods.kv.store import Store

SPLITS = ([37], [1] * 37, [5, 1, 1, 20, 10], [16, 16, 5])


def tokens(n: int = 37) -> Tensor:
    return torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(0))


def filled(store: Store, sizes: list[int]) -> Store:
    for piece in tokens(sum(sizes)).split(sizes, 2):
        store = store.append(piece)
    return store


def same(a: Store, b: Store) -> bool:
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return (a.length, a.n_packed, a.n_gone) == (b.length, b.n_packed, b.n_gone) and all(torch.equal(x, y) for x, y in pairs)


def stores() -> dict[str, Store]:
    return {
        "token": Store(Integer(4)),
        "token window": Store(Integer(4), window=6, sinks=3),
        "channel": Store(IntegerByChannel(2, 8), block=8),
        "channel window": Store(IntegerByChannel(2, 8), window=16, block=16, sinks=1),
    }


@pytest.mark.parametrize("name", list(stores()))
def test_how_tokens_come_in_does_not_matter(name: str) -> None:
    found = [filled(stores()[name], sizes) for sizes in SPLITS]
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", list(stores()))
def test_packed_tokens_never_change(name: str) -> None:
    store, hashes = stores()[name], {}
    for piece in tokens().split(1, 2):
        store = store.append(piece)
        for part, tensor in store.parts.items():
            for unit in range(tensor.shape[2]):
                digest = hashlib.sha256(tensor[:, :, unit].contiguous().numpy().tobytes()).hexdigest()
                assert hashes.setdefault((part, unit), digest) == digest
    assert len(hashes) >= 3 * 4


def test_the_window_and_the_sinks_are_exact() -> None:
    x, store = tokens(), filled(stores()["token window"], [37])
    read = store.read()
    assert read is not None and read.shape == x.shape
    assert torch.equal(read[:, :, :3], x[:, :, :3]) and torch.equal(read[:, :, 31:], x[:, :, 31:])
    assert (read[:, :, 3:31] != x[:, :, 3:31]).any((0, 1, 3)).all()
    assert store.n_packed == 28 and Store(Integer(4)).read() is None


def test_keys_leave_a_full_window_all_at_once() -> None:
    """KIVI, algorithm 1: the window empties when it holds 16 tokens, so that it holds length mod 16 in between."""
    store = Store(IntegerByChannel(2, 8), window=16, block=16)
    for length, piece in enumerate(tokens().split(1, 2), 1):
        store = store.append(piece)
        assert store.recent is not None and store.recent.shape[2] == length % 16 and store.n_packed == length // 16 * 16


@pytest.mark.parametrize("name", ("kv-int4", "kv-int4-w6-s3", "kv-kivi2-g8-w16-s1", "kv-kivi2-g8"))
@pytest.mark.parametrize("sliding", (None, 12, 30))
def test_the_format_knows_what_a_store_holds(name: str, sliding: int | None) -> None:
    fmt = parse_cache_format(name)
    codec = IntegerByChannel(2, fmt.group) if fmt.kind == "kivi" else Integer(4)
    keys, values = Store(codec, fmt.window, fmt.key_block, fmt.sinks), Store(Integer(4), fmt.window, 1, fmt.sinks)
    for length, piece in enumerate(tokens(50).split(1, 2), 1):
        left = max(0, length - sliding + 1) if sliding else 0
        keys, values = (store.append(piece).dropped(left) for store in (keys, values))
        for store, side in ((keys, "keys"), (values, "values")):
            whole = sum(t.shape[2] for t in (store.head, store.recent) if t is not None)
            assert (whole, store.n_packed) == fmt.split(length, side, sliding)  # type: ignore[arg-type]
            held = store.read()
            assert held is not None and held.shape[2] >= length - left


@pytest.mark.parametrize("name", list(stores()))
def test_dropping_the_front_leaves_the_rest(name: str) -> None:
    store = filled(stores()[name], [37])
    before, after = store.read(), store.dropped(20).read()
    assert before is not None and after is not None and 17 <= after.shape[2] <= 17 + 16
    assert torch.equal(after[:, :, -17:], before[:, :, -17:])
    assert same(store.dropped(20).dropped(20), store.dropped(20)) and same(store.dropped(0), store)


def test_cutting_is_as_if_the_tokens_had_never_come() -> None:
    assert same(filled(Store(Integer(4), sinks=3), [37]).cut(36), Store(Integer(4), sinks=3).append(tokens()[:, :, :1]))
    assert same(filled(Store(Integer(4)), [37]).cut(7), Store(Integer(4)).append(tokens()[:, :, :30]))
    grouped = filled(stores()["channel"], [37])
    assert same(grouped.cut(5), stores()["channel"].append(tokens()[:, :, :32]))
    assert same(grouped.cut(13), stores()["channel"].append(tokens()[:, :, :24]))
    with pytest.raises(ValueError, match="newest 6 tokens cannot be removed"):
        grouped.cut(6)


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("left", (0, 9))
def test_positions_go_with_their_tokens(sizes: list[int], left: int) -> None:
    """Keys stored without their rotation come back with it, wherever packing and dropping cut the text."""

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        turns = (positions[..., None] * torch.tensor([1.0, 0.3])).repeat(1, 1, 2)
        return turns.cos(), turns.sin()

    store = Store(BeforeRotary(Cast(torch.float32), Rotary(tables)), window=3, sinks=2)
    for piece in tokens().split(sizes, 2):
        store = store.append(piece).dropped(left)
    read = store.read()
    assert read is not None and read.shape[2] == 37 - left
    assert torch.allclose(read, tokens()[:, :, left:], atol=1e-5)


def test_sequences_are_exchanged_in_every_part() -> None:
    store = filled(stores()["channel window"], [37])
    swapped = store.each(lambda tensor: tensor[[1, 0]]).read()
    read = store.read()
    assert swapped is not None and read is not None and torch.equal(swapped, read[[1, 0]])


def test_nothing_keeps_its_sources_alive() -> None:
    big = torch.randn(2, 3, 1000, 8)
    store = Store(Integer(4), window=4).append(big[:, :, :3]).append(big[:, :, 3:9])
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in store.tensors())
