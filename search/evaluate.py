"""True quality of a policy: KL divergence from the dense model and perplexity, with the reference numerics of its formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from methods.apply import Installer
from methods.method import Edit
from methods.model.head import check_projection, final_hidden, project
from methods.model.structure import Structure
from methods.policy import DENSE, Decision, Policy
from methods.threads import shared_out, workers
from methods.typed import AtLeastOne

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK, _LEAST_CHUNK = 128, 16
"""Tokens whose logits exist at once, of all sequences that are worked on together; the fewest of one sequence."""


@dataclass(frozen=True)
class Quality:
    """Per sequence: mean KL divergence from the dense model and mean negative log-likelihood, both in nats per token.

    same_each: the share of positions with the dense model's likeliest token; empty where that is not known.
    """

    kl_each: tuple[float, ...]
    nll_each: tuple[float, ...]
    n_tokens: int
    same_each: tuple[float, ...] = ()

    @property
    def kl(self) -> float:
        """Mean KL divergence, nats per token."""
        return sum(self.kl_each) / len(self.kl_each)

    @property
    def kl_stderr(self) -> float:
        """Standard error of `kl` over sequences; nan for fewer than two."""
        return stderr(self.kl_each)

    @property
    def top1(self) -> float:
        """Share of positions with the dense model's likeliest token; nan where it is not known."""
        return sum(self.same_each) / len(self.same_each) if self.same_each else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(sum(self.nll_each) / len(self.nll_each))


class KeptQuality(TypedDict):
    """A `Quality` in a file."""

    kl_each: list[float]
    nll_each: list[float]
    n_tokens: AtLeastOne
    same_each: NotRequired[list[float]]


def stderr(values: Sequence[float]) -> float:
    """Standard error of the mean; nan for fewer than two values."""
    n = len(values)
    if n < 2:
        return float("nan")
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of `a - b` over the sequences both have, and its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=False)]
    return sum(differences) / len(differences), stderr(differences)


class NotFinite(ArithmeticError):
    """A policy under which the model computes no number; says in which layer that begins."""


class Switch:
    """The one owner of what is installed in a model: a policy from the bank, loose edits, or nothing."""

    def __init__(self, model: nn.Module, structure: Structure, edit_of: Callable[[str, Decision], Edit]) -> None:
        """edit_of(site, decision) reads the bank."""
        self.model, self.structure, self._edit_of = model, structure, edit_of
        self._installer = Installer(model, structure)
        self._installed: dict[str, Decision | None] = {}

    def policy(self, policy: Policy) -> None:
        """Install a policy; only sites that differ from what is there are touched."""
        for site in self.structure.sites:
            decision = policy.at(site.name)[0]
            if self._installed.get(site.name, DENSE) != decision:
                self._installer.install(site.name, None if decision == DENSE else self._edit_of(site.name, decision))
                self._installed[site.name] = decision

    def edits(self, edits: Mapping[str, Edit]) -> None:
        """Install edits by site, and nothing elsewhere."""
        self.dense()
        for site, edit in edits.items():
            self._installer.install(site, edit)
            self._installed[site] = None

    def dense(self) -> None:
        """Give the model back as it was loaded, bit for bit."""
        self._installer.restore()
        self._installed.clear()


class Evaluator:
    """Evaluates policies on one corpus, reusing the dense model's hidden states and every sequence already done."""

    def __init__(self, switch: Switch, tokens: Tensor) -> None:
        """tokens: (n_sequences, length). Raises ValueError where the model's output head is not understood."""
        switch.dense()
        check_projection(switch.model, switch.structure, tokens[:1, :8])
        self.tokens = tokens
        self._switch, self._model, self._structure = switch, switch.model, switch.structure
        self._dense_hidden: list[Tensor] = []
        self._chunk = _CHUNK
        self._done: dict[str, list[tuple[float, float, float]]] = {}

    def evaluate(
        self, policy: Policy, n_sequences: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Quality:
        """Quality on the first `n_sequences` (default: all); sequences done before are not run again.

        Raises NotFinite where the model computes NaN or infinity.
        """
        n = min(n_sequences or len(self.tokens), len(self.tokens))
        self._need_dense(n)
        done = self._done.setdefault(policy.key(), [])
        if len(done) < n:
            self._switch.policy(policy)
            done.extend(self._sequences(range(len(done), n), progress))
        return self._quality(done[:n])

    def dense(self) -> None:
        """Give the model back as it was loaded, whatever an evaluation that failed had installed."""
        self._switch.dense()

    def known(self, policy: Policy, kl_each: Sequence[float]) -> None:
        """Take over the KL of sequences that an earlier process evaluated, in order; their likelihood stays unknown (nan)."""
        done = self._done.setdefault(policy.key(), [])
        if len(kl_each) > len(done):
            self._done[policy.key()] = [(kl, math.nan, math.nan) for kl in kl_each]

    def evaluate_edits(
        self, edits: Mapping[str, Edit], progress: Callable[[int, int], None] | None = None, n_sequences: int | None = None
    ) -> Quality:
        """Quality of a model given by its edits rather than by a policy in the bank (finalists, loaded checkpoints).

        Raises NotFinite where the model computes NaN or infinity.
        """
        n = min(n_sequences or len(self.tokens), len(self.tokens))
        self._need_dense(n)
        self._switch.edits(edits)
        return self._quality(list(self._sequences(range(n), progress, changed=bool(edits))))

    def model_kl(self, other: nn.Module, n_sequences: int) -> Quality:
        """Quality of another model object (real kernels) against the dense reference on the first sequences."""
        self._need_dense(n_sequences)
        result = []
        device = other.get_input_embeddings().weight.device  # type: ignore[operator]
        for index in range(n_sequences):
            with torch.inference_mode():
                ids = self.tokens[index : index + 1].to(device)
                logits = other(input_ids=ids, use_cache=False).logits[0].float().to(self.tokens.device)
            result.append(self._compare(index, lambda part, logits=logits: logits[part]))  # type: ignore[misc]
        return self._quality(result)

    def _quality(self, done: Sequence[tuple[float, float, float]]) -> Quality:
        kl, nll, same = zip(*done, strict=True)
        return Quality(kl, nll, len(done) * self.tokens.shape[1], same)

    def _need_dense(self, n: int) -> None:
        if len(self._dense_hidden) >= n:
            return
        self._switch.dense()
        self._dense_hidden.extend(shared_out(self._hidden, range(len(self._dense_hidden), n)))

    def _sequences(
        self, indices: range, progress: Callable[[int, int], None] | None = None, changed: bool = True
    ) -> Iterator[tuple[float, float, float]]:
        """What `_compare` says of every sequence; changed: whether anything is installed, for the dense model's states are known."""
        self._chunk = max(_LEAST_CHUNK, _CHUNK // workers(len(indices)))

        def compared(index: int) -> tuple[float, float, float]:
            hidden = self._hidden(index) if changed else self._dense_hidden[index]
            return self._compare(index, lambda part: project(self._model, self._structure, hidden[part]))

        for index, found in zip(indices, shared_out(compared, indices), strict=True):
            if not all(map(math.isfinite, found)):
                where = first_not_finite(self._model, self._structure, self.tokens[index : index + 1])
                raise NotFinite(f"the model computes NaN or infinity from {where} on")
            if progress:
                progress(index + 1, indices.stop)
            yield found

    def _hidden(self, index: int) -> Tensor:
        with torch.inference_mode():
            return final_hidden(self._model, self.tokens[index : index + 1])[0]

    def _compare(self, index: int, logits_of: Callable[[slice], Tensor]) -> tuple[float, float, float]:
        """(KL from dense, negative log-likelihood, share of dense's likeliest tokens), means over the sequence's positions and targets."""
        ids = self.tokens[index]
        kl = nll = 0.0
        same = 0
        with torch.inference_mode():
            for part in _parts(len(ids), self._chunk):
                q, p = logits_of(part), project(self._model, self._structure, self._dense_hidden[index][part])
                norm_q, norm_p = q.logsumexp(-1), p.logsumexp(-1)
                targets = ids[part.start + 1 : part.stop + 1]
                nll += float((norm_q[: len(targets)] - q[: len(targets)].gather(-1, targets[:, None])[:, 0]).double().sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                # sum_v p (log p - log q), with the norms taken out so that the vocabulary is passed over as seldom as possible
                difference = p - q
                weighted = p.sub_(norm_p[:, None]).exp_().mul_(difference).sum(-1)
                kl += float((weighted - norm_p + norm_q).double().sum())
        return kl / len(ids), nll / (len(ids) - 1), same / len(ids)


def first_not_finite(model: nn.Module, structure: Structure, tokens: Tensor) -> str:
    """The first linear, in the order of computation, whose output for tokens (b, t) holds NaN or infinity; else `the output head`."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not found and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [model.get_submodule(layer.name).register_forward_hook(look(layer.name)) for _, layer in structure.layers()]
    try:
        with torch.inference_mode():
            final_hidden(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the output head"


def _parts(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
