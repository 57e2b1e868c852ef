"""A model's `config.json`: the settings that most architectures share, of their types and within what a model can have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from methods.typed import Finite, Positive, Range, Share, read_json

WAY_OUT = "restore the model's config.json"

Size = Annotated[int, Range(1, 2**31)]
"""A width, a vocabulary, a number of positions or heads."""

Sizes = Size | list[Size] | None
"""One for all blocks, or one for each."""

Layers = Annotated[int, Range(1, 1000)] | None
"""The deepest models have some 130; one of a million would be built for hours before its weights turn out to be missing."""

Number = Finite | None
Small = Annotated[float, Range(0, 1, above=True)] | None
Tokens = int | list[int] | None


class Settings(TypedDict):
    """What is read of `config.json`; names that are not here stay as they are."""

    model_type: NotRequired[str]
    architectures: NotRequired[list[str] | None]
    dtype: NotRequired[str | None]
    torch_dtype: NotRequired[str | None]
    vocab_size: NotRequired[Size | None]
    hidden_size: NotRequired[Size | None]
    n_embd: NotRequired[Size | None]
    d_model: NotRequired[Size | None]
    word_embed_proj_dim: NotRequired[Size | None]
    intermediate_size: NotRequired[Sizes]
    n_inner: NotRequired[Sizes]
    ffn_dim: NotRequired[Sizes]
    num_hidden_layers: NotRequired[Layers]
    n_layer: NotRequired[Layers]
    num_layers: NotRequired[Layers]
    num_attention_heads: NotRequired[Sizes]
    n_head: NotRequired[Sizes]
    num_key_value_heads: NotRequired[Sizes]
    head_dim: NotRequired[Sizes]
    max_position_embeddings: NotRequired[Size | None]
    n_positions: NotRequired[Size | None]
    sliding_window: NotRequired[int | None]
    num_experts: NotRequired[Annotated[int, Range(0, 2**31)] | None]
    num_local_experts: NotRequired[Annotated[int, Range(0, 2**31)] | None]
    num_experts_per_tok: NotRequired[Annotated[int, Range(0, 2**31)] | None]
    moe_intermediate_size: NotRequired[Sizes]
    layer_types: NotRequired[list[str] | None]
    rms_norm_eps: NotRequired[Small]
    layer_norm_eps: NotRequired[Small]
    layer_norm_epsilon: NotRequired[Small]
    norm_epsilon: NotRequired[Small]
    rope_theta: NotRequired[Positive | None]
    rope_scaling: NotRequired[Mapping[str, Any] | None]
    rope_parameters: NotRequired[Mapping[str, Any] | None]
    partial_rotary_factor: NotRequired[Share | None]
    rotary_pct: NotRequired[Share | None]
    hidden_act: NotRequired[str | None]
    activation_function: NotRequired[str | None]
    attention_dropout: NotRequired[Number]
    initializer_range: NotRequired[Number]
    tie_word_embeddings: NotRequired[bool | None]
    attention_bias: NotRequired[bool | None]
    mlp_bias: NotRequired[bool | None]
    bos_token_id: NotRequired[Tokens]
    eos_token_id: NotRequired[Tokens]
    pad_token_id: NotRequired[Tokens]


def read_settings(path: Path) -> Settings:
    """The settings in a `config.json`; raises WrongValue, which names the file and the setting, where one is not what it can be."""
    return read_json(Settings, path, WAY_OUT)
