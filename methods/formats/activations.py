"""How a format rounds the inputs of a linear: dynamically by token, group or tensor, or statically with scales of the payload."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.formats.elements import largest
from methods.formats.format import Format
from methods.formats.levels import fixed, table
from methods.formats.scales import E4M3_MAX

Payload = Mapping[str, Tensor]


def rounded(x: Tensor, fmt: Format, payload: Payload) -> Tensor:
    """Activations (..., d_in) rounded and back, in fp32; fmt.act_bits < 16.

    Dynamic, symmetric: scale = max|x| / the element's largest value for every token and group, or for all of x (act_rows = -1);
    integers in [-(2**(b-1) - 1), 2**(b-1) - 1], minifloats as IEEE rounds; zero where the group is zero. Scales are kept as `act_codec`
    says: `e8m0` 2**(floor(log2 max|x|) - the element's largest exponent), `nv` in E4M3 relative to a token's own fp32 scale, `fp16` and
    `fp32` as they are, codes being found with the exact scale (llama.cpp).

    Parts that change this: the inputs `columns.index` stay as they are and count for no scale. `act.scale`, (1,) or (d_in,), is static:
    for formats of one scale for all tokens it is the scale itself, with `act.offset` of the same shape for codes in [0, 2**b - 1]; for
    `nv` it stands for 448 * 6 / max|x| (1,). Raises ValueError where the format has no place for it.

    NaN and infinity are never made numbers: they come out as NaN, with all that shares a dynamic scale with them, so that a layer that
    breaks is seen to.
    """
    values = x.float()
    kept = payload.get("columns.index")
    if kept is not None:
        values = values.index_fill(-1, kept.long(), 0.0)
    if "act.scale" in payload and fmt.act_codec != "nv":
        result = _static(values, fmt, payload)
    else:
        result = _dynamic(values, fmt, payload.get("act.scale"))
    if kept is not None:
        result = result.index_copy(-1, kept.long(), x.float().index_select(-1, kept.long()))
    return result


def _static(x: Tensor, fmt: Format, payload: Payload) -> Tensor:
    if fmt.act_rows != -1:
        raise ValueError(f"{fmt.name}: act.scale is the same for all tokens, but the format has scales a token; use -tensor")
    scale, offset = payload["act.scale"].float(), payload.get("act.offset")
    x = torch.where(x.isfinite(), x, torch.nan)
    if offset is None:
        return _nearest(x / scale, fmt) * scale
    if fmt.act_element != "int":
        raise ValueError(f"{fmt.name}: act.offset goes with integers; {fmt.act_element} is symmetric about zero")
    codes = torch.round((x - offset.float()) / scale).clamp_(0, 2**fmt.act_bits - 1)
    return codes * scale + offset.float()


def _dynamic(x: Tensor, fmt: Format, upper: Tensor | None) -> Tensor:
    d_in = x.shape[-1]
    size = d_in if fmt.act_group == -1 else fmt.act_group
    groups = x.reshape(*x.shape[:-1], d_in // size, size)
    top = groups.abs().amax(-1, keepdim=True)
    if fmt.act_rows == -1 and top.numel():
        top = top.amax().expand_as(top)
    exact, kept = _scales(top, fmt, upper)
    return (_nearest(groups / exact, fmt) * kept).reshape(x.shape)


def _scales(top: Tensor, fmt: Format, upper: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales by which activations are divided and multiplied; top: (…, n_groups, 1), the largest magnitudes."""
    reach = largest(fmt.act_element, fmt.act_bits)
    top = torch.where(top.isfinite(), top, torch.nan)
    if fmt.act_codec == "e8m0":
        power = torch.where(top.isnan(), top, ocp_scale(top, reach))
        return power, power
    exact = top / reach
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    if fmt.act_codec == "nv":
        token = top.amax(-2, keepdim=True)
        unit = E4M3_MAX * reach / torch.where(token == 0, torch.ones_like(token), token) if upper is None else upper.float()
        eighth = fixed("e4m3", 8)
        codes = eighth.codes[eighth.nearest(exact * unit)].clamp(min=1)
        kept = torch.where(exact.isnan(), exact, table("e4m3", 8)[codes] / unit)
        return kept, kept
    return exact, (exact.half().float() if fmt.act_codec == "fp16" else exact)


def ocp_scale(top: Tensor, reach: float) -> Tensor:
    """2**(floor(log2(top)) - floor(log2(reach))), 1 where top is zero: the scale of OCP's microscaling formats (2023), section 6.3."""
    exponent = torch.frexp(top.float()).exponent - torch.frexp(torch.tensor(reach)).exponent
    return torch.where(top > 0, torch.ldexp(torch.ones_like(top), exponent.clamp(-126, 127)), 1.0)


def _nearest(steps: Tensor, fmt: Format) -> Tensor:
    if fmt.act_element == "int":
        bound = 2 ** (fmt.act_bits - 1) - 1
        return torch.round(steps).clamp_(-bound, bound)
    rungs = fixed(fmt.act_element, fmt.act_bits)
    return torch.where(steps.isnan(), steps, rungs.values[rungs.nearest(steps)])
