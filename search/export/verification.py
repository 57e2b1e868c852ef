"""Whether an exported folder is the model that was evaluated: weights one by one, and the loss of a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.model.experts import stock_state_dict
from methods.model.quiet import quiet


@dataclass(frozen=True)
class Verification:
    """The outcome of loading a folder and comparing it; losses in nats per token, `ok` where `message` has nothing to object.

    max_weight_diff: largest absolute difference of any tensor, compressed or not; n_linears: compressed linears compared.
    """

    max_weight_diff: float
    nll_reference: float
    nll_loaded: float
    n_linears: int
    ok: bool
    message: str


def nll(model: Any, ids: Tensor) -> float:
    """Mean negative log-likelihood (nats per token) of token ids (b, t), the first of each row given."""
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return float(loss)


def compare(folder: Path, reference: Any, ids: Tensor, linears: list[str], nll_tolerance: float) -> Verification:
    """Loads the folder with stock transformers in fp32 and compares every tensor of the reference with its own.

    reference: a model in fp32 with the edits installed; linears: the compressed ones by name; weights have to be equal bit for bit.
    The forward pass comes first: compressed-tensors decompresses then. Raises what transformers raises for a folder it cannot load.
    """
    from transformers import AutoModelForCausalLM

    expected = nll(reference, ids)
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
        found = nll(model.eval(), ids)
    diff, worst = _largest_difference(stock_state_dict(reference), dict(model.state_dict()))
    problems = [
        f"{kind.replace('_', ' ')}: {sorted(info[kind])[:3]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]
    ]
    if diff != 0.0:
        problems.append(f"{worst} differs from the evaluated weights by up to {diff:.3g}")
    if not abs(found - expected) <= nll_tolerance:
        problems.append(f"loss {found:.4f} instead of {expected:.4f} nats per token, more than {nll_tolerance} apart")
    message = "; ".join(problems) or f"all tensors are equal, {len(linears)} of them compressed linears"
    return Verification(diff, expected, found, len(linears), not problems, message)


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


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; raises ValueError where it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); export again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object; export again")
    return config
