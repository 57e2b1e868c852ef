"""The first blocks of the default model with the first of its tokens, for what only real weights and a real tokenizer show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.model.load import DEFAULT_PACKAGE, LoadedModel, in_package, load
from methods.model.quiet import quiet
from tests.gguf_names import gguf_name

TEXT = (
    "The history of the city begins in the twelfth century, when a small castle was built on a hill above the river. Merchants "
    "settled below its walls, and within a hundred years there was a market, a church and a school, which 42 pupils attended."
)


def cut_model(folder: Path, n_blocks: int = 4, n_tokens: int = 4096) -> LoadedModel:
    """Blocks, embeddings, last norm and byte-level BPE of the default model, in bf16, as `load` gives them; a few seconds.

    Tokens are ordered by their merges, so that the first ones with their merges are a tokenizer of their own.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(in_package(DEFAULT_PACKAGE))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    sizes = {
        name: fields[f"llama.{key}"]
        for name, key in (
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_attention_heads", "attention.head_count"),
            ("num_key_value_heads", "attention.head_count_kv"),
            ("max_position_embeddings", "context_length"),
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
            ("rope_theta", "rope.freq_base"),
        )
    }
    config = LlamaConfig(
        **sizes, num_hidden_layers=n_blocks, vocab_size=n_tokens, tie_word_embeddings=True, dtype=torch.bfloat16
    )
    with quiet():
        model = LlamaForCausalLM(config)
        held = {tensor.name: tensor for tensor in reader.tensors}
        for name, parameter in model.named_parameters():
            tensor = held[gguf_name(name)]
            rows = dequantize(
                tensor.data[:n_tokens] if name.endswith("embed_tokens.weight") else tensor.data, tensor.tensor_type
            )
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
            parameter.data = torch.from_numpy(_halves(rows, heads) if heads else np.array(rows)).bfloat16()
        model.save_pretrained(folder)
        _tokenizer(fields, n_tokens).save_pretrained(folder)
        return load(str(folder), folder / "cache")


def _halves(rows: Any, heads: int) -> Any:
    """Rows of q or k with the halves of every head one below the other, as transformers rotates them."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


def _tokenizer(fields: dict[str, Any], n_tokens: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"][:n_tokens])}
    pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    merges = [pair for pair in pairs if all(part in vocabulary for part in (*pair, "".join(pair)))]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"][:n_tokens]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(vocabulary, kinds, strict=True) if kind == 3])
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    result.chat_template = fields["tokenizer.chat_template"]
    return result
