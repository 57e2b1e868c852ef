"""Who reads what: one forward pass of a few tokens, watched. Knows no architecture by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from methods.model.structure import Feed
from methods.model.weights import is_norm_like, weight_of

Address = tuple[int, int]
"""A tensor by where it lies and how long it is, so that a reshaped view is the same tensor."""


Value = TypeVar("Value")


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed, by module path.

    calls: the paths called, in order, repeats included; reads: the tensor that a module with weights of its own read first;
    normed: the norm that wrote a tensor; logits: (1, t, n_vocab) fp32; width: channels of the first block's input.
    """

    calls: tuple[str, ...]
    reads: Mapping[str, Address]
    normed: Mapping[Address, str]
    logits: Tensor
    width: int


@dataclass
class _Record:
    calls: list[str] = field(default_factory=list)
    reads: dict[str, Address] = field(default_factory=dict)
    normed: dict[Address, str] = field(default_factory=dict)
    width: int = 0
    # An address means one tensor only as long as that tensor lives.
    alive: list[Tensor] = field(default_factory=list)


def probe_tokens(n_vocab: int, length: int = 9) -> Tensor:
    """A few different token ids (1, length), away from the special ones at the start."""
    return (torch.arange(length) * 7 + 5).remainder(n_vocab)[None]


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor, blocks: Collection[str]) -> Trace:
    """Runs the model on ids (1, t) once; the model comes back as it was.

    A model without memory (on the device `meta`) is asked in a few ways until its forward pass looks at no values; raises what the first
    one raised where it always does.
    """
    ids = ids.to(next(model.parameters()).device)
    if not ids.is_meta:
        return _traced(model, ids, blocks, {})
    return blind(ids, lambda given: _traced(model, ids, blocks, given))


def blind(ids: Tensor, run: Callable[[Mapping[str, Tensor]], Value]) -> Value:
    """What `run` gives for a model without memory and token ids (1, t) of no values, under the arguments with which it looks at no values.

    A mask that is given whole spares transformers such looks. Raises what the first way raised where there is none.
    """
    t = ids.shape[1]
    whole = {"attention_mask": torch.ones(1, 1, t, t, dtype=torch.bool, device="meta")}
    problem: Exception | None = None
    for given in (whole, {**whole, "position_ids": torch.arange(t, device="meta")[None]}, {}):
        try:
            return run(given)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _traced(model: nn.Module, ids: Tensor, blocks: Collection[str], given: Mapping[str, Tensor]) -> Trace:
    record = _Record()
    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            if name in blocks or next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_pre_hook(_reader(record, name, name in blocks), with_kwargs=True))
            if is_norm_like(module):
                handles.append(module.register_forward_hook(_writer(record, name)))
        logits = logits_of(model, ids, **given)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(tuple(record.calls), record.reads, record.normed, logits, record.width)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, **given: Tensor) -> Tensor:
    """Logits (b, t, n_vocab) fp32 of token ids (b, t), without a cache; given: what else the forward pass is to take."""
    result: Tensor = model(input_ids=ids, use_cache=False, **given).logits
    return result.float()


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a module is called on: its first positional argument, else `hidden_states` or the first tensor named."""
    candidates = [*args[:1], kwargs.get("hidden_states"), *kwargs.values()]
    return next((value for value in candidates if isinstance(value, Tensor)), None)


def folds(
    model: nn.Module,
    ids: Tensor,
    expected: Tensor,
    norms: Mapping[str, Collection[str]],
    feeds: Mapping[str, Feed] = MappingProxyType({}),
) -> bool:
    """Whether random gains on these norms' outputs cancel against the same divisors on the inputs of the linears listed.

    Likewise gains on the rows that feed linears, by these linears' names, biases included.
    Gains are powers of two, so that the logits are those of before up to rounding wherever nothing else reads the norm or the rows.
    expected: the logits of ids without any of this.
    """
    with _scaled(model, norms, feeds):
        found = logits_of(model, ids)
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@contextlib.contextmanager
def _scaled(model: nn.Module, norms: Mapping[str, Collection[str]], feeds: Mapping[str, Feed]) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    handles: list[RemovableHandle] = []

    def random_gains(n: int, like: Tensor) -> Tensor:
        return torch.exp2(torch.randint(-2, 3, (n,), generator=generator).to(like))

    def multiply(path: str, gain: Tensor) -> None:
        handles.append(model.get_submodule(path).register_forward_hook(lambda _module, _args, out: out * gain))

    def divide(path: str, gain: Tensor) -> None:
        linear = model.get_submodule(path)
        handles.append(linear.register_forward_pre_hook(lambda _module, args: (args[0] / gain, *args[1:])))

    try:
        for norm, linears in norms.items():
            like = next(model.get_submodule(norm).parameters())
            gain = random_gains(like.numel(), like)
            multiply(norm, gain)
            for name in linears:
                divide(name, gain)
        for name, feed in feeds.items():
            rows = feed.rows(weight_of(model.get_submodule(name)).shape[1])
            weight = weight_of(model.get_submodule(feed.layer))
            gain = random_gains(weight.shape[0], weight)
            written = torch.ones_like(gain)
            written[rows] = gain[rows]
            multiply(feed.layer, written)
            divide(name, gain[rows])
        yield
    finally:
        for handle in handles:
            handle.remove()


def _address(record: _Record, tensor: Tensor) -> Address:
    record.alive.append(tensor)
    if tensor.is_meta:  # no memory, but a storage of its own
        return hash((tensor.untyped_storage()._cdata, tensor.storage_offset())), tensor.numel()
    return tensor.data_ptr(), tensor.numel()


def _reader(record: _Record, name: str, is_block: bool) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.calls.append(name)
        tensor = first_tensor(args, kwargs)
        if tensor is None:
            return
        record.reads.setdefault(name, _address(record, tensor))
        if is_block and not record.width:
            record.width = tensor.shape[-1]

    return hook


def _writer(record: _Record, name: str) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            record.normed[_address(record, output)] = name

    return hook
