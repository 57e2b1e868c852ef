"""Elements, scale codecs and activation rules against slow, obvious versions; the integers have `test_formats`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gguf import quants

from methods.formats import scales, stored
from methods.formats.codecs import CODECS
from methods.formats.elements import BITS, MINIFLOATS, NF4, largest, levels, normal_float
from methods.formats.format import NAMED, Format, parse_format
from methods.formats.levels import fixed, table
from methods.formats.numerics import binary_levels, decode, encode, payload_bits, quantize_activation
from methods.formats.packing import packed_bytes
from methods.quant.grid import Grid, grouped
from methods.quant.lut import lut_grid
from methods.quant.minmax import minmax
from methods.quant.mse import mse
from methods.quant.nearest import nearest

GRIDS = [
    *NAMED,
    "e3m2a16-g64",
    "e5m2a16",
    "nf3a16-g48",
    "nf4a16-whole",
    "tern2a8-token-g64",
    "tern2a16-b5x64",
    "bin1a16-g64",
    "bcq1a16-g64",
    "bcq3a16-g48-asym",
    "lut2a16-g64",
    "lut3a16",
    "lut4a16-whole",
    "w4a16-g16-u4",
    "w3a16-g16-dq",
    "w5a4-token-g48",
    "w7a6-g64",
    "w8a8-tensor-whole",
    "w4a16-b5x64-fp16-asym",
    "w4a16-g32-k6-asym",
    "w3a16-g16-bi3",
    "w3a16-g16-bi3-asym",
    "w4a8-token-g48-bi3-asym",
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(d_out: int = 13, d_in: int = 768) -> torch.Tensor:
    weight = random(d_out, d_in) * 0.05 + 0.01
    weight[1, :128], weight[2] = 0.0, 0.0
    weight[3, 7], weight[4] = 0.9, weight[4] * 100
    return weight


@pytest.mark.parametrize("name", GRIDS)
def test_names_round_trip(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e4m3ae4m3-token", "is written 'fp8-token'"),
        ("nf5a16", "nf codes have"),
        ("xx4a16", "use one of int, e2m1"),
        ("w4a7-token", r"act_bits=7; use one of \(4, 6, 8, 16\)"),
        ("nf4a16-asym", "no offset"),
        ("lut3a16-u4", "stores levels in bf16"),
        ("w4a16-k6", "use a divisor of 256"),
        ("w4a16-g48-k6", "use a divisor of 256"),
        ("bcq2a16-whole", "scales of its own in every row"),
        ("w4a8-super-g32", "act_group=0"),
        ("fp8", r"<element>a<act>\[-token"),
    ],
)
def test_other_names_are_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_format(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_group": 32}, "act_group=32"),
        ({"act_rows": -1}, "mean nothing with act_bits=16"),
        ({"rows": -1, "group": 64}, "one for the whole weight"),
        ({"rows": 0}, "rows=0"),
        ({"codec": "nv", "rows": 4}, "in every row"),
        ({"act_bits": 8, "act_rows": 3}, "act_rows=3"),
        ({"act_bits": 8, "act_element": "nf"}, "act_element='nf'"),
    ],
)
def test_formats_that_mean_nothing_are_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(parse_format("w4a16"), **fields)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("mxfp4a16", 4.25), ("nvfp4a16", 4.5), ("nf4", 4.5), ("nf4-dq", 4 + 8 / 64 + 32 / 64 / 256), ("q4_k", 4.5)),
        *(("q2_k", 2.625), ("q3_k", 3.4375), ("q6_k", 6.5625), ("q8_0", 8.5), ("q4_1", 5.0), ("tern2a16-g64", 2.25)),
        *(("w3a16-g16-bi3-asym", 3 + 6 / 16 + 64 / 256), ("w4a16-g32-bi3", 4 + 3 / 32 + 32 / 512)),
        *(("w4a16-g16-u4", 4 + 4 / 16 + 32 / 4096), ("bcq3a16-g64", 3 + 48 / 64), ("lut3a16", 3 + 128 / 4096)),
        *(("fp8-block", 8 + 32 / 128**2), ("fp8-tensor", 8.0), ("fp8-token", 8 + 16 / 4096)),
    ],
)
def test_bits_of_a_large_weight(name: str, bits: float) -> None:
    assert parse_format(name).bits_per_weight(4096, 4096) == pytest.approx(bits, abs=5e-6)


def test_minifloats_round_as_torch_casts() -> None:
    wide = torch.cat([random(5000) * 2.0**k for k in range(-22, 17)]).clamp(-57344, 57344)
    for element, dtype, top in (("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)):
        rungs = fixed(element, 8)
        middles = (rungs.values[1:] + rungs.values[:-1]) / 2
        x = torch.cat([wide.clamp(-top, top), middles, rungs.values])
        codes, values = rungs.take(rungs.nearest(x))
        expected = x.to(dtype)
        assert torch.equal(values, expected.float())
        # Zero has two codes there: of those that round to it, negative ones keep their sign.
        assert torch.equal(codes[values != 0], expected.view(torch.uint8).long()[values != 0])


def test_small_minifloats_by_hand() -> None:
    assert levels("e2m1", 4)[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) and levels("e2m1", 4)[8:] == tuple(
        -value for value in levels("e2m1", 4)[:8]
    )
    assert [largest(e, BITS[e][0]) for e in MINIFLOATS] == [6.0, 7.5, 28.0, 448.0, 57344.0]
    assert levels("e2m3", 6)[1] == 0.125 and levels("e3m2", 6)[1] == 0.0625
    assert sum(math.isnan(value) for value in levels("e4m3", 8)) == 2
    assert sum(math.isnan(value) for value in levels("e5m2", 8)) == 8


def test_normal_float_is_the_published_table() -> None:
    assert max(abs(a - b) for a, b in zip(NF4, normal_float(4), strict=True)) < 1e-6
    assert levels("nf", 4) == NF4
    three = levels("nf", 3)
    assert len(three) == 8 and list(three) == sorted(three) and (three[0], three[3], three[7]) == (-1.0, 0.0, 1.0)


def slow_decode(fmt: Format, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """One code at a time, from the scales as they are computed with."""
    d_out, d_in = codes.shape
    size, result = fmt.group_size(d_in), torch.empty(d_out, d_in)
    for i in range(d_out):
        for j in range(0, d_in, 5):
            code = int(codes[i, j])
            if grid.levels is not None:
                level = float(grid.levels[i, j // size, code])
            elif fmt.element == "int":
                level = float(code - (2 ** (fmt.bits - 1) if fmt.symmetric else 0))
            else:
                level = levels(fmt.element, fmt.bits)[code]
            value = torch.tensor(level) * grid.scale[i, j // size].float()
            result[i, j] = value if grid.offset is None else value + grid.offset[i, j // size].float()
    return result[:, ::5]


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_the_nearest_and_decode_by_hand(name: str) -> None:
    fmt, weight = parse_format(name), weights()
    grid = minmax(weight, fmt)
    payload = nearest(weight, fmt, grid)
    dense = decode(fmt, payload)
    assert torch.isfinite(dense).all() and bool((grid.scale != 0).all())
    assert torch.equal(dense[:, ::5], slow_decode(fmt, grid, payload["codes"]))
    assert payload_bits(fmt, payload) == pytest.approx(fmt.bits_per_weight(768, 13) * weight.numel(), rel=1e-12)
    size, error = fmt.group_size(768), (dense - weight).abs()
    for code in range(fmt.code_range[0], fmt.levels):
        other = decode(fmt, {**payload, "codes": torch.full_like(payload["codes"], code)})
        closer = (other - weight).abs() < error - 1e-6 * grid.scale.abs().float().repeat_interleave(size, 1)
        assert not (closer & other.isfinite()).any()


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_twice_changes_nothing(name: str) -> None:
    """On the grid that was found; so the stored form of a grid is the one that is computed with."""
    fmt, weight = parse_format(name), weights()
    grid = minmax(weight, fmt)
    once = decode(fmt, nearest(weight, fmt, grid))
    assert torch.equal(decode(fmt, nearest(once, fmt, grid)), once)
    if grid.stored is not None and grid.levels is None:
        found = scales.spread(fmt, scales.read(fmt, "scale", grid.stored), 13)
        assert torch.equal(found.float(), grid.scale.float())


@pytest.mark.parametrize("name", [name for name in GRIDS if not name.startswith(("lut", "bcq"))])
def test_mse_is_in_no_group_worse_than_minmax(name: str) -> None:
    fmt, weight = parse_format(name), weights()
    rows = 13 if fmt.rows == -1 else fmt.rows

    def errors(grid: Grid) -> torch.Tensor:
        error = grouped(decode(fmt, nearest(weight, fmt, grid)) - weight, fmt).double().square().sum(-1)
        return torch.stack([part.sum(0) for part in error.split(rows)])

    plain, fitted = errors(minmax(weight, fmt)), errors(mse(weight, fmt))
    assert (fitted <= plain * (1 + 1e-5) + 1e-12).all()
    assert fitted.sum() < plain.sum() or fmt.element == "bin" or fmt.bits == 8


@pytest.mark.parametrize("name", ["lut3a16", "bcq2a16-g64"])
def test_mse_and_plain_encoding_refuse_fitted_levels(name: str) -> None:
    fmt = parse_format(name)
    with pytest.raises(ValueError, match="levels that are fitted one by one"):
        mse(weights(), fmt)
    with pytest.raises(ValueError, match="its levels are fitted; give those of the grid"):
        encode(weights(), fmt, torch.ones(13, fmt.groups(768)))


def test_level_sets_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give \(13, n_groups, 8\)"):
        lut_grid(parse_format("lut3a16"), 13, torch.zeros(1, 1, 8))
    with pytest.raises(ValueError, match=r"give \(1, n_groups, 8\)"):
        lut_grid(parse_format("lut3a16-whole"), 13, torch.zeros(1, 1, 4))


def test_levels_in_any_order() -> None:
    fmt, own = parse_format("lut2a16-g16"), torch.tensor([[[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -3.0, 4.0]]])
    weight = torch.tensor([[0.4, -0.9, 1.9, 0.1] * 4 + [1.2, 2.4, -9.0, 2.6] * 4])
    grid = lut_grid(fmt, 1, own)
    payload = nearest(weight, fmt, grid)
    assert payload["codes"][0, :4].tolist() == [0, 1, 2, 3] and payload["levels"].dtype == torch.bfloat16
    assert decode(fmt, payload)[0, 16:20].tolist() == [1.0, 1.0, -3.0, 4.0]


def test_binary_levels_by_hand() -> None:
    assert binary_levels(torch.tensor([2.0, 0.5])).tolist() == [-2.5, 1.5, -1.5, 2.5]


def test_powers_of_two_follow_ocp() -> None:
    """2**(floor(log2 max) - largest exponent), the codes of gguf's own MXFP4 quantizer but for ties, and its values bit for bit."""
    fmt, weight = parse_format("mxfp4a16"), random(7, 192) * 3
    weight[0, 0], weight[1, :32] = 4.0, 0.0
    payload = nearest(weight, fmt, minmax(weight, fmt))
    top = weight.view(7, 6, 32).abs().amax(-1)
    expected = torch.where(top > 0, top.log2().floor() - 2 + 127, 127.0)
    assert torch.equal(payload["scale"].float(), expected)
    nibbles = payload["codes"].view(42, 2, 16)
    stored = torch.cat([payload["scale"].view(42, 1), nibbles[:, 0] | nibbles[:, 1] << 4], 1).numpy()
    assert torch.equal(torch.from_numpy(quants.MXFP4.dequantize_blocks(stored)).view(7, 192), decode(fmt, payload))
    theirs = quants.MXFP4.quantize_blocks(weight.view(42, 32).numpy())
    assert (theirs == stored)[top.view(-1) > 0].mean() > 0.99
    assert CODECS["e8m0"].width == 8 and int(scales.write(fmt, "scale", torch.tensor([[3.0]]))["scale"]) == 129


def test_nvfp4_by_its_equations() -> None:
    fmt, weight = parse_format("nvfp4a16"), weights()
    payload = nearest(weight, fmt, minmax(weight, fmt))
    upper = 448 * 6 / weight.abs().max()
    assert payload["scale_super"].shape == (1, 1)
    torch.testing.assert_close(payload["scale_super"][0, 0], upper)
    top = weight.view(13, 48, 16).abs().amax(-1)
    expected = (top / 6 * payload["scale_super"]).clamp(min=2.0**-9).to(torch.float8_e4m3fn)
    assert torch.equal(payload["scale"], expected.view(torch.uint8))
    assert float(table("e4m3", 8)[payload["scale"].long()].max()) == 448.0


def test_double_quantization_by_its_equations() -> None:
    fmt, weight = parse_format("nf4-dq"), random(40, 768) * 0.05
    grid, plain = minmax(weight, fmt), minmax(weight, parse_format("nf4"))
    ideal = plain.scale.flatten()
    mean = ideal.mean()
    assert grid.parts["scale_super"].shape == (2,) and torch.allclose(grid.parts["scale_mean"], mean)
    for block in range(2):
        part = ideal[block * 256 : block * 256 + 256] - mean
        step = part.abs().max() / 127
        found = grid.scale.flatten()[block * 256 : block * 256 + 256]
        torch.testing.assert_close(found, mean + (part / step).round() * step)
    first, second = (decode(f, nearest(weight, f, g)) for f, g in ((parse_format("nf4"), plain), (fmt, grid)))
    single, double = ((dense - weight).square().sum() for dense in (first, second))
    assert not torch.equal(first, second) and abs(float(double / single) - 1) < 0.01
    tiny = torch.cat([weight, weight * 1e-6])
    assert bool((minmax(tiny, fmt).scale > 0).all())


def test_two_level_scales_by_their_equations() -> None:
    fmt, weight = parse_format("w4a16-g16-u4"), weights()
    grid = minmax(weight, fmt)
    ideal = weight.view(13, 48, 16).abs().amax(-1) / 7
    gamma = ideal.amax(1, keepdim=True) / 15
    used = torch.tensor([row for row in range(13) if row != 2])
    torch.testing.assert_close(grid.parts["scale_super"][used], gamma[used])
    assert torch.equal(grid.parts["scale"][used], (ideal / gamma)[used].round().clamp(1, 15).to(torch.uint8))


def test_scales_and_zero_points_of_sixteen_rows_by_their_equations() -> None:
    """37 rows make three sets, the last of five; a scale and a zero point are 3-bit steps above the least of their set, both in bf16."""
    fmt, weight = parse_format("w3a16-g16-bi3-asym"), random(37, 96, seed=1) * 0.05
    weight[3, 16:32] = 0.0
    grid = minmax(weight, fmt)
    payload = nearest(weight, fmt, grid)
    low, high = weight.view(37, 6, 16).aminmax(dim=-1)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 7
    zero = torch.where(scale > 0, -low.clamp(max=0) / scale, 0.0)
    assert {part: tuple(tensor.shape) for part, tensor in payload.items() if "_" in part} == {
        f"{role}_{part}": (3, 6) for role in ("scale", "offset") for part in ("super", "least")
    }
    for role, values in (("scale", scale), ("offset", zero)):
        for group in range(6):
            for rows in (slice(0, 16), slice(16, 32), slice(32, 37)):
                own = values[rows, group]
                least = own[own > 0].min().bfloat16() if role == "scale" else own.min().bfloat16()
                step = ((own.max() - least.float()) / 7).bfloat16()
                codes = ((own - least.float()) / step.float()).round().clamp(0, 7)
                assert payload[f"{role}_least"][rows.start // 16, group] == least
                assert payload[f"{role}_super"][rows.start // 16, group] == step
                assert torch.equal(payload[role][rows, group].float(), codes)
                used = least.float() + codes * step.float()
                if role == "scale":
                    assert torch.equal(grid.scale[rows, group], used)
                else:
                    assert grid.offset is not None and torch.equal(grid.offset[rows, group], -used * grid.scale[rows, group])
    assert (decode(fmt, payload)[3, 16:32] == 0).all()
    packed = {part: stored.packed(fmt, part, tensor) for part, tensor in payload.items()}
    assert packed["scale"].numel() == packed_bytes(37 * 6, 3) and packed["codes"].numel() == packed_bytes(37 * 96, 3)
    again = {part: stored.unpacked(fmt, part, tensor, (37, 96)) for part, tensor in packed.items()}
    assert all(torch.equal(again[part], payload[part]) for part in payload)


def test_zero_points_cannot_be_written_without_their_scales() -> None:
    with pytest.raises(ValueError, match="give the scales as `unit`"):
        scales.write(parse_format("w3a16-g16-bi3-asym"), "offset", torch.zeros(3, 2))


def test_like_takes_the_second_level_over() -> None:
    for codec in ("nv", "dq", "u6", "k6", "bi3"):
        fmt = Format(4, 16, element="int", codec=codec)
        ideal = random(3, 48).abs() + 0.5
        first = scales.write(fmt, "scale", ideal)
        again = scales.write(fmt, "scale", scales.read(fmt, "scale", first), first)
        assert all(torch.equal(first[part], again[part]) for part in first)
        halved = scales.write(fmt, "scale", ideal * 0.7, first)
        assert torch.equal(halved["scale_super"], first["scale_super"]) and not torch.equal(halved["scale"], first["scale"])


def test_ranges_are_shared_by_rows() -> None:
    weight = weights()
    block = minmax(weight, parse_format("fp8-block"))
    assert block.parts["scale"].shape == (1, 6)
    rows = minmax(weight, parse_format("w4a16-b5x64"))
    assert rows.parts["scale"].shape == (3, 12)
    top = weight[5:10, 64:128].flatten()
    extreme = top[top.abs().argmax()]
    assert (rows.scale[5:10, 1] == (extreme / -8).bfloat16()).all()


# Relative squared errors on Gaussian weights, measured elsewhere to two or three digits.
@pytest.mark.parametrize(
    ("name", "error"),
    [("mxfp4a16", 1.31e-2), ("nvfp4a16", 9.1e-3), ("nf4", 8.44e-3), ("w4a16-g64-asym", 8.22e-3), ("w4a16-g16-u4", 7.64e-3)],
)
def test_errors_on_gaussian_weights(name: str, error: float) -> None:
    fmt, weight = parse_format(name), random(96, 768, seed=5)
    found = (decode(fmt, nearest(weight, fmt, minmax(weight, fmt))) - weight).square().sum() / weight.square().sum()
    assert float(found) == pytest.approx(error, rel=0.06)


def test_activations_in_blocks() -> None:
    x = random(3, 64) * torch.tensor([[1.0], [100.0], [0.0]])
    for name, code in (("mxfp4a4", "e2m1"), ("mxfp4a8", "e4m3"), ("mxfp6e2m3a6", "e2m3"), ("mxfp8e5m2a8", "e5m2")):
        groups = x.view(3, 2, 32)
        top = groups.abs().amax(-1, keepdim=True)
        power = torch.where(top > 0, torch.exp2(top.log2().floor() - math.floor(math.log2(largest(code, BITS[code][0])))), 1.0)
        values = torch.tensor([v for v in levels(code, BITS[code][0]) if not math.isnan(v)])
        distance = ((groups / power)[..., None] - values).abs()
        found = quantize_activation(x, parse_format(name)).view(3, 2, 32) / power
        torch.testing.assert_close((groups / power - found).abs(), distance.amin(-1), rtol=0, atol=1e-6)
    groups = x.view(3, 4, 16)
    token = x.abs().amax(-1).view(3, 1, 1).clamp(min=1e-30)
    eighth = (groups.abs().amax(-1, keepdim=True) / 6 * (448 * 6 / token)).clamp(min=2.0**-9).to(torch.float8_e4m3fn).float()
    scale = eighth / (448 * 6 / token)
    codes = fixed("e2m1", 4)
    expected = codes.values[codes.nearest(groups / scale)] * scale
    torch.testing.assert_close(quantize_activation(x, parse_format("nvfp4a4")), expected.view(3, 64))


ROUNDING = (
    *("w8a8-token", "w8a8-g64", "w5a4-token-g48", "q4_k", "q8_0"),
    *("fp8-token", "fp8-tensor", "fp8-block", "mxfp4a4", "mxfp8a8", "mxfp6e2m3a6", "nvfp4a4"),
)


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_becomes_one(name: str, value: float) -> None:
    """The input itself and what shares its scale come out as NaN; other tokens with scales of their own are as without it."""
    fmt, x = parse_format(name), random(3, 768)
    broken = x.clone()
    broken[1, 5] = value
    found, sound = quantize_activation(broken, fmt), quantize_activation(x, fmt)
    assert found[1, 5].isnan() and sound.isfinite().all()
    if fmt.act_rows != -1:
        assert torch.equal(found[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_static_scales_keep_what_is_no_number(value: float) -> None:
    fmt, x = parse_format("w8a8-tensor"), random(3, 768)
    x[1, 5] = value
    for parts in ({"act.scale": torch.tensor([0.1])}, {"act.scale": torch.tensor([0.1]), "act.offset": torch.tensor([-5.0])}):
        found = quantize_activation(x, fmt, parts)
        assert found[1, 5].isnan() and found.isnan().sum() == 1


def test_one_scale_for_all_tokens() -> None:
    x = random(2, 5, 48)
    scale = x.abs().max() / 127
    torch.testing.assert_close(quantize_activation(x, parse_format("w8a8-tensor")), (x / scale).round() * scale)
    scale = x.abs().max() / 448
    expected = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(quantize_activation(x, parse_format("fp8-tensor")), expected)
    per_token = quantize_activation(x, parse_format("fp8-token"))
    assert torch.equal(per_token[0], quantize_activation(x[:1], parse_format("fp8-token"))[0])
    few = quantize_activation(x, parse_format("w4a4-token"))
    scale = x.abs().amax(-1, keepdim=True) / 7
    torch.testing.assert_close(few, (x / scale).round() * scale)


def test_static_scales() -> None:
    x, fmt = random(4, 48), parse_format("w8a8-tensor")
    scale, offset = torch.rand(48, generator=torch.Generator().manual_seed(1)) / 50 + 0.01, torch.full((48,), -2.0)
    symmetric = quantize_activation(x, fmt, {"act.scale": scale})
    torch.testing.assert_close(symmetric, (x / scale).round().clamp(-127, 127) * scale)
    shifted = quantize_activation(x, fmt, {"act.scale": scale[:1], "act.offset": offset[:1]})
    torch.testing.assert_close(shifted, ((x + 2) / scale[0]).round().clamp(0, 255) * scale[0] - 2)
    eighth = quantize_activation(x * 1000, parse_format("fp8-tensor"), {"act.scale": torch.ones(1)})
    assert float(eighth.max()) == 448.0
    nv, own = parse_format("nvfp4a4"), {"act.scale": torch.tensor([100.0])}
    assert not torch.equal(quantize_activation(x, nv, own), quantize_activation(x, nv))
    with pytest.raises(ValueError, match="use -tensor"):
        quantize_activation(x, parse_format("w8a8-token"), {"act.scale": scale})
    with pytest.raises(ValueError, match="symmetric about zero"):
        quantize_activation(x, parse_format("fp8-tensor"), {"act.scale": scale, "act.offset": offset})


def test_kept_columns_keep_their_inputs_and_count_for_no_scale() -> None:
    x = random(3, 48)
    x[:, [5, 40]] = 1000.0
    payload = {"columns.index": torch.tensor([5, 40], dtype=torch.int32)}
    got = quantize_activation(x, parse_format("w8a8-token"), payload)
    rest = x.index_fill(1, torch.tensor([5, 40]), 0.0)
    assert (got[:, [5, 40]] == 1000.0).all()
    torch.testing.assert_close(
        got.index_fill(1, torch.tensor([5, 40]), 0.0), quantize_activation(rest, parse_format("w8a8-token"))
    )
