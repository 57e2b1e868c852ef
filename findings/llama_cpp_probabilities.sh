#!/usr/bin/env bash
# llama.cpp's server tells the probabilities of a later step where the likeliest token ends inside a character of UTF-8.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp's server as a library), gguf 0.19.0, numpy 2.4.6, Python 3.11.
# Behaviour: the text is held back while its last character is not whole, and with it the probabilities of the tokens written so far.
#   They are then dropped: content[0] of the answer belongs to the token that completes the character. With max_tokens=1, or where
#   nothing completes it within max_tokens, `logprobs` is null.
# Expected: one entry for every token that is written, content[0] being that of the first.
# Seen:
#   the model's likeliest tokens, one after the other: 1 (byte E4), 2 (byte B8), 3 (byte AD), then 1 again
#   asked for 1 token: no probabilities
#   asked for 3 tokens: 1 entry, whose likeliest token is 3
#   asked for 1 token with a bias of 1e4 on the text "0": 1 entry, whose likeliest token is 1
# Why it matters: a vocabulary of bytes writes most characters beyond ASCII, and many Chinese words and emoji, in parts. A check of perplexity or
#   KL that asks for one token a position fails there, and one that asks for a few compares two different positions: an exact conversion
#   looks broken (KL 0.18 where the truth is 0.0004). The bias chooses what is written and leaves the probabilities as the model has them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

python3 -m venv "$tmp/venv"
python="$tmp/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
HOME="$tmp" "$python" - "$tmp" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from gguf.constants import TokenType

WIDTH, N_HEADS, INNER = 64, 4, 64
CHARACTER = bytes.fromhex("e4b8ad")


def letters():
    """How a byte-level vocabulary writes a byte: printable ones as Latin-1, the others from code 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def write(path):
    """A model of one layer that adds nothing, so that the next token depends on the last alone: 0 -> 1 -> 2 -> 3 -> 1."""
    rest = [byte for byte in range(256) if byte not in CHARACTER]
    tokens = ["<s>", *(letters()[byte] for byte in (*CHARACTER, *rest))]
    embedding, head = np.zeros((2, len(tokens), WIDTH), np.float32)
    for token, following in ((0, 1), (1, 2), (2, 3), (3, 1)):
        embedding[token, token] = 1
        head[following, token] = 1
    embedding[4:, 4] = 1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * 256])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", head)
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(WIDTH, np.float32))
    for linear in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{linear}.weight", np.zeros((WIDTH, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


path = Path(sys.argv[1]) / "bytes.gguf"
write(path)
params = xllamacpp.CommonParams()
params.model.path = str(path)
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 64, 1, 0, False, -1
server = xllamacpp.Server(params)


def told(prompt, n_tokens, **options):
    """For every entry of the answer, its likeliest token; None where there are no probabilities."""
    asked = {"prompt": prompt, "temperature": -1, "max_tokens": n_tokens, "logprobs": 8, "n_probs": 8, "ignore_eos": True}
    logprobs = server.handle_completions({**asked, **options})["choices"][0]["logprobs"]
    return logprobs and [max(entry["top_logprobs"], key=lambda each: each["logprob"])["id"] for entry in logprobs["content"]]


bias = {"logit_bias": [["0", 1e4]]}
chain = [told([token], 1, **bias)[0] for token in (0, 1, 2, 3)]
one, three, biased = told([0], 1), told([0], 3), told([0], 1, **bias)
named = [f"{token} (byte {CHARACTER[token - 1]:02X})" for token in chain[:3]]
print(f"the model's likeliest tokens, one after the other: {', '.join(named)}, then {chain[3]} again")
print(f"asked for 1 token: {'no probabilities' if one is None else one}")
print(f"asked for 3 tokens: {len(three)} entry, whose likeliest token is {three[0]}")
print(f'asked for 1 token with a bias of 1e4 on the text "0": {len(biased)} entry, whose likeliest token is {biased[0]}')

if not (chain == [1, 2, 3, 1] and one is None and three == [3] and biased == [1]):
    sys.exit("changed: the probabilities are now told of the step that they belong to")
PY
