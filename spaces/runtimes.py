"""What each runtime can load and run: a table of formats by runtime, with reasons. Imports no torch.

The vLLM rows are its portable set: what loads alike in every engine of that family. Fused linears (q+k+v, gate+up) share a format
everywhere, because a `Site` is what these runtimes fuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from methods.formats.format import Format
from methods.model.structure import Site


@dataclass(frozen=True)
class Loads:
    """A family of integer formats: `act` is `16`, `8-token` or `8-group`; groups -1 is one scale a channel.

    multiple: what the inputs and the (fused) outputs of a linear must be multiples of.
    """

    bits: tuple[int, ...]
    act: str
    groups: tuple[int, ...]
    multiple: int = 8

    def refuses(self, fmt: Format, site: Site) -> str | None:
        """Why the family does not cover the format at the site, or None; the first difference, the most telling first."""
        if not fmt.plain:
            return f"{fmt.name} is not among its kernels, which know integers with bf16 scales and int8 activations a token"
        if not fmt.symmetric:
            return "only symmetric grids"
        if (fmt.bits, _activations(fmt)) not in {(bits, self.act) for bits in self.bits}:
            return f"{fmt.bits}-bit weights with {_activations(fmt)} activations are not among its kernels"
        if fmt.group not in self.groups:
            return f"group {_group(fmt.group)} is not one of {', '.join(map(_group, self.groups))}"
        if site.d_in % self.multiple or site.d_out % self.multiple:
            return f"{site.d_in} inputs and {site.d_out} outputs have to be multiples of {self.multiple}"
        return None


@dataclass(frozen=True)
class Runtime:
    """What executes a model. `loads` is None where the kernels alone decide what runs.

    export: the name of the export format it reads; experts: whether models with experts are exported to it; transposed: whether it
    runs compressed weights that are stored (d_in, d_out).
    """

    name: str
    export: str
    loads: tuple[Loads, ...] | None
    experts: bool = True
    transposed: bool = True

    def supports(self, fmt: Format, site: Site) -> str | None:
        """Why the runtime cannot run the format at the site, or None. Dense formats always run."""
        if fmt.dense:
            return None
        if not fmt.divides(site.d_in):
            return f"group {fmt.unit} does not divide {site.d_in} inputs"
        if not self.experts and site.kind.startswith("expert"):
            return f"{self.name} gets no models with experts from here"
        if not self.transposed and any(layer.transposed for layer in site.layers):
            return f"{self.name} reads compressed weights of nn.Linear only, and these are stored transposed"
        if self.loads is None:
            return None
        reasons = [family.refuses(fmt, site) for family in self.loads]
        return None if None in reasons else f"{self.name}: {_nearest(reasons)}"


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


_GROUPS = (-1, 32, 64, 128)
_W4A16 = Loads((4,), "16", _GROUPS)
_W8A16 = Loads((8,), "16", _GROUPS)
_W8A8 = Loads((8,), "8-token", (-1,), multiple=16)

RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        runtime.name: runtime
        for runtime in (
            Runtime("isolatency", "isolatency", None),
            Runtime("transformers", "compressed-tensors", (_W4A16, _W8A16, _W8A8), experts=False, transposed=False),
            Runtime("vllm", "compressed-tensors", (_W4A16, _W8A16, _W8A8), experts=False, transposed=False),
            Runtime("vllm-cpu", "compressed-tensors", (_W4A16, _W8A8), experts=False, transposed=False),
        )
    }
)
"""By name. `vllm` is its CUDA build; `transformers` computes with decompressed weights, so that nothing gets faster in it."""

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
    }
)
"""The formats tried where none are named; the dense one is always tried."""


def runtime(name: str) -> Runtime:
    """The runtime of a name; raises ValueError with the known ones otherwise."""
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}; use one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]
