"""Rotary embeddings of GGUF files: tensors and rules alike become the model's own frequencies, or the file is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from methods.model.gguf import UnreadableGGUF, convert
from methods.model.gguf_rope import plain_frequencies, recognised
from methods.model.load import load
from methods.model.trace import logits_of
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model, tiny_tokens

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = np.array([1, 1.25, 1.5, 3, 2, 6, 8, 7.5], dtype=np.float32)
"""Eight divisors that follow no rule."""

SCALING = "{arch}.rope.scaling."


def llama3_divisors(base, rotated, factor, low, high, original):
    """As converters write them: frequencies in fp32, the rest in Python, stored as fp32."""
    found = []
    for frequency in (1 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)).tolist():
        length = 2 * math.pi / frequency
        smooth = min(max((original / length - low) / (high - low), 0), 1)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def twin(model, **parameters):
    """The model with other rotary embeddings."""
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": {"rope_theta": 10_000.0, **parameters}})
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    return other


CASES = {
    # What stands in the file beside the plain model; the same as transformers writes it.
    "llama3": (
        {"tensors": {"rope_freqs.weight": llama3_divisors(10_000.0, 16, 8.0, 1.0, 4.0, 128)}},
        {**LLAMA3, "original_max_position_embeddings": 128},
    ),
    "ones": ({"tensors": {"rope_freqs.weight": np.ones(8, dtype=np.float32)}}, {"rope_type": "default"}),
    "linear": ({"changed": {SCALING + "type": "linear", SCALING + "factor": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
    "a factor alone": ({"changed": {SCALING + "factor": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
    "the old key": ({"changed": {"{arch}.rope.scale_linear": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
    "none": ({"changed": {SCALING + "type": "none", SCALING + "factor": 4.0}}, {"rope_type": "default"}),
    "yarn": (
        {"changed": {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "original_context_length": 32}},
        {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1 + 0.1 * math.log(4)},
    ),
    "yarn with a scale": (
        {
            "changed": {
                SCALING + "type": "yarn",
                SCALING + "factor": 4.0,
                SCALING + "original_context_length": 32,
                SCALING + "attn_factor": 1.25,
                SCALING + "yarn_beta_fast": 8.0,
                SCALING + "yarn_beta_slow": 2.0,
            }
        },
        {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.25 * (1 + 0.1 * math.log(4))},
    ),
    "no rule": (
        {"tensors": {"rope_freqs.weight": FACTORS}},
        {
            "rope_type": "longrope",
            "short_factor": FACTORS.tolist(),
            "long_factor": FACTORS.tolist(),
            "attention_factor": 1.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "long": (  # beyond 16 positions, which the tokens compared reach and the probes of a structure do not
        {
            "tensors": {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": 2 * FACTORS},
            "changed": {SCALING + "type": "longrope", SCALING + "original_context_length": 16, SCALING + "attn_factor": 1.25},
        },
        {
            "rope_type": "longrope",
            "short_factor": FACTORS.tolist(),
            "long_factor": (2 * FACTORS).tolist(),
            "attention_factor": 1.25,
            "original_max_position_embeddings": 16,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scaled_embeddings_are_the_files(case, tmp_path):
    options, parameters = CASES[case]
    model = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **options)
    loaded = load(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert loaded.model.config.rope_parameters == {"rope_theta": 10_000.0, **parameters}
    expected = logits_of(twin(model, **parameters), tiny_tokens())
    assert torch.allclose(logits_of(loaded.model, tiny_tokens()), expected, atol=1e-5)
    plain = torch.allclose(logits_of(model, tiny_tokens()), expected, atol=1e-3)
    assert plain == (parameters["rope_type"] == "default")


def _deep_gemma():
    """Six blocks, of which the last one has no window."""
    config = {**tiny_model("gemma3").config.to_dict(), "num_hidden_layers": 6, "layer_types": None}
    return AutoModelForCausalLM.from_config(Gemma3TextConfig(**config), dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm"])
def test_other_architectures_scale_too(arch, tmp_path):
    """A divisor for all frequencies, in each architecture's own words; in a Gemma 3 only blocks without a window have it."""
    model = tiny_model(arch)
    if arch == "gemma3":
        model = _deep_gemma()
    changed = {SCALING + "type": "linear", SCALING + "factor": 4.0}
    write_gguf(tmp_path / "plain.gguf", model)
    write_gguf(tmp_path / "scaled.gguf", model, changed=changed)
    loaded = load(str(tmp_path / "scaled.gguf"), tmp_path / "cache")
    frequencies = {n: b for n, b in loaded.model.named_buffers() if n.endswith("inv_freq") and "original" not in n}
    before = dict(load(str(tmp_path / "plain.gguf"), tmp_path / "cache").model.named_buffers())
    assert len(frequencies) == (2 if arch == "gemma3" else 1)
    for name, buffer in frequencies.items():
        assert torch.allclose(buffer * (1 if "sliding" in name else 4), before[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "rotated", "factor", "low", "high", "original"),
    [
        (500_000.0, 128, 8.0, 1.0, 4.0, 8192),
        (500_000.0, 64, 32.0, 1.0, 4.0, 8192),
        (100_000.0, 80, 16.0, 1.0, 4.0, 4096),
        (500_000.0, 128, 8.0, 2.0, 6.0, 8192),
    ],
)
def test_llama3_is_recognised_to_the_bit(base, rotated, factor, low, high, original):
    """Llama 3.1, 3.2 and two others; the frequencies are those of the true parameters, bit for bit."""
    rule = recognised(torch.from_numpy(llama3_divisors(base, rotated, factor, low, high, original)).double(), base)
    true = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    if low == 1:
        assert rule == {"rope_type": "llama3", **true}
    sizes = {"hidden_size": 2 * rotated, "num_attention_heads": 2, "max_position_embeddings": 131_072}
    frequencies = [
        ROPE_INIT_FUNCTIONS["llama3"](
            LlamaConfig(**sizes, rope_parameters={"rope_theta": base, "rope_type": "llama3", **given})
        )[0]
        for given in (true, rule)
    ]
    assert torch.equal(*frequencies)


def test_what_follows_no_rule_is_not_recognised():
    divisors = torch.from_numpy(llama3_divisors(500_000.0, 64, 32.0, 1.0, 4.0, 8192)).double()
    divisors[15] *= 1 + 1e-5
    assert recognised(divisors, 500_000.0) is None


def test_plain_frequencies_by_hand():
    assert torch.allclose(plain_frequencies(100.0, 4), torch.tensor([1.0, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changed": {SCALING + "type": "dynamic"}}, r"llama\.rope\.scaling\.type = 'dynamic' is no scaling that is known"),
        ({"tensors": {"rope_freqs.weight": FACTORS[:4]}}, r"rotary factors of shape \(4,\), where 8"),
        ({"tensors": {"rope_freqs.weight": 0 * FACTORS}}, "where 8 positive numbers are expected"),
        ({"tensors": {"rope_factors_long.weight": FACTORS}}, r"need rope_factors_long\.weight and rope_factors_short\.weight"),
        (
            {"changed": {SCALING + "type": "yarn", SCALING + "factor": 2.0}, "tensors": {"rope_freqs.weight": FACTORS}},
            "stands beside another rotary scaling",
        ),
        (
            {"changed": {SCALING + "type": "yarn", SCALING + "yarn_log_multiplier": 0.5}},
            r"yarn_log_multiplier = 0\.5 is not computed here",
        ),
        ({"changed": {"{arch}.rope.dimension_count": 8}}, r"rope\.dimension_count = 8 is a part of the head \(16\)"),
        ({"changed": {"{arch}.rope.freq_base_swa": 500.0}}, r"rope\.freq_base_swa = 500\.0 differs from 10000\.0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **options)
    with pytest.raises(UnreadableGGUF, match=message) as refusal:
        convert(tmp_path / "tiny.gguf", tmp_path / "cache", str)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("cache/models/*"))
