"""Triton's source of the CUDA kernels. Imports triton, so it is imported where a kernel is first launched.

Triton's functions are compiled from their source and have no Python types. A `constexpr` is known when a kernel is compiled; an
absent tensor is one without elements, of which only the flag beside it is looked at.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

OPERANDS = {"int8": tl.int8, "bf16": tl.bfloat16, "fp32": tl.float32}
"""What matrix instructions multiply."""


@triton.jit
def _rounded(x):
    """The nearest integer, half to even, for |x| < 2**22: adding 1.5 * 2**23 leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded_e4m3(x):
    """The nearest number that E4M3 has, half to even, for |x| <= 448: a multiple of 2**(exponent - 3), of 2**-9 for small ones.

    The conversion that follows is then exact; Triton's interpreter rounds wrongly.
    """
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    return _rounded(x * ((257 - exponent) << 23).to(tl.float32, bitcast=True)) * step


@triton.jit
def quantize_rows(x, q, scales, k, group, reach, GROUPS: tl.constexpr, BLOCK: tl.constexpr, INTEGER: tl.constexpr):
    """GROUPS groups of a token: scale = max|x| / reach, 1 where a group is zero; NaN or infinity anywhere makes the scale NaN.

    BLOCK inputs of a group are looked at together. INTEGER: codes are integers, else E4M3.
    """
    n_groups = k // group
    which = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * k + which[:, None] * group + lane[None, :]
    top = tl.zeros([GROUPS, BLOCK], dtype=tl.float32)
    poison = tl.zeros([GROUPS, BLOCK], dtype=tl.float32)
    for first in range(0, group, BLOCK):
        inside = (which[:, None] < n_groups) & (first + lane[None, :] < group)
        value = tl.load(x + start + first, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(value))
        poison += value * 0.0
    largest = tl.max(top, axis=1)
    scale = tl.where(largest > 0, tl.div_rn(largest, reach), 1.0)
    for first in range(0, group, BLOCK):
        inside = (which[:, None] < n_groups) & (first + lane[None, :] < group)
        value = tl.load(x + start + first, mask=inside, other=0.0).to(tl.float32)
        step = tl.minimum(tl.maximum(tl.div_rn(value, scale[:, None]), -reach), reach)
        step = _rounded(step) if INTEGER else _rounded_e4m3(step)
        tl.store(q + start + first, step.to(q.dtype.element_ty), mask=inside)
    tl.store(scales + tl.program_id(0) * n_groups + which, scale + tl.sum(poison, axis=1), mask=which < n_groups)


@triton.jit
def _small_float(code):
    """The float of an integer below 2**23 without a conversion, of which a GPU does few a cycle."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _finish(
    acc, row, col, m, n, out, bias, token_scale, partial, counter, SPLIT: tl.constexpr, BIAS: tl.constexpr, TOKEN: tl.constexpr
):  # fmt: skip
    """Writes a tile of sums (rows, cols) fp32. Where the inputs were split, the last part to arrive adds up all of them in order."""
    inside = (row[:, None] < m) & (col[None, :] < n)
    at = row[:, None].to(tl.int64) * n + col[None, :]
    arrived = counter + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    n_parts = tl.num_programs(2)
    last = True
    if SPLIT:
        tl.store(partial + tl.program_id(2) * m * n + at, acc, mask=inside)
        # All threads have stored before the one that counts; its count makes their stores visible to who arrives last.
        tl.debug_barrier()
        last = tl.atomic_add(arrived, 1, sem="acq_rel") == n_parts - 1
    if last:
        if SPLIT:
            acc = tl.zeros_like(acc)
            for part in range(n_parts):
                acc += tl.load(partial + part * m * n + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(arrived, 0)
        if TOKEN:
            acc *= tl.load(token_scale + row, mask=row < m, other=0.0)[:, None]
        if BIAS:
            acc += tl.load(bias + col, mask=col < n, other=0.0)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _group_numbers(
    scale, offset, at, inside, HALF: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """The scale of codes about zero, and what is added to every weight of a group."""
    step = tl.zeros_like(at).to(tl.float32) + 1.0
    if SCALED:
        step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.zeros_like(step)
    if OFFSET:
        added = tl.load(offset + at, mask=inside, other=0.0).to(tl.float32) + step * HALF
    return step, added


@triton.jit
def few_rows(
    x, low, high, scale, offset, levels, group_scale, token_scale, bias, out, partial, counter,
    m, n, k, group, level_row, level_group,
    LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr,
    GROUPED: tl.constexpr, TOKEN: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Products of a few tokens: every word is read once, its codes meet their inputs in registers, sums in fp32.

    A program does BLOCK_M tokens, BLOCK_N outputs and, of the tiles of BLOCK_W words of the low plane, its share: one in so many as
    there are programs along the third axis.
    """
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_words = k // 32 * LOW
    n_groups = k // group
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], dtype=tl.float32)
    for tile in range(tl.program_id(2), tl.cdiv(n_words, BLOCK_W), tl.num_programs(2)):
        word = tile * BLOCK_W + tl.arange(0, BLOCK_W)
        unit, place = word // LOW, word % LOW
        inside = (col[:, None] < n) & (word[None, :] < n_words)
        codes = tl.load(low + col[:, None].to(tl.int64) * n_words + word[None, :], mask=inside, other=0)
        upper = tl.zeros_like(codes)
        if HIGH > 0:
            at = col[:, None].to(tl.int64) * (k // 32 * HIGH) + (unit * HIGH + place % HIGH)[None, :]
            upper = tl.load(high + at, mask=inside, other=0)
        which = unit * 32 // group
        at = col[:, None] * n_groups + which[None, :]
        step, added = _group_numbers(scale, offset, at, inside, 1 << (LOW + HIGH - 1), SCALED, OFFSET)
        sums = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], dtype=tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_W], dtype=tl.float32)
        for slot in tl.static_range(32 // LOW):
            code = (codes >> (slot * LOW)) & ((1 << LOW) - 1)
            if HIGH > 0:
                shift = slot * LOW + place // HIGH * HIGH
                code |= ((upper >> shift[None, :]) & ((1 << HIGH) - 1)) << LOW
            if TABLE:
                at = col[:, None] * level_row + which[None, :] * level_group + code
                value = tl.load(levels + at, mask=inside, other=0.0).to(tl.float32)
            else:
                value = _small_float(code) - (1 << (LOW + HIGH - 1))
            at = row[:, None].to(tl.int64) * k + (unit * 32 + slot * LOW + place)[None, :]
            inputs = tl.load(x + at, mask=(row[:, None] < m) & (word[None, :] < n_words), other=0.0).to(tl.float32)
            sums += inputs[:, None, :] * value[None, :, :]
            if OFFSET:
                total += inputs
        sums *= step[None, :, :]
        if OFFSET:
            sums += total[:, None, :] * added[None, :, :]
        if GROUPED:
            at = row[:, None] * n_groups + which[None, :]
            sums *= tl.load(group_scale + at, mask=(row[:, None] < m) & (word[None, :] < n_words), other=0.0)[:, None, :]
        acc += sums
    _finish(tl.sum(acc, axis=2), row, col, m, n, out, bias, token_scale, partial, counter, SPLIT, BIAS, TOKEN)


@triton.jit
def many_rows(
    x, low, high, scale, offset, levels, group_scale, token_scale, bias, out, partial, counter,
    m, n, k, group, level_row, level_group,
    LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, SCALED: tl.constexpr, OFFSET: tl.constexpr,
    GROUPED: tl.constexpr, TOKEN: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of many tokens by matrix instructions, codes in DOT, which holds them exactly; scales meet the sums of a group.

    BLOCK_K divides the group, and so k: a tile is whole and has one scale an output. Programs share tiles as in `few_rows`.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_groups = k // group
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(tl.program_id(2), k // BLOCK_K, tl.num_programs(2)):
        place = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        unit, within = place // 32, place % 32
        which = tile * BLOCK_K // group
        inside = col[None, :] < n
        at = col[None, :].to(tl.int64) * (k // 32 * LOW) + (unit * LOW + within % LOW)[:, None]
        code = (tl.load(low + at, mask=inside, other=0) >> (within // LOW * LOW)[:, None]) & ((1 << LOW) - 1)
        if HIGH > 0:
            at = col[None, :].to(tl.int64) * (k // 32 * HIGH) + (unit * HIGH + within % HIGH)[:, None]
            upper = tl.load(high + at, mask=inside, other=0) >> (within // HIGH * HIGH)[:, None]
            code |= (upper & ((1 << HIGH) - 1)) << LOW
        if TABLE:
            at = col[None, :] * level_row + which * level_group + code
            value = tl.load(levels + at, mask=inside, other=0.0).to(DOT)
        else:
            value = (code - (1 << (LOW + HIGH - 1))).to(DOT)
        at = row[:, None].to(tl.int64) * k + place[None, :]
        inputs = tl.load(x + at, mask=row[:, None] < m, other=0.0).to(DOT)
        if INTEGER:
            sums = tl.dot(inputs, value, out_dtype=tl.int32).to(tl.float32)
        else:
            sums = tl.dot(inputs, value, input_precision="ieee")
        step, added = _group_numbers(scale, offset, col * n_groups + which, col < n, 1 << (LOW + HIGH - 1), SCALED, OFFSET)
        sums *= step[None, :]
        if OFFSET:
            sums += tl.sum(inputs.to(tl.float32), axis=1)[:, None] * added[None, :]
        if GROUPED:
            sums *= tl.load(group_scale + row * n_groups + which, mask=row < m, other=0.0)[:, None]
        acc += sums
    _finish(acc, row, col, m, n, out, bias, token_scale, partial, counter, SPLIT, BIAS, TOKEN)


@triton.jit
def int8_rows(
    x, weight, scale, token_scale, bias, out, partial, counter, m, n, k,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int8 by int8 with a scale a token and one an output: sums stay int32 until the inputs of a program are through."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for tile in range(tl.program_id(2), tl.cdiv(k, BLOCK_K), tl.num_programs(2)):
        place = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        at = row[:, None].to(tl.int64) * k + place[None, :]
        inputs = tl.load(x + at, mask=(row[:, None] < m) & (place[None, :] < k), other=0)
        at = col[None, :].to(tl.int64) * k + place[:, None]
        codes = tl.load(weight + at, mask=(place[:, None] < k) & (col[None, :] < n), other=0)
        sums = tl.dot(inputs, codes, sums, out_dtype=tl.int32)
    acc = sums.to(tl.float32) * tl.load(scale + col, mask=col < n, other=0.0)[None, :]
    _finish(acc, row, col, m, n, out, bias, token_scale, partial, counter, SPLIT, BIAS, True)
