"""llama.cpp itself, through the optional package xllamacpp: what it makes of a GGUF's text, tokens and probabilities."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"
_FIRST = 1024
"""Likeliest tokens that are asked for first: nearly always enough, and a whole vocabulary takes half a second."""

_WHOLE = "0"
"""A text whose tokens are whole characters in every vocabulary; one of them is written."""

_SURELY = 1e4
"""Nats that are added to them where the next token is chosen, which leaves the probabilities that are told as the model has them."""


class LlamaCppRefusal(ValueError):
    """A file that llama.cpp does not load or run, or the package that is not installed."""


def installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp:
    """A GGUF loaded by llama.cpp on the CPU with one sequence; raises LlamaCppRefusal where it cannot be.

    n_context: the most tokens of a call, those it writes included; n_vocab: of the model.
    """

    def __init__(self, path: Path, n_context: int, n_vocab: int, n_threads: int = 1) -> None:
        if not installed():
            raise LlamaCppRefusal(f"running llama.cpp needs the package {PACKAGE}; pip install {PACKAGE}")
        xllamacpp: Any = importlib.import_module(PACKAGE)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = n_context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        params.n_gpu_layers, params.warmup, params.verbosity = 0, False, -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise LlamaCppRefusal(f"llama.cpp does not load {path} ({error})") from None
        self._n_vocab = n_vocab

    def predictions(self, ids: Sequence[int]) -> list[Mapping[int, float]]:
        """Log-probabilities of the likeliest tokens after every beginning of `ids`, the token that follows among them: one step each."""
        return [self._likeliest(list(ids[:at]), ids[at]) for at in range(1, len(ids))]

    def reads_as(self, text: str, ids: Sequence[int]) -> bool:
        """Whether llama.cpp makes these tokens of a text, for as much of them as `n_context` holds.

        Its tokens are not told. The ids are run first; a text that is the same then finds all but its last token in the cache, which is
        computed again and has to give the same probabilities.
        """
        self._complete(list(ids), 8)
        expected, found = self._complete(list(ids), 8), self._complete(text, 8)
        return all(expected[key] == found[key] for key in ("tokens", "cached", "top"))

    def write(self, prompt: str | Sequence[int], n_tokens: int) -> str:
        """What it writes greedily after a prompt."""
        answer = self._ask(prompt if isinstance(prompt, str) else list(prompt), {"max_tokens": n_tokens})
        return str(answer["choices"][0]["text"])

    def _likeliest(self, given: list[int], token: int) -> Mapping[int, float]:
        for n_probs in (min(_FIRST, self._n_vocab), self._n_vocab):
            found: Mapping[int, float] = self._complete(given, n_probs)["top"]
            if token in found:
                return found
        raise LlamaCppRefusal(f"llama.cpp gives the token {token} no probability; the file has another vocabulary")

    def _complete(self, prompt: str | list[int], n_probs: int) -> dict[str, Any]:
        """The next token's likeliest ids with their log-probabilities, and how many tokens the prompt had and the cache held."""
        # llama.cpp keeps back the probabilities of a step whose token ends inside a character, and tells a later step's in their place
        # once the character is whole. So the token that is written is one that ends a character, whatever the model would choose.
        asked = {
            "max_tokens": 1,
            "ignore_eos": True,
            "logprobs": n_probs,
            "n_probs": n_probs,
            "logit_bias": [[_WHOLE, _SURELY]],
        }
        answer = self._ask(prompt, asked)
        told = answer["choices"][0]["logprobs"]
        if told is None:
            raise LlamaCppRefusal(
                f"llama.cpp tells no probabilities after {str(prompt)[:60]!r}; its vocabulary has no token for {_WHOLE!r}"
            )
        top = told["content"][0]["top_logprobs"]
        usage = answer["usage"]
        return {
            "tokens": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "top": {entry["id"]: entry["logprob"] for entry in top},
        }

    def _ask(self, prompt: str | list[int], options: dict[str, Any]) -> dict[str, Any]:
        # A temperature below zero is its way to say: the likeliest, and probabilities of all tokens as the model has them.
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": prompt, "temperature": -1, "cache_prompt": True, **options}
        )
        if "choices" not in answer:
            raise LlamaCppRefusal(f"llama.cpp does not run the prompt: {answer.get('error', answer)}")
        return answer
