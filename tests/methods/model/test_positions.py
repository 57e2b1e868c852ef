"""The table of positions ends where the model itself fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from methods.model.positions import learned_positions, trained_positions
from tests.tiny import seeded

_MODERN: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
_GPT: dict[str, Any] = {"n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[Any], Any]] = {
    "gpt2": lambda t: t.GPT2Config(**_GPT),
    "opt": lambda t: t.OPTConfig(**_MODERN, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=40),
    "gptj": lambda t: t.GPTJConfig(**_GPT, rotary_dim=8),
    "gpt-bigcode": lambda t: t.GPTBigCodeConfig(**_GPT),
    "biogpt": lambda t: t.BioGptConfig(**_MODERN, max_position_embeddings=40),
    "roberta": lambda t: t.RobertaConfig(**_MODERN, is_decoder=True, max_position_embeddings=42),
    "mpt": lambda t: t.MptConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=64, max_seq_len=40),
    "bloom": lambda t: t.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64),
    "llama": lambda t: t.LlamaConfig(**_MODERN, max_position_embeddings=40),
    "gpt-neox": lambda t: t.GPTNeoXConfig(**_MODERN, max_position_embeddings=40),
}
TRAINED = {"roberta": 42, "mpt": None, "bloom": None}
COMPUTED = ("bloom", "llama", "gpt-neox")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_ends_where_the_model_fails(name: str) -> None:
    import transformers

    config = CONFIGS[name](transformers)
    with seeded(0):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (1, 41), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids[:, :40], use_cache=False)
    assert trained_positions(config) == TRAINED.get(name, 40)
    if name in COMPUTED:
        assert learned_positions(model) is None
        model(input_ids=ids, use_cache=False)
        return
    assert learned_positions(model) == 40
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, use_cache=False)
