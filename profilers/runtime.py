"""Runs a model on real kernels: sites become kernel-backed modules, everything else stays the model's own code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from methods.formats.format import Format, parse_format
from methods.formats.numerics import shape_of
from methods.formats.sides import plain
from methods.lift import Lifted
from methods.method import Edit
from methods.model.structure import LayerSpec, Site, Structure
from methods.model.weights import bias_of, is_transposed, weight_of
from profilers import attention, norms
from profilers.kernels.catalogue import kernel, supported
from profilers.kernels.kernel import LinearKernel, Payload, Prepared
from profilers.kernels.payloads import random_payload
from profilers.table import KernelKey, LatencyTable
from profilers.target import Target
from profilers.workload import Workload

FEW_ROWS = 32
"""Calls with at most so many rows (or the workload's, if it decodes more sequences) take the decode kernel, others the prefill one."""

PREFILL_ROWS = 512


class RuntimeRefusal(ValueError):
    """A model or edit that this runtime cannot run; says which part."""


@dataclass(frozen=True)
class Chooser:
    """Which kernel serves a format at a shape: the table's fastest, and the catalogue's first where the table has no such cell.

    A cell is missing for the phase that the workload is not about, and for sites that nothing was measured for.
    """

    target: Target
    table: LatencyTable | None = None

    def __call__(self, fmt: Format, n: int, k: int, m: int) -> LinearKernel:
        """Raises RuntimeRefusal where no kernel obeys the format."""
        legal = supported(fmt, n, k, m, self.target)
        names = {entry.name for entry in legal}
        if self.table is not None:
            for name in self.table.timings(KernelKey("linear", fmt.name, m, n, k)):
                if name in names:
                    return kernel(name)
        if not legal:
            raise RuntimeRefusal(f"no kernel runs {fmt.name} at n={n}, k={k} on {self.target.description}")
        if m >= FEW_ROWS and "decoded" in names:
            return kernel("decoded")
        return legal[0]


class FusedSite:
    """All layers of a site in one kernel call: the first layer that is called computes, the others take their share.

    few, many: the kernels for few and for many rows; sizes: outputs of each layer. Layers called with another tensor than the
    first compute again, so an architecture that does not share the input is slow but right.
    """

    def __init__(self, few: Prepared, many: Prepared, rows: int, sizes: Sequence[int]) -> None:
        self.few, self.many, self.rows, self.sizes = few, many, rows, list(sizes)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = [None] * len(sizes)

    def run(self, x: Tensor) -> Tensor:
        """x (..., k) -> (..., sum of sizes)."""
        return (self.few if x.numel() <= self.rows * x.shape[-1] else self.many)(x)

    def output(self, index: int, x: Tensor) -> Tensor:
        """The outputs of one layer."""
        held = self._outputs[index]
        if x is not self._input or held is None:
            self._outputs = list(torch.split(self.run(x), self.sizes, -1))
            self._input = x
            held = self._outputs[index]
        self._outputs[index] = None
        if not any(part is not None for part in self._outputs):
            self._input = None
        assert held is not None
        return held


class KernelLinear(nn.Module):
    """Stands where a linear stood. `in_features` and `out_features` as `nn.Linear` has them."""

    def __init__(self, site: FusedSite, index: int, d_in: int) -> None:
        super().__init__()
        # The site is shared by its layers and is no module, so it is not registered.
        self.site = site
        self.index = index
        self.in_features, self.out_features = d_in, site.sizes[index]
        self._alone = len(site.sizes) == 1

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        return self.site.run(x) if self._alone else self.site.output(self.index, x)


class Runtime:
    """Materialises policies of one model on one target. What models have in common (embedding, head, dense sites) is kept once.

    model: fp32, as loaded; it is not modified and its weights are read again for every model that is made.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        target: Target,
        table: LatencyTable | None = None,
        workload: Workload | None = None,
    ) -> None:
        self.model, self.structure, self.target = model, structure, target
        self.workload = workload or Workload()
        self.choose = Chooser(target, table)
        self._shared: dict[str, Tensor] = {}
        self._dense_sites: dict[str, FusedSite] = {}
        self._payloads: dict[tuple[str, int, int], Payload] = {}
        self._packed: dict[tuple[str, int, int], FusedSite] = {}

    def materialize(self, edits: Mapping[str, Edit]) -> nn.Module:
        """A model whose sites compute with the kernels of their formats; sites without an edit are dense, as they are stored."""
        for name in edits:
            self.structure.site(name)
        lifted = Lifted(edits, self.structure, self.model)
        if lifted.kept:
            name, reason = next(iter(lifted.kept.items()))
            raise RuntimeRefusal(
                f"site {name}: its inputs are to be multiplied by powers of two, and {reason}; use fold=norms there"
            )
        replaced = {name: tensor for edit in lifted.values() for name, tensor in edit.tensors.items()}
        return self._assembled(lambda site, layers: self._site(site, layers, lifted.get(site.name), replaced), replaced)

    def stand_in(self, formats: Mapping[str, Format]) -> nn.Module:
        """A model that takes as long as one whose sites have these formats, by name, the others being dense; its weights are random.

        A weight is made and packed once for all sites of its shape and format, each of which reads a copy of its own.
        """
        for name in formats:
            self.structure.site(name)

        def fused(site: Site, layers: Sequence[LayerSpec]) -> FusedSite:
            names, sizes = [layer.name for layer in layers], [layer.d_out for layer in layers]
            if site.name not in formats:
                return self._dense(names, {})
            return self._stand_in(formats[site.name], layers[0].d_in, sizes, self._bias(names, sizes, {}))

        return self._assembled(fused, {})

    def _assembled(self, site_of: Callable[[Site, Sequence[LayerSpec]], FusedSite], replaced: dict[str, Tensor]) -> nn.Module:
        result = self._skeleton(replaced)
        for site in self.structure.sites:
            for layers in [site.layers] if site.shares_input else [(layer,) for layer in site.layers]:
                fused = site_of(site, layers)
                for index, layer in enumerate(layers):
                    result.set_submodule(layer.name, KernelLinear(fused, index, layer.d_in))
        head = self._dense([self.structure.head], replaced)
        d_in = weight_of(self.model.get_submodule(self.structure.head)).shape[1]
        result.set_submodule(self.structure.head, KernelLinear(head, 0, d_in))
        attention.install(result, self.target)
        norms.install(result, self.model, replaced, self.target)
        return result.eval()

    def _site(self, site: Site, layers: Sequence[LayerSpec], edit: Edit | None, replaced: Mapping[str, Tensor]) -> FusedSite:
        names = [layer.name for layer in layers]
        if edit is None or not edit.linears:
            return self._dense(names, replaced)
        absent = [name for name in names if name not in edit.linears]
        if absent:
            raise RuntimeRefusal(f"site {site.name}: the edit has no {absent[0]}; a site is compressed as a whole")
        parts = [edit.linears[name] for name in names]
        if not all(plain(part.payload) for part in parts):
            beside = sorted({name for part in parts for name in part.payload if "." in name})
            raise RuntimeRefusal(
                f"site {site.name}: its payload holds {', '.join(beside)} beside the grid, which no kernel computes; leave its edit out "
                "where the model holds the decoded weights, and it runs dense"
            )
        formats = sorted({part.format.name for part in parts})
        if len(formats) > 1:
            raise RuntimeRefusal(f"site {site.name}: layers in {formats}; fused layers share one format")
        payload = _stacked(site, [part.payload for part in parts])
        sizes = [part.dense.shape[0] for part in parts]
        return self._fused(parts[0].format, payload, self._bias(names, sizes, replaced), sizes)

    def _dense(self, names: Sequence[str], replaced: Mapping[str, Tensor]) -> FusedSite:
        changed = any(f"{name}.{kind}" in replaced for name in names for kind in ("weight", "bias"))
        key = "+".join(names)
        if changed or key not in self._dense_sites:
            weights = [self._weight(name, replaced) for name in names]
            sizes = [weight.shape[0] for weight in weights]
            payload = {"weight": torch.cat(weights) if len(weights) > 1 else weights[0]}
            made = self._fused(parse_format(self.structure.dtype), payload, self._bias(names, sizes, replaced), sizes)
            if changed:
                return made
            self._dense_sites[key] = made
        return self._dense_sites[key]

    def _weight(self, name: str, replaced: Mapping[str, Tensor]) -> Tensor:
        """A linear's weight (d_out, d_in): the model's, or what replaces the parameter, in its layout."""
        module = self.model.get_submodule(name)
        parameter = replaced.get(f"{name}.weight")
        if parameter is None:
            return weight_of(module)
        return parameter.T if is_transposed(module) else parameter

    def _stand_in(self, fmt: Format, k: int, sizes: Sequence[int], bias: Tensor | None) -> FusedSite:
        key = fmt.name, sum(sizes), k
        if key not in self._payloads:
            self._payloads[key] = random_payload(fmt, sum(sizes), k, torch.Generator().manual_seed(0))
        if bias is not None:  # what is packed holds its bias
            return self._fused(fmt, self._payloads[key], bias, sizes)
        if key not in self._packed:
            self._packed[key] = self._fused(fmt, self._payloads[key], None, sizes)
        made = self._packed[key]
        few = made.few.clone()
        if made.many is made.few:
            return FusedSite(few, few, made.rows, sizes)
        many_kernel = self._kernels(fmt, *shape_of(fmt, self._payloads[key]))[1]
        many = many_kernel.prepare(fmt, self._payloads[key], self.target, m=self._rows[1], like=few)
        return FusedSite(few, many, made.rows, sizes)

    @property
    def _rows(self) -> tuple[int, int]:
        """The rows that the kernels for few and for many are chosen for."""
        step = self.workload.tokens_in_flight
        return (step, max(PREFILL_ROWS, step)) if self.workload.phase == "decode" else (1, step)

    def _kernels(self, fmt: Format, n: int, k: int) -> tuple[LinearKernel, LinearKernel]:
        few, many = self._rows
        return self.choose(fmt, n, k, few), self.choose(fmt, n, k, many)

    def _fused(self, fmt: Format, payload: Payload, bias: Tensor | None, sizes: Sequence[int]) -> FusedSite:
        n, k = shape_of(fmt, payload)
        (few_kernel, many_kernel), (m_few, m_many) = self._kernels(fmt, n, k), self._rows
        few = few_kernel.prepare(fmt, payload, self.target, bias, m=m_few)
        many = few if few_kernel == many_kernel else many_kernel.prepare(fmt, payload, self.target, bias, m=m_many, like=few)
        return FusedSite(few, many, max(FEW_ROWS, m_few), sizes)

    def _bias(self, names: Sequence[str], sizes: Sequence[int], replaced: Mapping[str, Tensor]) -> Tensor | None:
        found = [replaced.get(f"{name}.bias", bias_of(self.model.get_submodule(name))) for name in names]
        if all(bias is None for bias in found):
            return None
        return torch.cat([torch.zeros(size) if bias is None else bias for bias, size in zip(found, sizes, strict=True)])

    def _skeleton(self, replaced: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model's modules whose parameters are converted and shared; those of linears to come are left empty."""
        bare = {layer.name for _, layer in self.structure.layers()}
        memo: dict[int, Any] = {}
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[0] in bare:
                memo[id(parameter)] = nn.Parameter(torch.empty(0), requires_grad=False)
            elif name in replaced:
                memo[id(parameter)] = nn.Parameter(
                    replaced[name].to(self.target.device, self.target.dtype), requires_grad=False
                )
            else:
                if name not in self._shared:
                    self._shared[name] = parameter.detach().to(self.target.device, self.target.dtype)
                memo[id(parameter)] = nn.Parameter(self._shared[name], requires_grad=False)
        return copy.deepcopy(self.model, memo).to(self.target.device)  # buffers; what is there already stays as it is


def _stacked(site: Site, payloads: Sequence[Payload]) -> dict[str, Tensor]:
    """The payload of layers that are one product. Of low rank they share `down`, or the rank would be the sum of theirs."""
    if any("down" in payload and not torch.equal(payload["down"], payloads[0]["down"]) for payload in payloads):
        raise RuntimeRefusal(
            f"site {site.name}: layers with `down` factors of their own; fused layers share one, factorise them stacked"
        )
    shared = {name: part for name, part in payloads[0].items() if name == "down"}
    return {name: shared[name] if name in shared else torch.cat([own[name] for own in payloads]) for name in payloads[0]}


def materialize(
    model: nn.Module,
    structure: Structure,
    edits: Mapping[str, Edit],
    target: Target,
    table: LatencyTable | None = None,
    workload: Workload | None = None,
) -> nn.Module:
    """`Runtime.materialize` for a single policy."""
    return Runtime(model, structure, target, table, workload).materialize(edits)


def dense_candidates(engine: Runtime) -> dict[str, nn.Module]:
    """The uncompressed models that compete for 1.0x, by name: on the best dense kernels and, on a CPU, the model as it is (eager fp32).

    A checkpoint in another dtype than bf16, which is multiplied in fp32, also runs as people would run it where bf16 is: rounded to it.
    """
    structure, target = engine.structure, engine.target
    dense = {f"dense {structure.dtype}": engine.materialize({})}
    if target.compute_dtype == "bf16" and structure.dtype != "bf16":
        rounded = Runtime(engine.model, replace(structure, dtype="bf16"), target, engine.choose.table, engine.workload)
        dense[f"dense bf16, rounded from {structure.dtype}"] = rounded.materialize({})
    return {**dense, "eager fp32": engine.model} if target.device == "cpu" else dense
