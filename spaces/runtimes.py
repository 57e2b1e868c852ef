"""What each runtime can load and run: a table of formats by runtime, with reasons. Imports no torch.

The vLLM rows are its portable set: what loads alike in every engine of that family. Fused linears (q+k+v, gate+up) share a format
everywhere, because a `Site` is what these runtimes fuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from methods.formats.format import Format
from methods.formats.gguf_types import refuses
from methods.model.structure import Site

Evidence = Literal["load-tested", "by reference"]
"""What a claim about a runtime rests on: this project's tests load such exports in it and compare, or its sources and documents say so."""


@dataclass(frozen=True)
class Loads:
    """A family of integer formats: `act` is `16`, `8-token` or `8-group`; groups -1 is one scale a channel.

    exports: the export formats through which it comes; evidence: of its loading; fused: whether it is computed on the stored codes, or
    on weights that were decoded first, so that nothing gets faster.
    multiple: what the inputs and the outputs of a linear must be multiples of: of all that are fused together, or of each where `apart`.
    """

    bits: tuple[int, ...]
    act: str
    groups: tuple[int, ...]
    exports: tuple[str, ...]
    evidence: Evidence
    fused: bool
    multiple: int = 8
    apart: bool = False

    def refuses(self, fmt: Format, site: Site) -> str | None:
        """Why the family does not cover the format at the site, or None; the first difference, the most telling first."""
        if not fmt.plain:
            return f"{fmt.name} is not among what is exported to it: integers with bf16 scales, inputs left alone or in int8"
        if not fmt.symmetric:
            return "only symmetric grids"
        if (fmt.bits, _activations(fmt)) not in {(bits, self.act) for bits in self.bits}:
            return f"{fmt.bits}-bit weights with {_activations(fmt)} activations are not among its kernels"
        if fmt.group not in self.groups:
            return f"group {_group(fmt.group)} is not one of {', '.join(map(_group, self.groups))}"
        sizes = [site.d_in, *([layer.d_out for layer in site.layers] if self.apart else [site.d_out])]
        if any(size % self.multiple for size in sizes):
            outputs = " and ".join(map(str, sizes[1:]))
            return f"{site.d_in} inputs and {outputs} outputs have to be multiples of {self.multiple}"
        return None


@dataclass(frozen=True)
class Blocks:
    """Formats whose weights a GGML type holds bit for bit: rows have to fill its blocks, and nothing falls back to another type.

    exports, evidence, fused: as for `Loads`.
    """

    exports: tuple[str, ...] = ("gguf",)
    evidence: Evidence = "load-tested"
    fused: bool = True

    def refuses(self, fmt: Format, site: Site) -> str | None:
        """Why no type holds the format at the site, or None."""
        return refuses(fmt, site.d_in)


@dataclass(frozen=True)
class Runtime:
    """What executes a model. `loads` is None where the kernels alone decide what runs.

    export: the name of the export format it reads; experts: whether models with experts are exported to it; transposed: whether it
    runs compressed weights that are stored (d_in, d_out); architectures: the only ones that are exported to it, all where empty; halves:
    whether its files keep scales in fp16, whatever the checkpoint's dtype.
    """

    name: str
    export: str
    loads: tuple[Loads | Blocks, ...] | None
    experts: bool = True
    transposed: bool = True
    architectures: tuple[str, ...] = ()
    halves: bool = False

    def supports(self, fmt: Format, site: Site) -> str | None:
        """Why the runtime cannot run the format at the site, or None. Dense dtypes always run, with zeros or of low rank here alone."""
        if fmt.dense:
            foreign = fmt.thinned and self.loads is not None
            return f"{self.name} gets {fmt.dense} weights whole, not as {fmt.name}" if foreign else None
        if not fmt.divides(site.d_in):
            return f"group {fmt.unit} does not divide {site.d_in} inputs"
        if not self.experts and site.kind.startswith("expert"):
            return f"{self.name} gets no models with experts from here"
        if not self.transposed and any(layer.transposed for layer in site.layers):
            return f"{self.name} reads compressed weights of nn.Linear only, and these are stored transposed"
        if self.loads is None or self.family(fmt, site):
            return None
        return f"{self.name}: {_nearest([family.refuses(fmt, site) for family in self.loads])}"

    def family(self, fmt: Format, site: Site) -> Loads | Blocks | None:
        """The first family that covers the format at the site, if any; None too where the kernels alone decide."""
        return next((family for family in self.loads or () if family.refuses(fmt, site) is None), None)


def _nearest(reasons: list[str | None]) -> str:
    """The reason of the family that came nearest: all others fail already because they are of other bits or activations."""
    told = [reason for reason in reasons if reason]
    return next((reason for reason in told if "not among" not in reason), told[0])


def _activations(fmt: Format) -> str:
    if fmt.act_bits == 16:
        return "16"
    return "8-token" if fmt.act_group == -1 else "8-group"


def _group(group: int) -> str:
    return "channel" if group == -1 else str(group)


GGUF_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Those whose files were loaded into llama.cpp and compared."""

_GROUPS = (-1, 32, 64, 128)
_CT, _PACKED = ("compressed-tensors",), ("compressed-tensors", "auto-round", "gptq")


def _portable(exports: tuple[str, ...], evidence: Evidence, fused: bool) -> tuple[Loads, Loads, Loads]:
    """W4A16, W8A16 (both through `exports`) and W8A8 as compressed-tensors stores them."""
    return (
        Loads((4,), "16", _GROUPS, exports, evidence, fused),
        Loads((8,), "16", _GROUPS, exports, evidence, fused),
        Loads((8,), "8-token", (-1,), _CT, evidence, fused, multiple=16),
    )


_W4A16, _, _W8A8 = _portable(_PACKED, "load-tested", fused=True)
_AUTO_ROUND = Loads((2, 3, 4, 8), "16", _GROUPS, ("auto-round",), "load-tested", fused=False, multiple=32, apart=True)
_TORCHAO = (
    Loads((2, 3, 4, 8), "16", (*_GROUPS, 16), ("torchao",), "load-tested", fused=False, multiple=1),
    Loads((8,), "8-token", (-1,), ("torchao",), "load-tested", fused=True, multiple=1),
)

RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        runtime.name: runtime
        for runtime in (
            Runtime("isolatency", "isolatency", None),
            Runtime("transformers", _CT[0], _portable(_CT, "load-tested", fused=False), experts=False, transposed=False),
            Runtime("vllm", _CT[0], _portable(_PACKED, "by reference", fused=True), experts=False, transposed=False),
            Runtime("vllm-cpu", _CT[0], (_W4A16, _W8A8), experts=False, transposed=False),
            Runtime(
                "llama.cpp", "gguf", (Blocks(),), experts=False, transposed=False, architectures=GGUF_ARCHITECTURES, halves=True
            ),
            Runtime("auto-round", "auto-round", (_AUTO_ROUND,), experts=False, transposed=False, halves=True),
            Runtime("torchao", "torchao", _TORCHAO, experts=False, transposed=False),
        )
    }
)
"""By name. `vllm` is its CUDA build; `transformers` computes with decompressed weights, so that nothing gets faster in it; `auto-round` and
`torchao` are transformers with the package of that name."""

_PORTABLE = ("w4a16-g32", "w4a16-g64", "w4a16-g128", "w8a16", "w8a8-token")
DEFAULT_FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "isolatency": (
            "w8a8-g64",
            "w4a8-g32-asym",
            "w4a8-g64-asym",
            "w3a8-g32-asym",
            "w3a8-g64-asym",
            "w2a8-g32-asym",
            "w2a8-g64-asym",
        ),
        "transformers": _PORTABLE,
        "vllm": _PORTABLE,
        "vllm-cpu": tuple(name for name in _PORTABLE if name != "w8a16"),
        "llama.cpp": ("w8a8-g32", "w4a8-g32-asym", "w4a8-g32"),
        "auto-round": ("w4a16-g32", "w4a16-g64", "w4a16-g128", "w8a16", "w3a16-g32", "w3a16-g64", "w2a16-g32"),
        "torchao": (*_PORTABLE, "w3a16-g32", "w3a16-g64"),
    }
)
"""The formats tried where none are named; the dense one is always tried. Those of llama.cpp are Q8_0, Q4_1 and Q4_0 as kernels of this
project compute them; its other types (`q4_k`, …) are exported too, but nothing here measures them, so that no search chooses them."""

PREFILL_FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType({"isolatency": ("w8a8-token",)})
"""What is tried besides where a prompt's latency counts: with one scale a token and one a channel, integer products of many rows run at
full speed; with group scales they do not."""


def default_formats(name: str, phases: Iterable[str]) -> tuple[str, ...]:
    """The formats tried for a runtime where none are named; phases: `decode`, `prefill`, of the workloads that count."""
    more = PREFILL_FORMATS.get(name, ()) if "prefill" in phases else ()
    return (*DEFAULT_FORMATS[name], *more)


def runtime(name: str) -> Runtime:
    """The runtime of a name; raises ValueError with the known ones otherwise."""
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}; use one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]
