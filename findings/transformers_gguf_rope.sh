#!/usr/bin/env bash
# transformers 5.23.0 reads a llama GGUF without its RoPE scaling, both as metadata and as the tensor rope_freqs.weight, and says nothing.
#
# Versions: transformers 5.23.0, gguf 0.19.0, torch 2.13.0 (CPU), accelerate 1.15.0, numpy 2.4.6, Python 3.11.
# Behaviour: from_pretrained(gguf_file=...) of a llama file takes rope.freq_base and rope.dimension_count. rope.scaling.* is noted at
#   level INFO alone, and a tensor without a counterpart in the model is passed over: the model rotates by the plain frequencies.
# Expected: config.rope_parameters with rope_type "linear" and the file's factor (and frequencies divided by the tensor's values);
#   or an error, or at least a warning that the file asks for more than is read.
# Seen:
#   rope.scaling.type=linear, factor=4: rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}, logits equal to the plain file's: True
#   rope_freqs.weight of 4s: rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}, logits equal to the plain file's: True
#   logits equal to those of the same weights under linear scaling by 4: False
#   warnings: 0
# Why it matters: llama.cpp's converter stores the scaling of Llama 3.1 to 3.3 as rope_freqs.weight, and linear and YaRN scaling as
#   rope.scaling.*. A GGUF that is read back to be measured beside its source is then another model: the quantization
#   is blamed for what the reader left out, most of all at long context. The scaling must be set by hand, in the config.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

python3 -m venv "$tmp/venv"
python="$tmp/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6

HOME="$tmp" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$python" - "$tmp" 2>"$tmp/stderr" <<'PY' || { cat "$tmp/stderr" >&2; exit 1; }
import copy
import logging
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

WIDTH, N_HEADS, INNER, VOCABULARY, FACTOR = 32, 2, 64, 48, 4.0
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output_norm": (WIDTH,),
    "output": (VOCABULARY, WIDTH),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_norm": (WIDTH,),
    **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
    "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH),
    "blk.0.ffn_down": (WIDTH, INNER),
}

warnings = []


class Kept(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            warnings.append(record.getMessage())


transformers_logging.add_handler(Kept())
folder = Path(sys.argv[1])


def read(name, scaling=None):
    """The model that transformers reads from a file of one layer; the weights are the same in every file."""
    path = folder / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    if scaling == "metadata":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(FACTOR)
    if scaling == "tensor":
        writer.add_tensor("rope_freqs.weight", np.full(WIDTH // N_HEADS // 2, FACTOR, np.float32))
    random = np.random.default_rng(0)
    for tensor, shape in SHAPES.items():
        writer.add_tensor(f"{tensor}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(40)[None]).logits


plain = read("plain")
by_metadata, by_tensor = read("metadata", "metadata"), read("tensor", "tensor")
config = copy.deepcopy(plain.config)
config.rope_parameters = {"rope_type": "linear", "factor": FACTOR, "rope_theta": 10000.0}
scaled = LlamaForCausalLM(config).eval()
scaled.load_state_dict(plain.state_dict())

ignored = []
for name, model in (("rope.scaling.type=linear, factor=4", by_metadata), ("rope_freqs.weight of 4s", by_tensor)):
    same = torch.equal(logits(model), logits(plain))
    ignored.append(same and model.config.rope_parameters["rope_type"] == "default")
    print(f"{name}: rope_parameters {model.config.rope_parameters}, logits equal to the plain file's: {same}")
matters = not torch.allclose(logits(by_metadata), logits(scaled), atol=1e-3)
print(f"logits equal to those of the same weights under linear scaling by 4: {not matters}")
print(f"warnings: {len(warnings)}")

if not (all(ignored) and matters and not warnings):
    sys.exit("changed: the file's RoPE scaling is no longer ignored in silence: " + "; ".join(warnings))
PY
