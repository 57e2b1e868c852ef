"""llama.cpp's types: the values of a payload are, bit for bit, those that `gguf` reads from the blocks written from its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from methods.catalogue import refuses
from methods.formats.format import parse_format
from methods.formats.numerics import decode, payload_bits, quantize_activation
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision
from methods.quant.imatrix import imatrix
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest

Parts = Mapping[str, np.ndarray]


def halves(codes: np.ndarray, size: int) -> np.ndarray:
    """Nibbles: in every 2 * size codes, those of the second half above those of the first."""
    pairs = codes.reshape(len(codes), -1, 2, size)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def fields(codes: np.ndarray, bits: int, size: int) -> np.ndarray:
    """8 / bits codes a byte: byte j of every `size` holds the codes j, j + size, …"""
    parts = codes.reshape(len(codes), -1, 8 // bits, size)
    return sum(parts[:, :, i] << (bits * i) for i in range(8 // bits)).reshape(len(codes), -1).astype(np.uint8)


def floats(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).view(np.uint8)


def sub_scales(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The 12 bytes in which Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit minima."""
    first = np.concatenate([scale[:, :4] | (scale[:, 4:] >> 4) << 6, low[:, :4] | (low[:, 4:] >> 4) << 6], 1)
    return np.concatenate([first, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4], 1)


def q3_scales(scale: np.ndarray) -> np.ndarray:
    return np.concatenate([scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4, fields(scale >> 4, 2, 4)], 1)


WRITERS: dict[str, Callable[[Parts], list[np.ndarray]]] = {
    "q4_0": lambda p: [floats(p["scale"]), halves(p["codes"], 16)],
    "q4_1": lambda p: [floats(p["scale"]), floats(p["offset"]), halves(p["codes"], 16)],
    "q5_0": lambda p: [floats(p["scale"]), np.packbits(p["codes"] >> 4, 1, "little"), halves(p["codes"] & 15, 16)],
    "q5_1": lambda p: [
        *(floats(p["scale"]), floats(p["offset"])),
        *(np.packbits(p["codes"] >> 4, 1, "little"), halves(p["codes"] & 15, 16)),
    ],
    "q8_0": lambda p: [floats(p["scale"]), p["codes"] ^ 128],
    "q2_k": lambda p: [
        *(p["scale"] | p["offset"] << 4, fields(p["codes"], 2, 32)),
        *(floats(p["scale_super"]), floats(p["offset_super"])),
    ],
    "q3_k": lambda p: [
        *(fields(p["codes"] >> 2, 1, 32), fields(p["codes"] & 3, 2, 32)),
        *(q3_scales(p["scale"]), floats(p["scale_super"])),
    ],
    "q4_k": lambda p: [
        *(floats(p["scale_super"]), floats(p["offset_super"])),
        *(sub_scales(p["scale"], p["offset"]), halves(p["codes"], 32)),
    ],
    "q5_k": lambda p: [
        *(floats(p["scale_super"]), floats(p["offset_super"]), sub_scales(p["scale"], p["offset"])),
        *(fields(p["codes"] >> 4, 1, 32), halves(p["codes"] & 15, 32)),
    ],
    "q6_k": lambda p: [
        *(halves(p["codes"] & 15, 64), fields(p["codes"] >> 4, 2, 32)),
        *(p["scale"] ^ 128, floats(p["scale_super"])),
    ],
}


def blocks(name: str, payload: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The bytes (n_blocks, type_size) of a payload, block after block."""
    size = 256 if name.endswith("k") else 32
    n_blocks = payload["codes"].numel() // size
    return np.concatenate(WRITERS[name]({part: t.numpy().reshape(n_blocks, -1) for part, t in payload.items()}), 1)


def weights(d_out: int = 5, d_in: int = 768) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator) * torch.rand(d_out, 1, generator=generator)
    weight[1, 32:64], weight[2], weight[3, :256] = 0.0, 0.0, weight[3, :256].abs() + 0.5
    return weight


def read(name: str, payload: Mapping[str, torch.Tensor]) -> torch.Tensor:
    found = quants.dequantize(blocks(name, payload).reshape(len(payload["codes"]), -1), GGMLQuantizationType[name.upper()])
    return torch.from_numpy(found)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("fit", [minmax, mse])
def test_blocks_read_back_as_they_decode(name: str, fit) -> None:
    fmt, weight = parse_format(name), weights()
    payload = nearest(weight, fmt, fit(weight, fmt))
    assert torch.equal(decode(fmt, payload), read(name, payload))
    stored = blocks(name, payload)
    assert stored.dtype == np.uint8 and stored.size * 8 == payload_bits(fmt, payload)
    assert payload_bits(fmt, payload) == fmt.bits_per_weight(768) * weight.numel()


@pytest.mark.parametrize("name", WRITERS)
def test_any_codes_and_scales_read_back_as_they_decode(name: str) -> None:
    """Also those that no fitter makes: zero and extreme sub-scales, the code -128."""
    fmt, weight, generator = parse_format(name), weights(), torch.Generator().manual_seed(1)
    payload = {}
    for part, tensor in nearest(weight, fmt, minmax(weight, fmt)).items():
        limit = 2 ** fmt.widths.get(part, 8)
        if tensor.dtype == torch.uint8:
            payload[part] = torch.randint(0, limit, tensor.shape, generator=generator, dtype=torch.uint8)
        else:
            payload[part] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    assert torch.equal(decode(fmt, payload), read(name, payload))


@pytest.mark.parametrize(("name", "reference"), [("q8_0", quants.Q8_0), ("q4_0", quants.Q4_0), ("q5_0", quants.Q5_0)])
def test_symmetric_types_hardly_differ_from_the_reference_quantizer(name: str, reference: type) -> None:
    """The scales are the same; codes differ where a weight lies near a tie, which the scale before rounding decides there."""
    fmt, weight = parse_format(name), weights()[[0, 3, 4]]
    payload = nearest(weight, fmt, minmax(weight, fmt))
    theirs = quants.quantize(weight.numpy(), GGMLQuantizationType[name.upper()]).reshape(-1, reference.type_size)
    ours = blocks(name, payload)
    assert (ours[:, :2] == theirs[:, :2]).all()
    assert (ours == theirs).mean() > 0.98


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "q4_0", "q4_1", "w3a16-g48-asym"])
def test_imatrix_lowers_the_weighted_error_of_every_group(name: str) -> None:
    fmt, weight = parse_format(name), weights()
    importance = torch.rand(768, generator=torch.Generator().manual_seed(2)) ** 4 * 100
    start, none = minmax(weight, fmt), imatrix(weight, importance, fmt, 0)
    assert all(torch.equal(none.parts[part], start.parts[part]) for part in start.parts)
    cost = importance * (weight.square().mean(1, keepdim=True) + weight.square()).sqrt()

    def error(grid) -> torch.Tensor:
        rounded = decode(fmt, nearest(weight, fmt, grid))
        return (cost * (rounded - weight).square()).double().view(5, fmt.groups(768), -1).sum(-1)

    plain, fitted = error(start), error(imatrix(weight, importance, fmt, 10))
    assert (fitted <= plain * (1 + 1e-5) + 1e-12).all()
    assert fitted.sum() < 0.9 * plain.sum()
    blind = error(imatrix(weight, torch.ones(768), fmt, 10))
    assert fitted.sum() < blind.sum()


def test_a_row_that_super_blocks_do_not_fill_is_refused() -> None:
    site = Site("up", "up", 0, (LayerSpec("up", "up", 0, 576, 64),))
    reason = refuses(site, Decision.of("rtn", format="q4_k"))
    assert reason == "rtn: group=256 of q4_k does not divide d_in=576 of up"
    assert refuses(site, Decision.of("rtn", format="q4_0")) is None
    with pytest.raises(ValueError, match="group=256 does not divide d_in=576; use another format"):
        parse_format("q4_k").groups(576)


def test_activation_rules_of_the_types() -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)) * 1e-3
    legacy, k = quantize_activation(x, parse_format("q4_1")), quantize_activation(x, parse_format("q5_k"))
    groups = x.view(3, 16, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(legacy, ((groups / scale).round() * scale.half().float()).view_as(x))
    groups = x.view(3, 2, 256)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(k, ((groups / scale).round() * scale).view_as(x))
