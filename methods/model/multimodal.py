"""The language model inside a checkpoint that also holds a vision or an audio tower, as a causal language model of its own.

What is compressed and exported is that model alone; it is taken only where its logits on text are those of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from methods.model.experts import UnsupportedModel
from methods.model.quiet import quiet
from methods.model.trace import logits_of, probe_tokens

TEXT_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
"""The `model_type` that computes the same on text, and what its configuration has to say for that, by the `model_type` of text models
that transformers has no causal class for."""

_ROTARY_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""Entries of `rope_parameters` that matter where positions have several axes, which those of text have not."""


def whole_class(config: Mapping[str, Any]) -> str | None:
    """The transformers class that loads the checkpoint of a `config.json` with a tower beside its text model; None for a text model."""
    from transformers.models.auto import modeling_auto as auto

    kind, named = str(config.get("model_type")), set(config.get("architectures") or [])
    known = {
        str(names[kind])
        for names in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
        if kind in names
    }
    found = sorted(named & known if named else known)
    return found[0] if found else None


def what(config: Mapping[str, Any]) -> str:
    """What to call the checkpoint of a `config.json` with a tower: a vision-language checkpoint, an audio-language one."""
    sense = "an audio-language" if "audio_config" in config and "vision_config" not in config else "a vision-language"
    return f"{sense} checkpoint ({(config.get('architectures') or [config.get('model_type')])[0]})"


@torch.no_grad()
def language_model(whole: Any) -> Any:
    """The causal language model of text inside `whole`, a model of transformers in eval mode; it shares the tensors.

    Raises UnsupportedModel where it cannot be taken out, or computes something else on text than `whole` does.
    """
    if not isinstance(whole.get_output_embeddings(), nn.Module):
        raise UnsupportedModel("it has no output projection to a vocabulary")
    config = _text_config(whole)
    frame = _frame(config)
    state = _state(whole, frame)
    with quiet():
        model = type(frame).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    ids = probe_tokens(config.vocab_size)
    expected, found = logits_of(whole, ids), logits_of(model, ids)
    if not (found - expected).abs().max() <= 1e-4 * expected.abs().max():
        raise UnsupportedModel(f"its text model alone ({type(model).__name__}) computes other logits than the whole")
    model.generation_config = whole.generation_config
    return model


def text_configuration(kind: str, config: Any) -> Any:
    """The configuration of the text model inside a checkpoint of a transformers class and configuration, before a weight is read.

    Raises UnsupportedModel as `language_model` does for what shapes tell.
    """
    import transformers

    with torch.device("meta"):
        whole = getattr(transformers, kind)(config)
        whole.tie_weights()
    if not isinstance(whole.get_output_embeddings(), nn.Module):
        raise UnsupportedModel("it has no output projection to a vocabulary")
    found = _text_config(whole)
    _state(whole, _frame(found))
    return found


def _text_config(whole: Any) -> Any:
    """A configuration of the text model that a causal class of transformers takes."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = whole.config.get_text_config(decoder=True)
    kind = config.model_type
    if config is whole.config or kind not in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *TEXT_KINDS}:
        raise UnsupportedModel(f"this transformers has no causal language model of text for its text model ({kind})")
    entries = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    rotary = entries.get("rope_parameters")
    if kind in TEXT_KINDS and isinstance(rotary, dict):
        entries["rope_parameters"] = {name: value for name, value in rotary.items() if name not in _ROTARY_OF_IMAGES}
    entries["tie_word_embeddings"] = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    own, extra = TEXT_KINDS.get(kind, (kind, {}))
    return CONFIG_MAPPING[own](**entries, **extra)


def _frame(config: Any) -> Any:
    """The causal class's model of a configuration, without memory for weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def _state(whole: Any, frame: Any) -> dict[str, Tensor]:
    """The tensors of the text model by the names of `frame`."""
    names: dict[nn.Module, str] = {module: name for name, module in frame.named_modules()}
    inner = whole.get_decoder()
    parts = {frame: inner} if type(inner) is type(frame) else {frame.base_model: inner}
    parts.setdefault(frame.get_output_embeddings(), whole.get_output_embeddings())
    state: dict[str, Tensor] = {}
    for own, part in parts.items():
        prefix = f"{names[own]}." if names[own] else ""
        state |= {f"{prefix}{key}": tensor for key, tensor in part.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in frame.state_dict().items()}
    odd = sorted(name for name in {*shapes, *state} if name not in state or shapes.get(name) != state[name].shape)
    if odd:
        raise UnsupportedModel(f"its text model is no {type(frame).__name__}: {odd[0]} is another tensor or none")
    return state
