"""What manufacturers say of their devices: the numbers that a roofline is built from. Nothing here was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

DEVICE_TABLES = Path(__file__).resolve().parent.parent / "results" / "devices"
"""Where tables lie that were measured on other machines and are part of the project."""


@dataclass(frozen=True)
class Datasheet:
    """A device as its manufacturer describes it.

    pattern: regular expression of the name that the driver reports; capability: CUDA compute capability; bandwidth: memory, GB/s;
    peak: dense (not sparse) tera-operations a second by dtype of the product (`bf16`, `int8`, `fp8`; accumulation in fp32 or int32), at the
    boost clock; memory, l2: GiB and MiB; source: the document.
    """

    name: str
    title: str
    pattern: str
    capability: tuple[int, int]
    bandwidth: float
    peak: Mapping[str, float]
    memory: float
    l2: float
    source: str


def _sheet(
    name: str,
    title: str,
    pattern: str,
    capability: tuple[int, int],
    bandwidth: float,
    peaks: tuple[float, float, float],
    sizes: tuple[float, float],
    source: str,
) -> Datasheet:
    peak = {dtype: value for dtype, value in zip(("bf16", "int8", "fp8"), peaks, strict=True) if value}
    return Datasheet(name, title, pattern, capability, bandwidth, MappingProxyType(peak), *sizes, source)


DATASHEETS: Mapping[str, Datasheet] = MappingProxyType(
    {
        sheet.name: sheet
        for sheet in (
            # name, title, driver's name, capability, GB/s, TOP/s dense (bf16, int8, fp8), (GiB, L2 MiB), source
            _sheet("a100", "NVIDIA A100 80GB SXM", r"A100.*80GB", (8, 0), 2039, (312, 624, 0), (80, 40),
                   "NVIDIA A100 80GB datasheet (2021)"),
            _sheet("h100", "NVIDIA H100 SXM", r"H100(?!.*(PCIe|NVL))", (9, 0), 3350, (989.4, 1978.9, 1978.9), (80, 50),
                   "NVIDIA H100 Tensor Core GPU datasheet (2023), SXM; half of its figures with sparsity"),
            _sheet("h200", "NVIDIA H200 SXM", r"H200(?!.*NVL)", (9, 0), 4800, (989.4, 1978.9, 1978.9), (141, 50),
                   "NVIDIA H200 Tensor Core GPU datasheet (2024), SXM; half of its figures with sparsity"),
            _sheet("l4", "NVIDIA L4", r"\bL4\b", (8, 9), 300, (121, 242.5, 242.5), (24, 48),
                   "NVIDIA L4 Tensor Core GPU datasheet (2023); half of its figures with sparsity"),
            _sheet("l40s", "NVIDIA L40S", r"\bL40S\b", (8, 9), 864, (362, 733, 733), (48, 96),
                   "NVIDIA L40S datasheet (2023); the figures without sparsity"),
            _sheet("rtx3090", "NVIDIA GeForce RTX 3090", r"RTX 3090(?! Ti)", (8, 6), 936, (71, 284, 0), (24, 6),
                   "NVIDIA Ampere GA102 architecture whitepaper (2021), table 9"),
            _sheet("rtx4090", "NVIDIA GeForce RTX 4090", r"RTX 4090(?! (D|Laptop))", (8, 9), 1008, (165.2, 660.6, 330.3), (24, 72),
                   "NVIDIA Ada GPU architecture whitepaper (2022), table 2, fp32 accumulation"),
        )
    }
)  # fmt: skip
"""By the name that `--target` takes."""


def sheet_of(device_name: str) -> Datasheet | None:
    """The datasheet of a device by the name that its driver reports, or None."""
    return next((sheet for sheet in DATASHEETS.values() if re.search(sheet.pattern, device_name)), None)
