"""From the decoder's final hidden states to logits, in pieces, so that no (tokens, vocabulary) tensor of a whole text exists."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.model.products import fast_linears
from methods.model.structure import Structure


def final_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """Final hidden states (b, t, d) of token ids (b, t): what the output projection reads."""
    with fast_linears():
        return model.base_model(input_ids=ids, use_cache=False)[0]  # type: ignore[operator, no-any-return]


def project(model: nn.Module, structure: Structure, hidden: Tensor) -> Tensor:
    """Logits (…, n_vocab) fp32 of final hidden states (…, d), with the scale or soft cap that the configuration names."""
    with fast_linears():
        logits = model.get_submodule(structure.head)(hidden).float()
    config = model.config
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits  # type: ignore[no-any-return]


def check_projection(model: nn.Module, structure: Structure, ids: Tensor) -> None:
    """Raise ValueError where `project(final_hidden(…))` is not what the model itself computes."""
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = project(model, structure, final_hidden(model, ids))
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not error < 1e-3:
        raise ValueError(
            f"{structure.architecture}: its output head is not understood (logits differ by {float(error):.2g} of their range); "
            "teach methods/model/head.py what stands between the final norm and the logits"
        )
