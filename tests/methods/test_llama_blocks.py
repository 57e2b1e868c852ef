"""llama.cpp's types: the values of a payload are, bit for bit, those that `gguf` reads from the blocks written from its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from methods import catalogue
from methods.formats.format import parse_format
from methods.formats.gguf_blocks import pack_blocks
from methods.formats.gguf_types import block_type, input_rounding, refuses
from methods.formats.numerics import decode, payload_bits, quantize_activation
from methods.formats.sides import columns
from methods.model.structure import LayerSpec, Site
from methods.policy import Decision
from methods.quant.imatrix import imatrix
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest

NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4a16")


def weights(d_out: int = 5, d_in: int = 768) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator) * torch.rand(d_out, 1, generator=generator)
    weight[1, 32:64], weight[2], weight[3, :256] = 0.0, 0.0, weight[3, :256].abs() + 0.5
    return weight


def read(name: str, payload: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What `gguf` makes of the bytes."""
    kind = GGMLQuantizationType[str(block_type(parse_format(name)))]
    return torch.from_numpy(quants.dequantize(pack_blocks(parse_format(name), payload), kind))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", [minmax, mse])
def test_blocks_read_back_as_they_decode(name: str, fit) -> None:
    fmt, weight = parse_format(name), weights()
    payload = nearest(weight, fmt, fit(weight, fmt))
    assert torch.equal(decode(fmt, payload), read(name, payload))
    stored = pack_blocks(fmt, payload)
    assert stored.dtype == np.uint8 and stored.shape[0] == 5 and stored.size * 8 == payload_bits(fmt, payload)
    assert payload_bits(fmt, payload) == fmt.bits_per_weight(768) * weight.numel()


@pytest.mark.parametrize("name", NAMES)
def test_any_codes_and_scales_read_back_as_they_decode(name: str) -> None:
    """Also those that no fitter makes: zero and extreme sub-scales, the code -128."""
    fmt, weight, generator = parse_format(name), weights(), torch.Generator().manual_seed(1)
    payload = {}
    for part, tensor in nearest(weight, fmt, minmax(weight, fmt)).items():
        limit = 250 if name == "mxfp4a16" and part == "scale" else 2 ** fmt.widths.get(part, 8)
        if tensor.dtype == torch.uint8:
            payload[part] = torch.randint(0, limit, tensor.shape, generator=generator, dtype=torch.uint8)
        else:
            payload[part] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    assert torch.equal(decode(fmt, payload), read(name, payload))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("w4a16-g32", "Q4_0"), ("w4a8-g64", "Q4_0"), ("w4a16", "Q4_0"), ("w4a16-g32-fp16", "Q4_0")),
        *(("w4a8-g32-asym", "Q4_1"), ("w5a16-g96", "Q5_0"), ("w5a8-token-asym", "Q5_1")),
        *(("w8a16-g32", "Q8_0"), ("w8a8-g128", "Q8_0"), ("w8a8-token", "Q8_0"), ("mxfp4a8", "MXFP4")),
    ],
)
def test_integers_with_float_scales_are_blocks_that_repeat_them(name: str, kind: str) -> None:
    fmt, weight = parse_format(name), weights()
    payload = nearest(weight, fmt, mse(weight, fmt))
    assert block_type(fmt) == kind and refuses(fmt, 768) is None
    assert torch.equal(decode(fmt, payload), read(name, payload))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("w3a16-g32", "no GGML type has symmetric 3-bit integers"),
        ("w8a16-g32-asym", "no GGML type has asymmetric 8-bit integers"),
        ("w4a16-g48", "blocks are of 32 inputs, which group=48 does not fill"),
        ("w4a16-g16", "group=16 does not fill"),
        ("w4a16-b5x64-fp16-asym", "no GGML type stores"),
        ("nf4", "no GGML type stores nf4; use one of q4_0"),
        ("nvfp4a16", "no GGML type stores"),
        ("w4a16-g32-k6-asym", None),
    ],
)
def test_what_no_type_stores_is_refused_with_the_reason(name: str, reason: str | None) -> None:
    fmt = parse_format(name)
    assert (reason is None) == (refuses(fmt, 768) is None) and (reason or "") in str(refuses(fmt, 768))
    if reason is not None:
        with pytest.raises(ValueError, match=reason[:20]):
            pack_blocks(fmt, nearest(weights(), fmt, minmax(weights(), fmt)))


def test_nothing_is_rounded_and_nothing_left_out() -> None:
    fmt, weight = parse_format("w4a16-g32"), weights()
    payload = nearest(weight, fmt, minmax(weight, fmt))
    small = {**payload, "scale": payload["scale"].clone()}
    small["scale"][3, 5] = 1.0078125 * 2.0**-24
    with pytest.raises(ValueError, match=r"scale 6\.00\d*e-08 of w4a16-g32 is no fp16 number"):
        pack_blocks(fmt, small)
    with pytest.raises(ValueError, match="no fp16 number"):
        pack_blocks(fmt, {**payload, "scale": payload["scale"] * 2.0**20})
    with pytest.raises(ValueError, match=r"beside its grid \(columns.index, columns.value\)"):
        pack_blocks(fmt, {**payload, **columns(weight, torch.tensor([3]))})
    with pytest.raises(ValueError, match="Q4_K has blocks of 256 inputs, which 576 inputs do not fill"):
        pack_blocks(parse_format("q4_k"), {"codes": torch.zeros(4, 576, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="bf16 is dense"):
        pack_blocks(parse_format("bf16"), {"weight": weight})


def test_uneven_levels_are_spent_on_the_longer_side_and_have_no_zero() -> None:
    weight = weights()
    worse = parse_format("q4_0")
    for name in ("iq4_nl", "iq4_xs"):
        fmt = parse_format(name)
        payload = nearest(weight, fmt, minmax(weight, fmt))
        assert float(decode(fmt, payload)[2].abs().max()) < 1e-6
        groups, found = weight[[0, 3, 4]].view(3, 24, 32), decode(fmt, payload)[[0, 3, 4]].view(3, 24, 32)
        place = groups.abs().argmax(-1, keepdim=True)
        assert torch.allclose(found.gather(-1, place), groups.gather(-1, place), rtol=2e-3 if name == "iq4_nl" else 0.05)
        best, even = (decode(f, nearest(weight, f, mse(weight, f))) for f in (fmt, worse))
        assert (best - weight).square().sum() < (even - weight).square().sum()


def test_types_whose_codes_are_lattice_points_are_refused_by_name() -> None:
    for name in ("iq2_xxs", "iq3_s", "iq1_m"):
        with pytest.raises(ValueError, match=r"points of a lattice, .*; use q2_k, q3_k or iq4_xs"):
            parse_format(name)


def test_inputs_are_rounded_as_the_types_are_multiplied() -> None:
    assert all(input_rounding(parse_format(name)) is None for name in NAMES[:-1])
    assert input_rounding(parse_format("bf16")) is None
    assert input_rounding(parse_format("w4a8-g32")) == "rounded to int8 with an fp16 scale for every 32"
    assert (
        input_rounding(replace(parse_format("q4_k"), act_bits=16, act_group=-1))
        == "rounded to int8 with an fp32 scale for every 256"
    )


@pytest.mark.parametrize(("name", "reference"), [("q8_0", quants.Q8_0), ("q4_0", quants.Q4_0), ("q5_0", quants.Q5_0)])
def test_symmetric_types_hardly_differ_from_the_reference_quantizer(name: str, reference: type) -> None:
    """The scales are the same; codes differ where a weight lies near a tie, which the scale before rounding decides there."""
    fmt, weight = parse_format(name), weights()[[0, 3, 4]]
    payload = nearest(weight, fmt, minmax(weight, fmt))
    theirs = quants.quantize(weight.numpy(), GGMLQuantizationType[name.upper()]).reshape(-1, reference.type_size)
    ours = pack_blocks(fmt, payload).reshape(-1, reference.type_size)
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
    reason = catalogue.refuses(site, Decision.of("rtn", format="q4_k"))
    assert reason == "rtn: group=256 of q4_k does not divide d_in=576 of up"
    assert catalogue.refuses(site, Decision.of("rtn", format="q4_0")) is None
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
