"""What a kernel would take by a device's datasheet: nobody measured it, and everything built on it is labelled `modelled`."""

from __future__ import annotations

from dataclasses import dataclass

from methods.formats.format import Format, parse_format
from methods.model.structure import Structure
from profilers.datasheets import Datasheet
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


def rest(sheet: Datasheet, structure: Structure, workload: Workload) -> Timing:
    """A step without the linears of its sites: output head, attention over the key/value cache, and the small operators' launches."""
    rows = workload.batch  # logits of the last position only
    head = structure.n_vocab * structure.d_model
    flops, n_bytes = 2.0 * rows * head, 2.0 * head
    n_blocks = len(structure.blocks)
    cache = kv_bytes(structure, workload)
    if workload.phase == "decode":
        flops += 4.0 * workload.batch * workload.context * structure.n_heads * structure.head_dim * n_blocks
        n_bytes += cache
    else:
        flops += 2.0 * workload.batch * workload.prompt**2 * structure.n_heads * structure.head_dim * n_blocks
        n_bytes += 2.0 * cache + 20.0 * workload.tokens_in_flight * structure.d_model * n_blocks
    return _timing(sheet, flops, n_bytes, 1 + _SMALL_OPERATORS * n_blocks, sheet.peak["bf16"])


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
