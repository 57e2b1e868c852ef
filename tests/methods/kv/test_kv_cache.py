"""Caches in real models: generation, memory, batches, beams, sliding windows and calibration, on many architectures."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from methods.kv.cache import attention_windows, new_cache, stored_bytes
from methods.kv.calibrate import Calibration, _record, calibrate, fit_codebook
from methods.kv.format import parse_cache_format
from methods.kv.quality import evaluate
from methods.kv.rotary import NoInverse, rotaries
from methods.model.describe import describe
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

FORMATS = (
    *("kv-fp32", "kv-bf16", "kv-fp8", "kv-fp8-head", "kv-fp8-tensor-w4", "kv-int8", "kv-int-k8v3-g8", "kv-int4-rot-w5-s2"),
    *("kv-int4-smooth", "kv-kivi2-g8-w16", "kv-kivi4-g16-rot", "kv-turbo4", "kv-kvquant3-s1", "kv-kvquant2"),
)
SOME = ("llama", "qwen2", "gemma", "gpt2", "mixtral", "gemma3", "phi")
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


@functools.cache
def model_of(arch: str) -> Any:
    return tiny_model(arch)


@functools.cache
def calibration_of(arch: str, name: str) -> Calibration | None:
    fmt = parse_cache_format(name)
    return calibrate(model_of(arch), fmt, tiny_tokens(2, 32, seed=7)) if fmt.calibrated else None


def cache_of(arch: str, name: str) -> Any:
    return new_cache(model_of(arch), parse_cache_format(name), calibration_of(arch, name))


@torch.inference_mode()
def logits(arch: str, tokens: Tensor, cache: Any, sizes: list[int]) -> Tensor:
    pieces = tokens.split(sizes, 1)
    return torch.cat([model_of(arch)(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces], 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cache_in_the_models_dtype_generates_what_the_model_does(arch: str) -> None:
    model, tokens = model_of(arch), tiny_tokens(2, 7)
    expected = model.generate(tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, past_key_values=cache_of(arch, "kv-fp32"), **GREEDY), expected)
    tokens = tiny_tokens(2, 30)
    dense = logits(arch, tokens, None, [30])
    assert torch.allclose(logits(arch, tokens, cache_of(arch, "kv-fp32"), [9, 1, 1, 12, 7]), dense, atol=1e-4)


def test_sixteen_bits_are_exact_for_a_model_that_has_sixteen() -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    tokens = tiny_tokens(2, 7)
    cache = new_cache(model, parse_cache_format("kv-bf16"))
    assert torch.equal(model.generate(tokens, past_key_values=cache, **GREEDY), model.generate(tokens, **GREEDY))


@pytest.mark.parametrize("arch", SOME)
def test_formats_close_in_bits_are_close_to_the_model(arch: str) -> None:
    model, tokens, options = model_of(arch), tiny_tokens(1, 12), {**GREEDY, "max_new_tokens": 4}
    expected = model.generate(tokens, **options)
    for name in ("kv-bf16", "kv-int8", "kv-kivi8-g8-w8"):
        assert torch.equal(model.generate(tokens, past_key_values=cache_of(arch, name), **options), expected), name


@pytest.mark.parametrize("arch", ("llama", "gemma3", "falcon", "gpt2"))
@pytest.mark.parametrize("name", FORMATS)
def test_memory_is_what_the_format_says(arch: str, name: str) -> None:
    model, cache = model_of(arch), cache_of(arch, name)
    structure, windows = describe(model, "fp32"), attention_windows(model)
    fmt, tokens = parse_cache_format(name), tiny_tokens(3, 41)
    done = 0
    for size in (10, 1, 1, 21, 8):
        logits(arch, tokens[:, done : done + size], cache, [size])
        done += size
        assert stored_bytes(cache) == fmt.size_bytes(structure, 3, done, windows)


@pytest.mark.parametrize("arch", ("llama", "gpt2"))
@pytest.mark.parametrize("name", FORMATS)
def test_a_call_sees_its_own_tokens_in_full_precision(arch: str, name: str) -> None:
    """WKVQuant's past-only rounding: a prefill is the model's own, bit for bit; what follows meets what was stored."""
    tokens, more = tiny_tokens(2, 24), tiny_tokens(2, 1, seed=3)
    cache, dense = cache_of(arch, name), DynamicCache(config=model_of(arch).config)
    assert torch.equal(logits(arch, tokens, cache, [24]), logits(arch, tokens, dense, [24]))
    assert torch.equal(logits(arch, more, cache, [1]), logits(arch, more, dense, [1])) == (name == "kv-fp32")


@pytest.mark.parametrize("name", FORMATS)
def test_sequences_of_a_batch_do_not_meet(name: str) -> None:
    """Whatever the others are, a sequence's logits are the same bit for bit; a batch of another size rounds its products otherwise."""
    tokens, others, sizes = tiny_tokens(3, 40), tiny_tokens(3, 40, seed=9), [20, 1, 19]
    together = logits("llama", tokens, cache_of("llama", name), sizes)
    for row in range(3):
        among = others.clone()
        among[row] = tokens[row]
        assert torch.equal(together[row], logits("llama", among, cache_of("llama", name), sizes)[row])


@pytest.mark.parametrize("name", FORMATS)
def test_beams_reorder_everything(name: str) -> None:
    tokens, order = tiny_tokens(3, 40), torch.tensor([2, 0, 0])
    cache, expected = cache_of("llama", name), cache_of("llama", name)
    logits("llama", tokens[:, :33], cache, [33])
    logits("llama", tokens[order, :33], expected, [33])
    cache.reorder_cache(order)
    rest = tokens[:, 33:]
    assert torch.equal(logits("llama", rest, cache, [7]), logits("llama", rest, expected, [7]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].packed_values.recent.shape[0] == 2 and cache.get_seq_length() == 40


def test_beam_search_is_the_models() -> None:
    model, tokens = model_of("llama"), tiny_tokens(1, 7)
    options = {**GREEDY, "num_beams": 4}
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, past_key_values=cache_of("llama", "kv-fp32"), **options), expected)


def test_padded_batches_use_their_mask() -> None:
    model, tokens, mask = model_of("llama"), tiny_tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {**GREEDY, "attention_mask": mask}
    assert torch.equal(
        model.generate(tokens, past_key_values=cache_of("llama", "kv-fp32"), **options), model.generate(tokens, **options)
    )


@pytest.mark.parametrize("arch", ("llama", "mistral"))
def test_cropping_takes_back_or_refuses(arch: str) -> None:
    tokens = tiny_tokens(2, 12)
    cache, expected = cache_of(arch, "kv-int4"), cache_of(arch, "kv-int4")
    logits(arch, tokens[:, :7], cache, [7])
    logits(arch, tokens[:, :4], expected, [4])
    cache.crop(-3)
    assert torch.equal(logits(arch, tokens[:, 4:6], cache, [2]), logits(arch, tokens[:, 4:6], expected, [2]))
    grouped = cache_of(arch, "kv-kivi2-g8")
    logits(arch, tiny_tokens(2, 17), grouped, [17])
    with pytest.raises(ValueError, match="cannot be removed" if arch == "llama" else "sliding window are gone"):
        grouped.crop(-2)
    with pytest.raises(ValueError, match="is positive"):
        expected.crop(2)
    assert cache_of("llama", "kv-int4").is_croppable and not cache_of("llama", "kv-int4-w4").is_croppable


def test_a_reset_cache_is_a_new_one() -> None:
    for arch in ("llama", "gemma3"):
        cache, tokens = cache_of(arch, "kv-kivi2-g8-w16-s1"), tiny_tokens(2, 30)
        first = logits(arch, tokens, cache, [20, 10])
        cache.reset()
        assert cache.get_seq_length() == 0 and stored_bytes(cache) == 0
        assert torch.equal(logits(arch, tokens, cache, [20, 10]), first)


@pytest.mark.parametrize("arch", SOME)
def test_more_bits_less_divergence(arch: str) -> None:
    ladders = [[f"kv-int{bits}" for bits in (2, 3, 4, 8)], [f"kv-kivi{bits}-g8" for bits in (2, 4, 8)]]
    ladders.append(["kv-kvquant2-s1", "kv-kvquant4-s1", "kv-bf16"])
    names = {name for ladder in ladders for name in ladder}
    makers = {name: functools.partial(cache_of, arch, name) for name in names}
    found = evaluate(model_of(arch), tiny_tokens(1, 60), makers, chunk=15)
    for ladder in ladders:
        divergences = [found[name].kl for name in ladder]
        assert divergences == sorted(divergences, reverse=True) and divergences[-1] < divergences[0] / 20


def test_what_a_cache_cannot_be_made_of_is_refused() -> None:
    model = model_of("llama")
    quantized, calibrated = parse_cache_format("kv-int8"), parse_cache_format("kv-kvquant3-s1")
    with pytest.raises(ValueError, match="needs a calibration"):
        new_cache(model, calibrated)
    with pytest.raises(ValueError, match="uses no calibration"):
        new_cache(model, quantized, calibration_of("llama", "kv-fp8-head"))
    with pytest.raises(ValueError, match="is of kv-kvquant2"):
        new_cache(model, calibrated, calibration_of("llama", "kv-kvquant2"))
    with pytest.raises(ValueError, match="needs no calibration"):
        calibrate(model, quantized, tiny_tokens())
    with pytest.raises(ValueError, match="not offloaded"):
        cache_of("llama", "kv-int8").layers[0].offload()
    with pytest.raises(ValueError, match="record no past"):
        cache_of("mistral", "kv-int8").activate_past_recording()


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in ("gpt2", "opt", "opt-post-norm")])
def test_every_rotary_embedding_is_undone(arch: str) -> None:
    assert all(rotaries(model_of(arch), 3))


def test_keys_without_positions_are_what_the_projection_gave() -> None:
    model, tokens, seen = model_of("gemma"), tiny_tokens(1, 20), []
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _module, _args, out: seen.append(out))
    cache = cache_of("gemma", "kv-fp32")
    logits("gemma", tokens, cache, [20])
    handle.remove()
    rotary = rotaries(model, 3)[1]
    assert rotary is not None
    plain = rotary.undo(cache.layers[1].packed_keys.read(), 0)
    assert torch.allclose(plain, seen[0].view(1, 20, 3, 16).transpose(1, 2), atol=1e-5)


def test_embeddings_without_an_inverse_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert rotaries(model_of("gpt2"), 3) == (None, None, None)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(NoInverse, match="dynamic"):
        rotaries(model, 1)
    other = tiny_model("llama")
    rope = other.model.rotary_emb.forward
    other.model.rotary_emb.forward = lambda x, position_ids: tuple(
        t.flip(-1) * 1.01 ** position_ids[0, 0] for t in rope(x, position_ids)
    )
    with pytest.raises(NoInverse, match="leaves a relative error"):
        rotaries(other, 3)


def test_calibration_leaves_the_model_alone_and_reads_its_gradients() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fmt, tokens = parse_cache_format("kv-kvquant3-s1"), tiny_tokens(2, 32, seed=7)
    found, again = (calibrate(model, fmt, tokens) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for layer, other in zip(found.layers, again.layers, strict=True):
        assert layer.keys() == other.keys() and all(torch.equal(layer[name], other[name]) for name in layer)
        assert layer["key.levels"].shape == (8,) and layer["key.low"].shape == (3, 1, 16)
    assert not torch.equal(found.layers[0]["key.levels"], found.layers[1]["key.levels"])


def test_codebooks_are_weighted_by_the_gradients() -> None:
    model, tokens = model_of("llama"), tiny_tokens(1, 32, seed=7)
    found = calibrate(model, parse_cache_format("kv-kvquant3"), tokens).layers[1]
    keys, key_gradient, *_ = _record(model, tokens, fisher=True)[1]
    rotary = rotaries(model, 3)[1]
    assert rotary is not None
    middle, half = (found["key.high"] + found["key.low"]) / 2, (found["key.high"] - found["key.low"]) / 2
    z = (rotary.undo(keys, 0)[0] - middle) / half
    weight = (rotary.undo(key_gradient, 0)[0] * half).square()
    inside = z.abs() <= 1
    assert inside.float().mean() > 0.9
    expected = fit_codebook(z[inside], weight[inside], 3).levels
    assert torch.allclose(found["key.levels"], expected, atol=1e-5)
    assert not torch.allclose(expected, fit_codebook(z[inside], torch.ones(int(inside.sum())), 3).levels, atol=1e-2)


def test_gradients_of_keys_against_differences() -> None:
    model, tokens = tiny_model("llama").double(), tiny_tokens(1, 9)
    calls = _record(model, tokens, fisher=True)

    def loss(layer: int, bump: Tensor) -> float:
        class Bumped(DynamicCache):
            def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
                return super().update(key_states + bump if layer_idx == layer else key_states, value_states, layer_idx)

        out = model(input_ids=tokens, past_key_values=Bumped(config=model.config), use_cache=True).logits
        return float(torch.nn.functional.cross_entropy(out[0, :-1], tokens[0, 1:], reduction="sum"))

    for layer in (0, 1):
        keys, gradient, *_ = calls[layer]
        assert keys.shape == gradient.shape == (1, 3, 9, 16)
        bump = gradient / gradient.norm() * 0.03
        slope = (loss(layer, bump) - loss(layer, -bump)) / 2
        assert slope == pytest.approx(float((gradient * bump).sum()), rel=1e-2)
