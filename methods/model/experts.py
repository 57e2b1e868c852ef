"""Mixture-of-experts layers as plain linears, and back to the fused tensors that transformers stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from methods.model.trace import blind
from methods.model.weights import weight_of

STOCK_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""The layout understood: gate over up in one (E, 2 I, H) tensor, down (E, H, I), no biases."""

STACKED = ("gate_up_proj", "down_proj")
"""The tensors of a fused experts module."""


class UnsupportedModel(ValueError):
    """A model with parts that are not understood; says which, and what to do."""


class Expert(nn.Module):
    """One expert: two linears, with the gating between them given by the model."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = _linear(gate_up)
        self.down_proj = _linear(down)

    def forward(self, x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows (n, H) -> (n, H)."""
        result: Tensor = self.down_proj(gate(self.gate_up_proj(x)))
        return result


class UnfusedExperts(nn.ModuleList):
    """The experts of a layer, one module each; computes what the fused module computed.

    `stock` is that module without its two weights: it keeps the gating function and the way back.
    """

    def __init__(self, stock: nn.Module) -> None:
        fused = dict(stock.named_parameters(recurse=False))
        super().__init__(Expert(up, down) for up, down in zip(fused["gate_up_proj"], fused["down_proj"], strict=True))
        # Held in a tuple so that it is no submodule: its weights live in the experts only.
        self._stock = (stock,)

    @property
    def stock(self) -> nn.Module:
        """The module this one replaces."""
        return self._stock[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (n, H); top_k_index, top_k_weights (n, k) -> (n, H). An index of E or more is no expert (masked)."""
        result = torch.zeros_like(hidden_states)
        if result.is_meta:  # which experts are visited is a matter of values
            return result
        for index in sorted(set(top_k_index.flatten().tolist())):
            if index >= len(self):
                continue
            token, choice = torch.where(top_k_index == index)
            output = self[index](hidden_states[token], self.stock._apply_gate)
            result.index_add_(0, token, (output * top_k_weights[token, choice, None]).to(result.dtype))
        return result

    def fused(self) -> dict[str, Tensor]:
        """`gate_up_proj` (E, 2 I, H) and `down_proj` (E, H, I) of the stock module, copied."""
        return {name: torch.stack([weight_of(getattr(e, name)) for e in self]) for name in STACKED}


@torch.no_grad()
def unfuse_experts(model: nn.Module) -> int:
    """Replaces every fused experts module by `UnfusedExperts`, in place; returns how many.

    The linears are views of the fused tensors, so nothing is copied. Paths become `….experts.<e>.gate_up_proj` and
    `….experts.<e>.down_proj`. Raises UnsupportedModel for another layout (biases, transposed, ungated) before anything is replaced.
    """
    found = {name: module for name, module in model.named_modules() if _holds_experts(module)}
    replacements = {name: _unfused(name, module) for name, module in found.items()}
    for name, replacement in replacements.items():
        stock = replacement.stock
        model.set_submodule(name, replacement)
        del stock.gate_up_proj, stock.down_proj
    return len(replacements)


def fuse_experts(model: nn.Module) -> int:
    """Inverse of `unfuse_experts`, in place and with copies; returns how many layers were fused."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}
    for name, module in found.items():
        for parameter, tensor in module.fused().items():
            setattr(module.stock, parameter, nn.Parameter(tensor, requires_grad=False))
        model.set_submodule(name, module.stock)
    return len(found)


@torch.no_grad()
def experts_per_token(model: nn.Module, ids: Tensor) -> int:
    """The most experts of a layer that a token visits, watched on ids (1, t); 0 in a model without (unfused) experts.

    Configurations call it by many names, and some list one number for each layer.
    """
    seen = [0]

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[1] if len(args) > 1 else kwargs["top_k_index"]).shape[-1])

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, UnfusedExperts)]
    try:
        if handles and next(model.parameters()).is_meta:
            blind(ids, lambda given: model(input_ids=ids.to("meta"), use_cache=False, **given))
        elif handles:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return max(seen)


def stock_state_dict(model: nn.Module, replaced: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
    """The model's tensors under the names that stock transformers gives them (experts fused); the model stays as it is.

    replaced: tensors, by the names of the unfused model, that stand in for its own.
    """
    return stacked(model, {**model.state_dict(), **replaced})


def stacked(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a model with unfused experts -> by those of stock transformers, all experts of a layer in one."""
    result = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            own = {key: result.pop(key) for key in list(result) if key.startswith(f"{name}.")}
            for leaf in STACKED:
                result[f"{name}.{leaf}"] = torch.stack([own[f"{name}.{index}.{leaf}.weight"] for index in range(len(module))])
    return result


def _linear(weight: Tensor) -> nn.Linear:
    d_out, d_in = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(d_in, d_out, bias=False)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def _holds_experts(module: nn.Module) -> bool:
    """Whether the module stacks the down projections of experts; other tensors of three dimensions are no experts'."""
    down = dict(module.named_parameters(recurse=False)).get("down_proj")
    return down is not None and down.dim() == 3


def _unfused(name: str, stock: nn.Module) -> UnfusedExperts:
    shapes = {key: tuple(p.shape) for key, p in stock.named_parameters(recurse=False)}
    layout = {key: getattr(stock, key, None) for key in STOCK_LAYOUT}
    if set(shapes) != {"gate_up_proj", "down_proj"} or layout != STOCK_LAYOUT:
        raise UnsupportedModel(
            f"{name}: {type(stock).__name__} stores {shapes} ({layout}); only experts with gate_up_proj (E, 2I, H) and "
            "down_proj (E, H, I) without biases are understood. Choose a model whose experts are laid out like Mixtral's."
        )
    result = UnfusedExperts(stock)
    if not next(stock.parameters()).is_meta:
        _verify(name, stock, result)
    return result


def _verify(name: str, stock: nn.Module, unfused: UnfusedExperts) -> None:
    weight = stock.get_parameter("gate_up_proj")
    n_experts, _, d_model = weight.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, d_model, generator=generator).to(weight)
    index = torch.arange(6).view(3, 2) % n_experts
    share = torch.rand(3, 2, generator=generator).to(weight)
    expected, result = stock(x, index, share), unfused(x, index, share)
    if not torch.allclose(expected, result, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise UnsupportedModel(
            f"{name}: {type(stock).__name__} computes something else than down(gate(gate_up(x))); its experts are not understood"
        )
