"""Whether an exported folder is the model that was evaluated: weights one by one, and what it predicts of a text, token by token."""

from __future__ import annotations

import contextlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from methods import policy_file
from methods.formats.format import Format, parse_format
from methods.formats.numerics import DTYPES
from methods.model.experts import stock_state_dict
from methods.model.quiet import quiet
from methods.model.structure import Structure


@dataclass(frozen=True)
class Verification:
    """The outcome of loading a folder and comparing it; losses in nats per token, `ok` where `message` has nothing to object.

    kl, top1: mean KL divergence from the evaluated model's predictions, and the share of positions with the same likeliest token: equal
    mean losses can hide different predictions.
    max_weight_diff: largest absolute difference of any tensor, compressed or not; n_linears: compressed linears compared.
    load_tested: whether a runtime loaded the folder; where not, weights and losses are nan.
    """

    max_weight_diff: float
    nll_reference: float
    nll_loaded: float
    n_linears: int
    ok: bool
    message: str
    load_tested: bool = True
    kl: float = math.nan
    top1: float = math.nan

    @property
    def summary(self) -> str:
        """What was compared, in a line for people."""
        if not self.load_tested:
            return f"not load-tested; {self.message}"
        return (
            f"loaded back, weights differ by {self.max_weight_diff:g} over {self.n_linears} linears, NLL {self.nll_loaded:.4f} "
            f"against {self.nll_reference:.4f} evaluated, KL {self.kl:.2g} nats per token, same likeliest token at {self.top1:.1%}"
        )


def not_loaded(n_linears: int, problem: str, message: str) -> Verification:
    """The outcome for a folder that no runtime at hand loads: `problem`, "" where its configuration is what it should be."""
    nan = float("nan")
    return Verification(nan, nan, nan, n_linears, not problem, problem or message, load_tested=False)


@dataclass(frozen=True)
class Tolerance:
    """How far what a runtime predicts may be from what was evaluated: nats per token of the mean loss, and of KL divergence."""

    nll: float
    kl: float


EXACT = Tolerance(1e-3, 1e-5)
"""Of the same weights and inputs in fp32: what is left is the order of sums."""

ROUNDED = Tolerance(0.03, 0.01)
"""Where inputs are rounded to 8 bits, which each engine does in its own way."""

REROUTED = Tolerance(0.03, 0.03)
"""Where weights of experts are rounded, which may send a token to another expert."""

UNJUDGED = Tolerance(math.inf, math.inf)
"""Where the runtime leaves out a rounding that was evaluated: what it predicts is told and not judged."""

_ROWS = 32
"""Positions whose probabilities exist at once."""


def predictions(model: Any, ids: Tensor) -> Tensor:
    """Logits (b, t - 1, n_vocab) fp32 of what follows the beginnings of token ids (b, t)."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits


def nll(logits: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood (nats per token) of token ids (b, t) by `predictions`, the first of each row given."""
    with torch.inference_mode():
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def agreement(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KL divergence of predictions from the expected ones, both (b, t, n_vocab), and the share of equal likeliest tokens."""
    kl, same, n = 0.0, 0, expected.shape[0] * expected.shape[1]
    with torch.inference_mode():
        for start in range(0, n, _ROWS):
            p, q = (logits.flatten(0, 1)[start : start + _ROWS] for logits in (expected, found))
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return max(kl / n, 0.0) if math.isfinite(kl) else math.inf, same / n


def stock(folder: Path, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The folder's model by `AutoModelForCausalLM.from_pretrained`, and what it says of missing and unexpected keys.

    Raises what transformers raises for a folder it cannot load.
    """
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    model, info = loaded
    return model.eval(), info


def _stock_fp32(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    return stock(folder, dtype=torch.float32)


def _tensors(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


def compare(
    folder: Path,
    reference: Any,
    ids: Tensor,
    linears: list[str],
    tolerance: Tolerance,
    load: Callable[[Path], tuple[Any, Mapping[str, Any]]] = _stock_fp32,
    weights: Callable[[Any], Mapping[str, Tensor]] = _tensors,
    rounded: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Verification:
    """Loads the folder in a runtime that computes in fp32 and compares every tensor of the reference with its own.

    reference: a model in fp32 with the edits installed; linears: the compressed ones by name; weights have to be equal bit for bit.
    rounded: tensors, by stock names, that the runtime rounds to a dtype whatever it computes in.
    load, weights: the model with `stock`'s information, and its decoded tensors by the reference's names. The forward pass comes
    first: compressed-tensors decompresses then.
    """
    model, info = load(folder)
    with _same_buffers(reference, model):
        evaluated = predictions(reference, ids)
    with quiet():
        loaded = predictions(model, ids)
    expected, found = nll(evaluated, ids), nll(loaded, ids)
    kl, top1 = agreement(evaluated, loaded)
    weights_evaluated = stock_state_dict(reference)
    weights_evaluated |= {name: weights_evaluated[name].to(dtype) for name, dtype in rounded.items()}
    diff, worst = _largest_difference(weights_evaluated, weights(model))
    problems = [
        f"{kind.replace('_', ' ')}: {sorted(info[kind])[:3]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]
    ]
    if diff != 0.0:
        problems.append(f"{worst} differs from the evaluated weights by up to {diff:.3g}")
    if not abs(found - expected) <= tolerance.nll:
        problems.append(f"loss {found:.4f} instead of {expected:.4f} nats per token, more than {tolerance.nll} apart")
    if not kl <= tolerance.kl:
        problems.append(
            f"its predictions have KL {kl:.2g} from the evaluated ones, more than {tolerance.kl:g} nats per token, and the same likeliest "
            f"token at {top1:.1%} of positions"
        )
    message = "; ".join(problems) or f"all tensors are equal, {len(linears)} of them compressed linears"
    return Verification(diff, expected, found, len(linears), not problems, message, kl=kl, top1=top1)


@contextlib.contextmanager
def _same_buffers(reference: Any, model: Any) -> Iterator[None]:
    """The reference with the loaded model's constants that no folder holds, where they are its own rounded to 16 bits.

    Such a constant (Gemma's scale of embeddings) is made in the dtype that a model is loaded in.
    """
    stored, found = set(model.state_dict()), dict(model.named_buffers())
    own = {name: buffer for name, buffer in reference.named_buffers() if name not in stored and name in found}
    rounded = {name: found[name].to(buffer) for name, buffer in own.items() if _is_rounded(buffer, found[name])}
    before = {name: own[name].clone() for name in rounded}
    for name, buffer in rounded.items():
        own[name].copy_(buffer)
    try:
        yield
    finally:
        for name, buffer in before.items():
            own[name].copy_(buffer)


def _is_rounded(own: Tensor, found: Tensor) -> bool:
    if not own.is_floating_point() or own.shape != found.shape:
        return False
    return any(torch.equal(own.to(dtype).to(own), found.to(own)) for dtype in (torch.bfloat16, torch.float16))


def _largest_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, str]:
    largest, worst = 0.0, ""
    for name, tensor in expected.items():
        other = found.get(name)
        if other is None or other.shape != tensor.shape or not torch.isfinite(other).all():
            return float("inf"), name
        diff = float((tensor.float() - other.float()).abs().max()) if tensor.numel() else 0.0
        if diff > largest:
            largest, worst = diff, name
    return largest, worst


@contextlib.contextmanager
def inputs_alone(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model has its weights as they are but no forward pre-hook: nothing rounds the inputs of its linears."""
    held = [(module, module._forward_pre_hooks) for module in model.modules()]
    try:
        for module, _ in held:
            module._forward_pre_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in held:
            module._forward_pre_hooks = hooks


def policy_formats(folder: Path, structure: Structure) -> dict[str, Format]:
    """The formats, by linear, of the folder's `policy.yaml`; raises ValueError where that is another model's."""
    policy = policy_file.read(folder / "policy.yaml", structure).policy
    found = ((layer.name, policy.at(site.name)[-1].knob("format")) for site, layer in structure.layers())
    return {name: parse_format(str(fmt)) for name, fmt in found if fmt is not None}


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of the folder; raises ValueError where it is missing or none."""
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); export again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object; export again")
    return config


def storage_dtype(folder: Path) -> str:
    """The dtype of the folder's `config.json` by its short name (`bf16`, …)."""
    dtype = getattr(torch, str(read_config(folder)["dtype"]))
    return next(name for name, known in DTYPES.items() if known == dtype)
