"""The fitters against hand calculations, and what each promises."""

import pytest
import torch

from methods.formats.format import parse_format
from methods.formats.numerics import decode
from methods.quant.grid import Grid, fit_in_chunks, grouped, stored
from methods.quant.hqq import NORM, hqq
from methods.quant.minmax import minmax
from methods.quant.mse import _ladder, mse
from methods.quant.nearest import nearest

FORMATS = [
    "w2a16-g16",
    "w3a16-g48",
    "w4a16-g48",
    "w8a16-g48",
    "w4a16",
    "w8a16",
    "w2a16-g16-asym",
    "w3a16-g48-asym",
    "w4a16-asym",
]


def weights(d_out: int = 7, d_in: int = 144, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[2, 5] = 0.4
    weight[3, 7] = -0.4
    return weight


def rounded(weight: torch.Tensor, name: str, grid: Grid) -> torch.Tensor:
    fmt = parse_format(name)
    return decode(fmt, nearest(weight, fmt, grid))


def group_errors(weight: torch.Tensor, name: str, grid: Grid, power: float = 2.0) -> torch.Tensor:
    fmt = parse_format(name)
    return grouped((rounded(weight, name, grid) - weight).abs().double(), fmt).double().pow(power).sum(-1)


def test_minmax_by_hand() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.0] * 4, [0.5, 1.0, 0.25, 0.0] * 4])
    symmetric = minmax(weight, parse_format("w4a16-g16"))
    assert symmetric.offset is None
    assert symmetric.scale.tolist() == [[0.125], [-0.125]]
    assert minmax(weight, parse_format("w8a16")).scale.float().flatten().tolist() == pytest.approx(
        [1 / 127, 1 / 127], rel=2**-8
    )
    asymmetric = minmax(weight, parse_format("w2a16-g16-asym"))
    assert asymmetric.offset is not None
    assert asymmetric.offset.tolist() == [[-1.0], [0.0]]
    assert asymmetric.scale.float().flatten().tolist() == pytest.approx([0.5, 1 / 3], rel=2**-8)


@pytest.mark.parametrize("name", FORMATS)
def test_minmax_error_is_at_most_half_a_step_inside_the_range(name: str) -> None:
    weight, fmt = weights(), parse_format(name)
    grid = minmax(weight, fmt)
    # A symmetric grid below 8 bits ends one step before the extreme value's opposite; bf16 moves the ends by up to 2**-8 of the range.
    step = grid.scale.float().abs()[..., None]
    allowed = 0.5 + fmt.levels * 2**-8 + (fmt.symmetric and fmt.bits < 8)
    assert (grouped(rounded(weight, name, grid) - weight, fmt).abs() <= allowed * step).all()


@pytest.mark.parametrize("name", [name for name in FORMATS if "asym" not in name])
def test_symmetric_quantization_is_idempotent(name: str) -> None:
    fmt = parse_format(name)
    once = nearest(weights(), fmt, minmax(weights(), fmt))
    again = nearest(decode(fmt, once), fmt, minmax(decode(fmt, once), fmt))
    assert torch.equal(decode(fmt, again), decode(fmt, once))


@pytest.mark.parametrize("fit", [minmax, mse])
@pytest.mark.parametrize("name", ["w8a16-g48", "w8a8-token", "w8a8-g16"])
def test_symmetric_eight_bits_leave_out_minus_128(fit, name: str) -> None:
    fmt, weight = parse_format(name), weights()
    weight[:, 0] = -3.0
    codes = nearest(weight, fmt, fit(weight, fmt))["codes"]
    assert int(codes.min()) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_mse_is_in_no_group_worse_than_minmax_and_in_some_better(name: str) -> None:
    weight, fmt = weights(d_out=130, d_in=1440), parse_format(name)
    plain, fitted = group_errors(weight, name, minmax(weight, fmt)), group_errors(weight, name, mse(weight, fmt))
    assert (fitted <= plain * (1 + 1e-5)).all()
    if fmt.bits < 8:
        assert fitted.sum() < 0.98 * plain.sum()


@pytest.mark.parametrize("name", ["w2a16-g16-asym", "w4a16-g48-asym", "w3a16-g96-asym"])
def test_hqq_starts_at_minmax_and_lowers_the_robust_norm_of_every_group(name: str) -> None:
    weight, fmt = weights(d_out=130, d_in=1440), parse_format(name)
    start, none, fitted = minmax(weight, fmt), hqq(weight, fmt, 0), hqq(weight, fmt)
    assert torch.equal(none.scale, start.scale)
    assert none.offset is not None and start.offset is not None
    assert torch.equal(none.offset, start.offset)
    plain, robust = group_errors(weight, name, start, NORM), group_errors(weight, name, fitted, NORM)
    assert (robust <= plain * (1 + 1e-4)).all()
    assert robust.sum() < 0.99 * plain.sum()


def test_hqq_iterates_in_fp32_and_keeps_the_best_offset_that_can_be_stored() -> None:
    fmt, weight = parse_format("w3a16-g48-asym"), weights()
    start, fitted = minmax(weight, fmt), hqq(weight, fmt, 5)
    assert start.offset is not None and fitted.offset is not None
    moved = 0
    for row in range(len(weight)):
        for group in range(3):
            w, s = weight[row, group * 48 : group * 48 + 48], start.scale[row, group].float()
            met, beta, z = [], 10.0, start.offset[row, group].float()
            for _ in range(6):
                stored = z.bfloat16().float()
                d = (w - ((w - stored) / s).round().clamp(0, 7) * s - stored) / s
                met.append((float((d.abs() ** 0.7).sum()), float(stored)))
                codes = ((w - z) / s).round().clamp(0, 7)
                d = (w - codes * s - z) / s
                e = torch.sign(d) * torch.relu(d.abs() - d.abs().clamp(min=1e-6) ** -0.3 / beta)
                z = (w - codes * s - e * s).mean()
                beta *= 1.01
            best = [z for norm, z in met if norm <= min(met)[0] * (1 + 1e-6)]
            assert float(fitted.offset[row, group]) in best
            moved += float(fitted.offset[row, group]) != met[0][1]
    assert moved > 7


def test_hqq_refuses_a_symmetric_format() -> None:
    with pytest.raises(ValueError, match="no offset to solve for; use w4a16-g48-asym"):
        hqq(weights(), parse_format("w4a16-g48"))


@pytest.mark.parametrize("fit", [minmax, mse, hqq])
def test_constant_and_zero_groups_get_a_scale_that_divides(fit) -> None:
    fmt = parse_format("w3a16-g16-asym")
    weight = torch.zeros(2, 48)
    weight[0, 16:32] = 0.5
    grid = fit(weight, fmt)
    assert (grid.scale == 1).all()
    assert torch.equal(decode(fmt, nearest(weight, fmt, grid)), weight)
    if fit is not hqq:
        symmetric = parse_format("w3a16-g16")
        assert torch.equal(decode(symmetric, nearest(weight * 0, symmetric, fit(weight * 0, symmetric))), weight * 0)


@pytest.mark.parametrize("name", ["w4a16-g48", "w2a16-g16-asym", "w4a16"])
def test_threads_share_a_fit_out_and_change_nothing(name: str) -> None:
    weight, fmt = weights(900, 144), parse_format(name)
    alone = mse(weight, fmt)
    torch.set_num_threads(3)
    try:
        shared = mse(weight, fmt)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone.scale, shared.scale) and len(weight) * 144 > 2**16
    assert alone.offset is None or (shared.offset is not None and torch.equal(alone.offset, shared.offset))


@pytest.mark.parametrize("name", ["w4a16-g48", "w3a16-g48-asym", "w2a16-g16"])
def test_mse_is_hardly_worse_than_every_part_of_the_range_tried(name: str) -> None:
    """Half of the candidates and the neighbours of the best find what all of them do, but for a hundredth of the error."""
    weight, fmt = weights(96, 144), parse_format(name)
    found = group_errors(weight, name, mse(weight, fmt))
    full = minmax(weight, fmt)
    least = group_errors(weight, name, full)
    low, high = grouped(weight, fmt).aminmax(dim=-1)
    for part in _ladder(fmt):
        if fmt.symmetric:
            grid = stored(fmt, len(weight), full.scale.float() * part)
        else:
            cut = (high - low) * ((1 - part) / 2)
            grid = stored(fmt, len(weight), (high - low - 2 * cut) / (fmt.levels - 1), low + cut)
        least = torch.minimum(least, group_errors(weight, name, grid))
    assert float(found.sum()) <= 1.01 * float(least.sum())
    assert float((found > 1.2 * least).double().mean()) < 0.05


def test_threads_share_chunks_and_compute_alone() -> None:
    weight, fmt = torch.randn(64, 128), parse_format("w4a16-g32-asym")
    seen: set[int] = set()

    def fit(rows: torch.Tensor) -> Grid:
        seen.add(torch.get_num_threads())
        return minmax(rows, fmt)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = fit_in_chunks(weight, fit, chunk=8 * 128)
        assert seen == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    whole = minmax(weight, fmt)
    assert torch.equal(found.scale, whole.scale)
    assert found.offset is not None and whole.offset is not None
    assert torch.equal(found.offset, whole.offset)
