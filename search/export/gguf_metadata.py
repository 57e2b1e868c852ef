"""What a GGUF says of a model beside its tensors: the architecture's sizes and the tokenizer, as key-value pairs."""

from __future__ import annotations

from typing import Any

from methods.model.structure import Structure
from search.export.gguf_rope import add_rope
from search.export.gguf_tokenizer import Vocabulary

GUESSED = 1024
"""`general.file_type` of a file whose types are mixed."""


def add_metadata(writer: Any, structure: Structure, config: Any, label: str, digest: str, vocabulary: Vocabulary) -> None:
    """Adds all key-value pairs; writer: a `gguf.GGUFWriter` of the family; digest: of the policy, as `policy_file` gives it."""
    # Not the bare label: transformers takes a file of the name "mistral" for another architecture.
    writer.add_name(f"{label}, compressed")
    writer.add_string("general.compression_policy_digest", digest)
    writer.add_file_type(GUESSED)
    writer.add_quantization_version(2)
    writer.add_block_count(len(structure.blocks))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(structure.d_model)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(structure.n_heads)
    writer.add_head_count_kv(structure.n_kv_heads)
    writer.add_key_length(structure.head_dim)
    writer.add_value_length(structure.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(structure.n_vocab)
    add_rope(writer, config, structure.head_dim)
    _add_vocabulary(writer, vocabulary)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    ids = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, index in vocabulary.special.items():
        ids[role](index)
    writer.add_add_bos_token(vocabulary.starts)
    writer.add_add_eos_token(vocabulary.ends)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
