"""What a cell would take by a device's datasheet: nobody measured it, and everything built on it is labelled `modelled`."""

from __future__ import annotations

from dataclasses import dataclass

from methods.formats.format import Format, parse_format
from methods.kv.format import CacheFormat, parse_cache_format
from methods.model.structure import Structure
from profilers.cached_attention import heads_of
from profilers.datasheets import Datasheet
from profilers.operators import OPERATORS, kind_of
from profilers.table import KernelKey
from profilers.timer import Timing
from profilers.workload import Workload

_ACTIVATION_BYTES = 2
_SMALL_OPERATORS = 8
"""Kernels of a block besides its linears: norms, rotary embedding, cache update, attention, activation, additions."""


@dataclass(frozen=True)
class Efficiency:
    """How much of a datasheet a kernel reaches: a fixed time in ms, and shares of the peak and of the bandwidth."""

    start_ms: float
    compute: float
    bandwidth: float


IDEAL = Efficiency(0.0, 1.0, 1.0)
"""No kernel is faster: the lower end."""

TYPICAL = Efficiency(0.003, 0.8, 0.77)
"""Published measurements: about 790 of 989 TFLOP/s and 75 to 80 % of the bandwidth at one row, 2 to 4 us a kernel in a CUDA graph."""

POOR = Efficiency(0.010, 0.4, 0.4)
"""A kernel that is launched alone and reaches half of that: the upper end. An assumption, not a bound."""

_CASES = (IDEAL, TYPICAL, POOR)


def linear(sheet: Datasheet, key: KernelKey) -> Timing:
    """`start + max(operations / peak, bytes / bandwidth)` of one linear; p10 and p90 are the ideal and the poor kernel."""
    fmt = parse_format(key.format)
    weights = fmt.bits_per_weight(key.k, key.n) / 8 * key.n * key.k
    activations = _ACTIVATION_BYTES * key.m * (key.n + key.k)
    return _timing(sheet, 2.0 * key.m * key.n * key.k, weights + activations, 1, _peak(sheet, fmt))


def operator(sheet: Datasheet, key: KernelKey) -> Timing:
    """The same of a cell of `profilers.cells.operator_cells`; raises ValueError for an op that is none."""
    kind = kind_of(key.op)
    if kind not in OPERATORS:
        raise ValueError(f"roofline: {key.op} is no operator; use one of {', '.join(OPERATORS)}")
    if kind == "attention":
        heads = heads_of(key.op)
        flops, n_bytes = _attention(heads.layer("bf16"), parse_cache_format(key.format), key.m, key.n, key.k)
        return _timing(sheet, flops, n_bytes, 1, sheet.peak["bf16"])
    if kind == "elementwise":
        h, kv, d = heads_of(key.op)
        moved = _ACTIVATION_BYTES * key.m * (2.0 * (h + kv) * d + 3 * key.k + 6 * key.n)
        return _timing(sheet, 0.0, moved, _SMALL_OPERATORS, sheet.peak["bf16"])
    reads = 1 if kind == "sampling" else 2
    return _timing(sheet, 0.0, reads * _ACTIVATION_BYTES * key.m * key.n, 1, sheet.peak["bf16"])


def rest(sheet: Datasheet, structure: Structure, workload: Workload, cache: str = "kv-bf16") -> Timing:
    """A step without the linears of its sites: output head, attention over the key/value cache, and the small operators' launches.

    cache: the format of keys and values.
    """
    rows = workload.batch  # logits of the last position only
    head = structure.n_vocab * structure.d_model
    flops, n_bytes = 2.0 * rows * head, 2.0 * head
    n_blocks = len(structure.blocks)
    new, held = (1, workload.context) if workload.phase == "decode" else (workload.prompt, 0)
    attention = _attention(structure, parse_cache_format(cache), workload.batch, new, held)
    flops, n_bytes = flops + attention[0], n_bytes + attention[1]
    if workload.phase == "prefill":
        n_bytes += 20.0 * workload.tokens_in_flight * structure.d_model * n_blocks
    return _timing(sheet, flops, n_bytes, 1 + _SMALL_OPERATORS * n_blocks, sheet.peak["bf16"])


def _attention(structure: Structure, fmt: CacheFormat, batch: int, new: int, held: int) -> tuple[float, float]:
    """Operations, and bytes of keys and values, of attention in all blocks: a prefill reads back what it has written."""
    n_blocks, width = len(structure.blocks), structure.n_heads * structure.head_dim
    scores = new * held if held else new**2 / 2
    n_bytes = fmt.size_bytes(structure, batch, held + new) * (1 if held else 2)
    return 4.0 * batch * scores * width * n_blocks, float(n_bytes)


def kv_bytes(structure: Structure, workload: Workload, width: int = 2) -> int:
    """Bytes of the key/value cache at a workload's end; width: bytes of an element."""
    tokens = workload.batch * (workload.context + 1 if workload.phase == "decode" else workload.prompt)
    return 2 * tokens * structure.n_kv_heads * structure.head_dim * len(structure.blocks) * width


def _timing(sheet: Datasheet, flops: float, n_bytes: float, n_kernels: int, peak: float) -> Timing:
    low, mid, high = (
        case.start_ms * n_kernels + max(flops / (case.compute * peak * 1e9), n_bytes / (case.bandwidth * sheet.bandwidth * 1e6))
        for case in _CASES
    )
    return Timing(mid, low, high, 0, label="modelled", lo_ms=low, hi_ms=high)


def _peak(sheet: Datasheet, fmt: Format) -> float:
    """Tera-operations a second of the product's dtype; what the device has no unit for runs in bf16."""
    if fmt.act_bits <= 8 and not fmt.dense:
        name = "int8" if fmt.act_element == "int" else "fp8"
        return sheet.peak.get(name, sheet.peak["bf16"])
    return sheet.peak["bf16"] / (16 if fmt.dense == "fp32" else 1)
