"""What rounding does to keys and values: against slow versions, and what each method claims."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from methods.formats.packing import pack
from methods.kv.calibrate import fit_codebook
from methods.kv.codebook import ChannelCodebook, Codebook, TokenCodebook, Turbo, normal_codebook
from methods.kv.codecs import BeforeRotary, Cast, Codec, Float8, Integer, IntegerByChannel, Rotated, Smoothed, head_hadamard
from methods.kv.packing import pack_rows, unpack_rows
from methods.kv.rotary import Rotary


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keys_with_loud_channels(tokens: int = 96, seed: int = 0) -> Tensor:
    """(2, 3, tokens, 24): as keys are, a few channels far larger than the others and away from zero."""
    x = random(2, 3, tokens, 24, seed=seed)
    x[..., 5] = 12 * x[..., 5] + 30
    x[..., 17] = 8 * x[..., 17] - 20
    return x


def there_and_back(codec: Codec, x: Tensor, start: int = 0) -> Tensor:
    return codec.decode(codec.encode(x, start), start).float()


def error(codec: Codec, x: Tensor) -> float:
    return float((there_and_back(codec, x) - x).square().mean() / x.square().mean())


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_packed_rows_are_the_bytes_of_the_packer_of_weights(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack_rows(codes.transpose(0, 1), bits)
    assert packed.shape == (3, 5, 6 * bits)
    assert torch.equal(packed.flatten(), pack(codes.transpose(0, 1), bits))
    assert torch.equal(unpack_rows(packed, bits), codes.transpose(0, 1))


def slow_affine(group: list[float], bits: int) -> list[float]:
    half = torch.float16
    offset = torch.tensor(min(group)).to(half).double().item()
    scale = torch.tensor((max(group) - offset) / (2**bits - 1)).to(half).double().item()
    codes = [min(max(round((value - offset) / scale), 0), 2**bits - 1) for value in group]
    return [offset + scale * code for code in codes]


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_integers_per_token_against_loops(bits: int) -> None:
    x = random(2, 3, 5, 24)
    expected = torch.zeros_like(x)
    for place in itertools.product(range(2), range(3), range(5), range(0, 24, 8)):
        row, first = x[place[:3]], place[3]
        expected[place[:3]][first : first + 8] = torch.tensor(slow_affine(row[first : first + 8].tolist(), bits))
    assert torch.allclose(there_and_back(Integer(bits, 8), x), expected, atol=1e-5)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_integers_per_channel_against_loops(bits: int) -> None:
    x = random(2, 3, 32, 5)
    expected = torch.zeros_like(x)
    for b, h, first, c in itertools.product(range(2), range(3), range(0, 32, 16), range(5)):
        group = x[b, h, first : first + 16, c].tolist()
        expected[b, h, first : first + 16, c] = torch.tensor(slow_affine(group, bits))
    assert torch.allclose(there_and_back(IntegerByChannel(bits, 16), x), expected, atol=1e-5)


def test_a_group_without_spread_comes_back() -> None:
    x = torch.full((1, 1, 2, 8), 0.75)
    x[0, 0, 1] = 0
    for codec in (Integer(2), Float8(torch.ones(1, 1, 1))):
        assert torch.equal(there_and_back(codec, x), x)
    # The largest value may saturate where bf16 rounds the scale down.
    assert torch.allclose(there_and_back(Float8(), x), x, rtol=2**-8, atol=0)


def test_huge_values_saturate_and_stay_finite() -> None:
    x = random(1, 2, 8, 8) * 1e6
    middle = (-torch.ones(2, 1, 8), torch.ones(2, 1, 8))
    book = normal_codebook(2)
    for codec in (Integer(4), IntegerByChannel(4, 8), Float8(torch.ones(2, 1, 1)), Turbo(4), TokenCodebook(book)):
        assert there_and_back(codec, x).isfinite().all()
    assert there_and_back(ChannelCodebook(book, *middle), x).isfinite().all()


def test_fp8_rounds_to_three_bits_of_mantissa() -> None:
    x = random(2, 3, 7, 24) * torch.logspace(-3, 3, 7)[:, None]
    parts = Float8().encode(x, 0)
    assert parts["codes"].dtype is torch.float8_e4m3fn and parts["scale"].shape == (2, 3, 7, 1)
    back = there_and_back(Float8(), x)
    large = x.abs() > x.abs().amax(-1, keepdim=True) / 64
    assert ((back - x).abs() / x.abs())[large].max() <= 2**-4 * 1.01
    fixed = Float8(torch.full((3, 1, 1), 0.5))
    assert there_and_back(fixed, torch.full((1, 3, 2, 8), 1e4)).eq(224).all()


def test_hadamard_is_its_own_inverse_and_the_matrix_it_says() -> None:
    matrix = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(8)] for i in range(8)]) / math.sqrt(8)
    x = random(2, 3, 5, 24)
    expected = (x.view(2, 3, 5, 3, 8) @ matrix).flatten(-2)
    assert torch.allclose(head_hadamard(x), expected, atol=1e-6)
    assert torch.allclose(head_hadamard(head_hadamard(x)), x, atol=1e-6)


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of 16 turning channels, with the scale that some long-context embeddings have."""
    turns = positions[..., None] * 100 ** (-torch.arange(8) / 8)
    both = torch.cat((turns, turns), -1)
    return 1.3 * both.cos(), 1.3 * both.sin()


def test_rotary_against_complex_numbers_and_back() -> None:
    rotary, x = Rotary(angles), random(2, 3, 6, 24)
    turned = torch.complex(x[..., :8], x[..., 8:16])
    angle = (torch.arange(4, 10)[:, None] * 100 ** (-torch.arange(8) / 8)).double()
    turned = turned * 1.3 * torch.exp(1j * angle)
    expected = torch.cat((turned.real.float(), turned.imag.float(), x[..., 16:]), -1)
    assert torch.allclose(rotary.apply(x, 4), expected, atol=1e-5)
    assert torch.allclose(rotary.undo(expected, 4), x, atol=1e-5)
    assert torch.allclose(there_and_back(BeforeRotary(Cast(torch.float32), rotary), x, 7), x, atol=1e-5)


def test_keys_are_quieter_before_the_rotary_embedding() -> None:
    keys = random(1, 2, 512, 24) * 0.3
    keys[..., 1], keys[..., 4] = keys[..., 1] + 9, keys[..., 4] - 6
    rotary = Rotary(angles)
    turned = rotary.apply(keys, 0)
    assert error(BeforeRotary(IntegerByChannel(2, 512), rotary), turned) < 0.5 * error(IntegerByChannel(2, 512), turned)


def test_keys_want_channels_and_rotations_help_tokens() -> None:
    keys = keys_with_loud_channels()
    per_token, per_channel = error(Integer(2), keys), error(IntegerByChannel(2, 32), keys)
    assert per_channel < per_token / 2
    loud = random(2, 3, 96, 64)
    loud[..., 5] *= 30
    assert error(Rotated(Integer(4)), loud) < error(Integer(4), loud)


def test_values_are_judged_by_what_attention_reads() -> None:
    values = random(1, 1, 64, 24)
    values[:, :, ::8] *= 20
    # A sharp head looks at quiet tokens: per channel they pay for the loud ones of their group, per token only for themselves.
    weights = torch.zeros(1, 1, 7, 64)
    weights[0, 0, torch.arange(7), torch.arange(1, 8)] = 1
    read = weights @ values
    per_token = (weights @ there_and_back(Integer(2, 8), values) - read).square().mean()
    per_channel = (weights @ there_and_back(IntegerByChannel(2, 32), values) - read).square().mean()
    assert per_token < per_channel / 10


def test_smoothing_takes_loud_channels_out_of_the_tokens_range() -> None:
    keys = keys_with_loud_channels(seed=3)
    low, high = keys.amin((0, 2))[:, None], keys.amax((0, 2))[:, None]
    smoothed = Smoothed(Integer(4), (low + high) / 2, ((high - low) / 2).sqrt())
    assert error(smoothed, keys) < error(Integer(4), keys) / 4
    plain = Smoothed(Integer(4), torch.zeros(3, 1, 24), torch.ones(3, 1, 24))
    assert torch.equal(there_and_back(plain, keys), there_and_back(Integer(4), keys))


@pytest.mark.parametrize(("bits", "expected"), ((2, 0.11754), (3, 0.034541), (4, 0.009501)))
def test_turbo_has_the_distortion_of_the_best_scalar_quantizer(bits: int, expected: float) -> None:
    """Max 1960, table 1: for the standard normal; directions of 128 entries are near it, whatever the vectors were."""
    vectors = torch.zeros(1, 2, 200, 128) + 0.01 * random(1, 2, 200, 128)
    vectors[..., :3] += random(1, 2, 200, 3, seed=1)
    spread = random(1, 2, 200, 128, seed=2)
    assert error(Turbo(bits), spread) == pytest.approx(expected, rel=0.08)
    assert error(Turbo(bits), vectors) < 2 * expected


def books() -> tuple[Codebook, Codebook]:
    return normal_codebook(2), Codebook(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8))


def test_outliers_of_a_token_are_kept_as_they_are() -> None:
    x = random(2, 3, 7, 64)
    x[0, 1, 2, 5], x[1, 2, 6, 63] = 55.5, -77.25
    book = books()[1]
    for codec in (TokenCodebook(book), ChannelCodebook(book, torch.full((3, 1, 64), -3.0), torch.full((3, 1, 64), 3.0))):
        parts = codec.encode(x, 0)
        assert parts["outlier"].shape == parts["index"].shape == (2, 1, 7, 2)
        back = codec.decode(parts, 0)
        assert back[0, 1, 2, 5] == 55.5 and back[1, 2, 6, 63] == -77.25
        kept = (back == x.half().float()).sum((1, 3))
        assert kept.min() >= 2
        # Without outliers beside it, the token's range would be ten times as long.
        assert (back - x).abs().max() < 0.6


def test_a_codebook_codes_to_the_nearest_level() -> None:
    book = Codebook(torch.tensor([-0.9, -0.2, 0.1, 0.8]), torch.tensor([-1.0, -0.2, 0.1, 1.0]))
    z = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    nearest = (z[..., None] - book.levels).abs().argmin(-1)
    assert torch.equal(book.decode(book.encode(z)), book.decoded[nearest])


def test_codebooks_minimise_the_weighted_error() -> None:
    z, weight = random(3000).clamp(-2, 2), random(3000, seed=1).square() * (1 + 20 * (random(3000) > 0.7))

    def loss(levels: Tensor) -> float:
        return float((weight * (z[:, None] - levels).square().amin(1)).sum())

    weighted, plain = fit_codebook(z, weight, 3).levels, fit_codebook(z, torch.ones_like(z), 3).levels
    codes = (z[:, None] - weighted).abs().argmin(1)
    for code, level in enumerate(weighted):
        own = codes == code
        assert float(level) == pytest.approx(float((weight * z)[own].sum() / weight[own].sum()), abs=2e-3)
    assert torch.equal(weighted, weighted.sort().values)
    assert loss(weighted) < 0.85 * min(loss(plain), loss(torch.linspace(-2, 2, 8)))
    assert (weighted > 0.7).sum() > (plain > 0.7).sum()


def test_two_bits_keep_mean_and_spread() -> None:
    z = random(5000).square().clamp(max=3)
    book = fit_codebook(z, torch.ones_like(z), 2)
    read = book.decode(book.encode(z.view(-1, 8))).flatten()
    assert float(read.mean()) == pytest.approx(float(z.mean()), abs=1e-3)
    assert float(read.std()) == pytest.approx(float(z.std()), rel=1e-3)
    assert torch.equal(fit_codebook(z, torch.ones_like(z), 3).decoded, fit_codebook(z, torch.ones_like(z), 3).levels)


def test_more_bits_less_error() -> None:
    x = keys_with_loud_channels(seed=5)
    kinds = (lambda bits: Integer(bits, 8), lambda bits: IntegerByChannel(bits, 16), lambda bits: Rotated(Integer(bits)), Turbo)
    for make in kinds:
        bits = (2, 3, 4) if make is Turbo else (2, 3, 4, 8)
        errors = [error(make(b), x) for b in bits]
        assert errors == sorted(errors, reverse=True) and errors[0] > 4 * errors[-1]
