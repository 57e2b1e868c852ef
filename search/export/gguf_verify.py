"""Whether a GGUF is the model that was evaluated: its types, every tensor, the tokenizer, and the losses of two runtimes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.formats.gguf_types import block_type
from methods.model.describe import describe
from methods.model.experts import stock_state_dict
from methods.model.gguf import as_stored
from methods.model.quiet import quiet
from methods.model.structure import Structure
from search.export.gguf_layout import MODEL, family, names, row_order
from search.export.gguf_rope import TENSOR, divisors, kind_of
from search.export.llama_cpp import LlamaCpp, LlamaCppRefusal, installed
from search.export.verification import (
    EXACT,
    Tolerance,
    Verification,
    compare,
    inputs_alone,
    nll,
    policy_formats,
    predictions,
    stock,
)

LLAMA = Tolerance(0.03, 0.01)
"""llama.cpp rounds inputs to 8 bits in blocks, keys and values to fp16, and sums in another order."""
LLAMA_TOKENS = 48
"""How many tokens of the text llama.cpp predicts, at most."""


def verify(folder: Path, reference: Any, ids: Tensor) -> Verification:
    """Reads the file with `gguf`, loads it with transformers and, where xllamacpp is installed, with llama.cpp, and compares.

    Of a model whose rotary embedding is scaled, which transformers would read without that, this project's own reader takes its place.

    reference: the fp32 model with the edits installed; ids: (b, t) token ids, of which llama.cpp gets the first row's beginning.
    Types have to be the policy's, all tensors equal bit for bit, tokens those that the evaluated tokenizer makes. transformers rounds no
    inputs and is compared with the reference without that; llama.cpp, which does, with the reference as it is: the losses that are
    returned are of these tokens where it ran, else those of transformers.
    """
    with inputs_alone(reference):
        structure = describe(reference)
    problems = _file_problems(folder, reference, structure)
    # A file whose tensors do not fit is not handed to runtimes, which would read past them.
    if problems:
        return Verification(float("inf"), float("nan"), float("nan"), 0, False, "; ".join(problems))
    linears = list(policy_formats(folder, structure))
    with inputs_alone(reference):
        check = compare(folder, reference, ids, linears, EXACT, load=_load_here if _scaled(reference) else _load)
    problems = [] if check.ok else [check.message]
    probes = _probes(folder)
    problems += _transformers_tokens(folder, probes)
    if not installed():
        message = "; ".join(problems) or f"{check.message}; llama.cpp was not run, because xllamacpp is not installed"
        return replace(check, ok=not problems, message=message)
    return _with_llama_cpp(folder, reference, ids[0, : LLAMA_TOKENS + 1], probes, check, problems)


def _load(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    return stock(folder, gguf_file=MODEL, dtype=torch.float32)


def _load_here(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The model as this project reads it: transformers leaves out what scales its rotary embedding."""
    return as_stored(folder / MODEL), {"missing_keys": [], "unexpected_keys": []}


def _scaled(reference: Any) -> bool:
    return kind_of(reference.config) != "default"


def _file_problems(folder: Path, reference: Any, structure: Structure) -> list[str]:
    """What `gguf` finds in the file that is not the policy's type or the reference's tensor; at most a few lines."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    kind = family(structure, reference.config)
    try:
        tensors = {tensor.name: tensor for tensor in GGUFReader(folder / MODEL).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        return [f"{MODEL} cannot be read ({error}); export again"]
    types = {f"{name}.weight": block_type(fmt) for name, fmt in policy_formats(folder, structure).items()}
    expected = stock_state_dict(reference)
    if structure.tied:
        expected.pop(f"{structure.head}.weight", None)
    problems = []
    for parameter, name in names(expected, structure, kind).items():
        tensor = tensors.pop(name, None)
        if tensor is None:
            problems.append(f"{name} is missing")
            continue
        wanted = types.get(parameter)
        if wanted not in (None, tensor.tensor_type.name):
            problems.append(f"{name} is {tensor.tensor_type.name}, the policy decides {wanted}")
            continue
        order = row_order(parameter, structure, kind)
        rows = expected[parameter].float().numpy()
        if not np.array_equal(dequantize(tensor.data, tensor.tensor_type), rows if order is None else rows[order]):
            problems.append(f"{name} does not decode to the evaluated weights")
    divided, held = divisors(reference.config, structure.head_dim), tensors.pop(TENSOR, None)
    if divided is not None and (held is None or not np.array_equal(held.data, divided)):
        problems.append(f"{TENSOR} does not hold the divisors of the rotary frequencies")
    problems += [f"{name} is none of the model's" for name in tensors]
    return [*problems[:3], f"{len(problems) - 3} more"] if len(problems) > 3 else problems


def _probes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    return found


def _transformers_tokens(folder: Path, probes: Mapping[str, list[int]]) -> list[str]:
    """The texts of which the file's tokenizer, in transformers, makes other tokens than the evaluated one did."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL, local_files_only=True)
    wrong = [text for text, ids in probes.items() if tokenizer(text)["input_ids"] != ids]
    return [f"transformers reads other tokens in {wrong[0]!r} and {len(wrong) - 1} more texts"] if wrong else []


def _with_llama_cpp(
    folder: Path, reference: Any, ids: Tensor, probes: Mapping[str, list[int]], check: Verification, problems: list[str]
) -> Verification:
    """The outcome with what llama.cpp computes; ids: (t,)."""
    evaluated, given = predictions(reference, ids[None]), [int(index) for index in ids]
    expected = nll(evaluated, ids[None])
    longest = max(len(given), *(len(tokens) for tokens in probes.values()))
    try:
        engine = LlamaCpp(folder / MODEL, longest + 8, int(reference.config.vocab_size), torch.get_num_threads())
        wrong = [text for text, tokens in probes.items() if not engine.reads_as(text, tokens)]
        likeliest = engine.predictions(given)
    except LlamaCppRefusal as error:
        return replace(check, nll_reference=expected, nll_loaded=math.nan, ok=False, message="; ".join([*problems, str(error)]))
    found = -math.fsum(own[token] for own, token in zip(likeliest, given[1:], strict=True)) / len(likeliest)
    kl, top1 = _agreement(evaluated[0], likeliest)
    if wrong:
        problems.append(f"llama.cpp reads other tokens in {wrong[0]!r} and {len(wrong) - 1} more texts")
    if not (abs(found - expected) <= LLAMA.nll and kl <= LLAMA.kl):
        problems.append(
            f"llama.cpp has a loss of {found:.4f} instead of {expected:.4f} and KL {kl:.2g} nats per token, more than {LLAMA.nll} "
            f"and {LLAMA.kl} apart"
        )
    reader = "read here, it" if _scaled(reference) else "transformers"
    said = (
        f"{check.message}, tokens too; {reader} has a loss of {check.nll_loaded:.4f} on the text, llama.cpp of {found:.4f} on its "
        f"first {len(given) - 1} tokens, with KL {kl:.2g} and the same likeliest token at {top1:.1%} of them"
    )
    message = "; ".join(problems) or said
    return replace(check, nll_reference=expected, nll_loaded=found, kl=kl, top1=top1, ok=not problems, message=message)


def _agreement(expected: Tensor, found: Sequence[Mapping[int, float]]) -> tuple[float, float]:
    """KL divergence over the tokens that llama.cpp tells, all others as one, which makes it no larger; and equal likeliest tokens.

    expected: logits (t, n_vocab) at the positions of `found`.
    """
    kl, same = 0.0, 0
    for log_p, own in zip(expected.double().log_softmax(-1), found, strict=True):
        tokens = list(own)
        mine, theirs = log_p[tokens], torch.tensor([own[token] for token in tokens], dtype=torch.float64)
        p_rest, q_rest = (max(1 - float(each.exp().sum()), 1e-12) for each in (mine, theirs))
        kl += float((mine.exp() * (mine - theirs)).sum()) + p_rest * math.log(p_rest / q_rest)
        same += int(log_p.argmax()) == max(own, key=own.__getitem__)
    return max(kl / len(found), 0.0), same / len(found)
