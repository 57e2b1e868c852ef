"""Key/value-cache formats as a decision of the whole model: `kv-cache:format=kv-int4-g64`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from methods.kv.format import CacheFormat, Kind, parse_cache_format
from methods.method import Source
from methods.model.structure import Structure
from methods.policy import Knob
from methods.recipes.model_method import ModelMethod

KIVI = Source("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024, "arXiv 2402.02750", "section 3")
WKVQUANT = Source(
    "WKVQuant: Quantizing Weight and Key/Value Cache for Large Language Models Gains More",
    2024,
    "arXiv 2402.12065",
    "section 3.2, past-only quantization",
)
SOURCES: Mapping[Kind, Source] = {
    "fp8": Source("FP8 Formats for Deep Learning", 2022, "arXiv 2209.05433", "E4M3"),
    "kivi": KIVI,
    "kvquant": Source(
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
        2024,
        "arXiv 2401.18079",
        "section 3",
    ),
    "turbo": Source(
        "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", 2025, "arXiv 2504.19874", "algorithm 1"
    ),
}
"""Where kinds of cache format were published; the others round plainly, by the rule of `KV_CACHE`'s own source."""


@dataclass(frozen=True)
class CacheCost:
    """Memory of a cache, everything stored included.

    bits_per_element: mean bits of a key or value; ratio: size_bytes over that of a dense cache in the checkpoint's dtype.
    """

    size_bytes: int
    bits_per_element: float
    ratio: float


@dataclass(frozen=True)
class CacheMethod(ModelMethod):
    """A choice of cache format. It changes no weight, so no site and no other decision is touched."""

    def resolve(self, knobs: Mapping[str, Knob]) -> dict[str, Knob]:
        """The knobs; raises ValueError for any but `format`, for its absence and for what is no cache format."""
        for name in knobs:
            if name != "format":
                raise ValueError(f"{self.name}: unknown knob {name!r}; allowed is format")
        if "format" not in knobs:
            raise ValueError(f"{self.name}: the knob format is missing; write {self.name}:format=kv-int8, for example")
        self.cache_format(knobs)
        return dict(knobs)

    def cache_format(self, knobs: Mapping[str, Knob]) -> CacheFormat:
        """The format that resolved knobs name."""
        return parse_cache_format(str(knobs["format"]))

    def published(self, knobs: Mapping[str, Knob]) -> Source:
        """Where the format's own idea was published."""
        return SOURCES.get(self.cache_format(self.resolve(knobs)).kind, self.source)

    def refuses(self, structure: Structure, knobs: Mapping[str, Knob]) -> str | None:
        """Why a model's cache cannot have the format, or None; raises ValueError as `resolve` does."""
        reason = self.cache_format(self.resolve(knobs)).refuses(structure)
        return f"{self.name}: {reason}" if reason else None

    def cost(
        self, structure: Structure, knobs: Mapping[str, Knob], batch: int, context: int, sliding: Sequence[int | None] = ()
    ) -> CacheCost:
        """Memory after `context` tokens in each of `batch` sequences; sliding: each layer's attention window or None, none if empty.

        Raises ValueError with the reason of `refuses`.
        """
        reason = self.refuses(structure, knobs)
        if reason:
            raise ValueError(reason)
        fmt = self.cache_format(knobs)
        size = fmt.size_bytes(structure, batch, context, sliding)
        dense = parse_cache_format(f"kv-{structure.dtype}")
        ratio = size / dense.size_bytes(structure, batch, context, sliding)
        return CacheCost(size, ratio * dense.key_bits, ratio)

    def simulated(self, knobs: Mapping[str, Knob]) -> str:
        """Why the format has no latency of its own; "" where it is a dense dtype."""
        if self.cache_format(self.resolve(knobs)).kind == "dense":
            return ""
        return (
            "attention reads past keys and values decoded, layer by layer: their memory is saved, the time to read them is not"
        )


KV_CACHE = CacheMethod(
    name="kv-cache",
    summary="stores past keys and values in fewer bits; the tokens of the call at hand stay in full precision",
    source=WKVQUANT,
)
