"""Formats: names, reference numerics by hand, and lossless packing."""

import pytest
import torch

from methods.formats.format import Format, parse_format
from methods.formats.numerics import decode, encode, linear, payload_bits, quantize_activation
from methods.formats.packing import pack, packed_bytes, unpack

NAMES = [
    "fp32",
    "bf16",
    "fp16",
    "w2a16-g16",
    "w3a16-g48-asym",
    "w4a16",
    "w4a16-asym",
    "w4a8-g64",
    "w4a8-token-g64",
    "w4a8-token",
    "w8a8-token",
    "w8a8-g32-asym",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name: str) -> None:
    assert parse_format(name).name == name
    assert parse_format(parse_format(name).name) == parse_format(name)


@pytest.mark.parametrize(
    "name", ["", "int4", "w4", "w9a16", "w4a16-g20", "w4a16-g8", "w4a16-token", "w4a4", "w04a16", "W4a16", "w4a8"]
)
def test_other_names_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match="format"):
        parse_format(name)


def test_groups_and_bits() -> None:
    fmt = parse_format("w4a16-g48-asym")
    assert (fmt.groups(144), fmt.group_size(144), fmt.levels) == (3, 48, 16)
    assert fmt.bits_per_weight(144) == 4 + 32 / 48
    assert parse_format("w3a16").bits_per_weight(144) == 3 + 16 / 144
    assert parse_format("bf16").bits_per_weight(144) == 16
    assert fmt.divides(96) and not fmt.divides(100)
    with pytest.raises(ValueError, match=r"group=48 does not divide d_in=160; use one of \[16, 32\]"):
        fmt.groups(160)
    assert parse_format("w8a16").code_range == (1, 255) and parse_format("w8a16-asym").code_range == (0, 255)
    assert parse_format("w2a16").code_range == (0, 3)


def test_decode_by_hand() -> None:
    codes = torch.tensor([[0, 3, 1, 2], [2, 2, 0, 3]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 4.0]]).bfloat16()
    symmetric = Format(bits=2, group=-1)
    assert decode(symmetric, {"codes": codes, "scale": scale}).tolist() == [[-1.0, 0.5, 2.0, 0.0], [0.0, 0.0, -8.0, 4.0]]
    offset = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).bfloat16()
    asymmetric = Format(bits=2, group=-1, symmetric=False)
    payload = {"codes": codes, "scale": scale, "offset": offset}
    assert decode(asymmetric, payload).tolist() == [[1.0, 2.5, -2.0, -4.0], [1.0, 1.0, 0.5, 12.5]]
    assert payload_bits(asymmetric, payload) == 8 * 2 + 8 * 16
    assert torch.equal(encode(decode(asymmetric, payload), asymmetric, scale, offset), codes)


@pytest.mark.parametrize("name", ["w2a16-g16", "w3a16-g48", "w4a16-g48-asym", "w8a16", "w8a16-asym"])
def test_encode_takes_the_nearest_value(name: str) -> None:
    fmt, generator = parse_format(name), torch.Generator().manual_seed(0)
    weight = torch.randn(3, 144, generator=generator)
    scale = (torch.rand(3, fmt.groups(144), generator=generator) + 0.5).bfloat16() / fmt.levels * 3
    scale[1] *= -1
    offset = None if fmt.symmetric else torch.randn(3, fmt.groups(144), generator=generator).bfloat16()
    values = []
    for code in range(fmt.code_range[0], fmt.code_range[1] + 1):
        payload = {"codes": torch.full((3, 144), code, dtype=torch.uint8), "scale": scale}
        values.append(decode(fmt, payload if offset is None else {**payload, "offset": offset}))
    nearest = (torch.stack(values) - weight).abs().argmin(0) + fmt.code_range[0]
    assert torch.equal(encode(weight, fmt, scale, offset).long(), nearest)


def test_activations_by_hand() -> None:
    x = torch.tensor([[12.7, -6.35, 0.04, 0.06] * 4 + [1.27] * 16, [0.0] * 32])
    token = quantize_activation(x, parse_format("w8a8-token"))
    torch.testing.assert_close(token[0, :4], torch.tensor([12.7, -6.4, 0.0, 0.1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(token[0, 16:], torch.full((16,), 1.3), rtol=0, atol=1e-5)
    grouped = quantize_activation(x, parse_format("w8a8-g16"))
    torch.testing.assert_close(grouped[0, 16:], torch.full((16,), 1.27), rtol=0, atol=1e-5)
    assert not token[1].any() and not grouped[1].any()
    assert quantize_activation(x, parse_format("w4a16-g16")) is x


def test_linear_rounds_its_input_and_adds_its_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 48), (5, 48), (5,)))
    fmt = parse_format("w8a8-g16")
    torch.testing.assert_close(linear(x, weight, fmt, bias), quantize_activation(x, fmt) @ weight.T + bias)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (5, 3), (13, 144), (3, 5, 7), (65536 * 8 + 11,)])
def test_packing_round_trips_with_at_most_seven_bits_of_padding(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(codes.numel(), bits)
    assert 0 <= packed.numel() * 8 - codes.numel() * bits <= 7
    assert torch.equal(unpack(packed, bits, shape), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_least_significant_bit_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (21,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(packed_bytes(21, bits), "little")


def test_packing_takes_strided_codes_and_copies() -> None:
    codes = torch.randint(0, 16, (6, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes.T, 4), 4, (10, 6)), codes.T)
    packed = pack(codes, 8)
    packed += 1
    assert int(codes.max()) < 16


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="code 4 does not fit into 2 bits"):
        pack(torch.tensor([1, 4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.tensor([1, 4]), 4)
    with pytest.raises(ValueError, match="bits=9"):
        pack(torch.tensor([1, 4], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="3 bytes are not"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, (5, 2))
