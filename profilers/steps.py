"""One step of a workload on a whole model, repeatable: what is timed, and on CUDA also what `search generate` runs for every token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from profilers.kv_cache import fixed_cache, new_cache
from profilers.workload import Workload


class Repeatable(Protocol):
    """A step that, undone, can be taken again."""

    def __call__(self) -> Tensor:
        """The next token of each sequence (batch,)."""
        ...

    def reset(self) -> None:
        """Undoes it."""
        ...


def once(step: Repeatable) -> Tensor:
    """A step and its undoing, also where it fails half-way."""
    try:
        return step()
    finally:
        step.reset()


class Step:
    """One step of a workload on a model, repeatable: after a decode step the cache is as it was before."""

    def __init__(self, model: Any, workload: Workload, seed: int = 0, make_cache: Callable[[Any], Any] = new_cache) -> None:
        """make_cache: the model -> its empty cache."""
        self.model = model
        self.workload = workload
        self._make_cache = make_cache
        self._prompt, self._token = _ids(model, workload, seed)
        self._cache: Any = None
        self._before: list[dict[str, Any]] = []
        self.prepare()

    def prepare(self) -> None:
        """Fills the cache with the context (decode); the cache that `generate` uses, sliding windows included."""
        if self.workload.phase == "prefill":
            return
        self._cache = self._make_cache(self.model)
        _last_logits(self.model, self._prompt, self._cache)
        self._before = [dict(vars(layer)) for layer in self._cache.layers]

    def __call__(self) -> Tensor:
        """The next token of each sequence (batch,): forward and argmax."""
        if self.workload.phase == "decode":
            return _last_logits(self.model, self._token, self._cache).argmax(-1)
        return _last_logits(self.model, self._prompt, self._make_cache(self.model)).argmax(-1)

    def reset(self) -> None:
        """Drops what the step added to the cache: layers never overwrite what they held, so their old state is still whole."""
        for layer, before in zip(self._cache.layers if self._cache else (), self._before, strict=True):
            vars(layer).update(before)


class FixedStep:
    """A decode step on a cache of fixed length, of which every tensor stays where it is: it can be captured in a CUDA graph.

    It reads `token` (batch, 1) and the cache up to `place`, and writes `following` (batch, 1). What it adds to the cache lies behind
    `place` until `advance`; a step that is repeated writes the same there again, so nothing has to be undone.
    """

    def __init__(self, model: Any, prompt: Tensor, length: int, token: Tensor | None = None) -> None:
        """Reads a prompt (batch, tokens) into a cache of `length`; token (batch, 1): what follows it, by default what the model says.

        Raises ValueError where the prompt leaves no room, and for a model that caches more than keys and values.
        """
        if prompt.shape[1] >= length:
            raise ValueError(f"a cache of {length} tokens has no room behind a prompt of {prompt.shape[1]}; make it longer")
        self.model = model
        self.cache, self.place = fixed_cache(model, length)
        said = _last_logits(model, prompt, self.cache).argmax(-1, keepdim=True)
        self.place.fill_(prompt.shape[1])
        self.token = said if token is None else token.clone()
        self.following = torch.empty_like(said)
        self._left = length - prompt.shape[1]

    @classmethod
    def of(cls, model: Any, workload: Workload, seed: int = 0) -> FixedStep:
        """The step of a decode workload on the same random tokens as `Step`'s."""
        prompt, token = _ids(model, workload, seed)
        return cls(model, prompt, workload.context + 1, token)

    def __call__(self) -> Tensor:
        """`following`, flat (batch,): forward and argmax."""
        self.following.copy_(_last_logits(self.model, self.token, self.cache).argmax(-1, keepdim=True))
        return self.following[:, 0]

    def reset(self) -> None:
        """Nothing: see above."""

    def advance(self) -> None:
        """Goes on behind the token that the last step read, with the one that follows it; raises ValueError at the cache's end."""
        self._left -= 1
        if self._left < 1:
            raise ValueError("the cache is full; make the step with a greater length")
        self.token.copy_(self.following)
        self.place += 1


def _ids(model: Any, workload: Workload, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens on the model's device: what is read first (batch, length), and one more of each sequence (batch, 1)."""
    generator = torch.Generator().manual_seed(seed)
    n_vocab = int(model.config.vocab_size)
    length = workload.context if workload.phase == "decode" else workload.prompt
    device = model.get_input_embeddings().weight.device
    prompt = torch.randint(0, n_vocab, (workload.batch, length), generator=generator)
    token = torch.randint(0, n_vocab, (workload.batch, 1), generator=generator)
    return prompt.to(device), token.to(device)


def _last_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """(batch, vocabulary): of the last position alone where the model can leave the others out."""
    options = {"logits_to_keep": 1} if _keeps_logits(type(model).forward) else {}
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits
    return logits[:, -1]


@functools.cache
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
