"""Puts edits into a model and takes them out again, and shows methods the tensors of a site."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from methods.formats.numerics import DTYPES, Compressed, quantize_activation
from methods.method import Edit, NormView, SiteView
from methods.model.structure import Site, Structure
from methods.model.weights import bias_of, norm_view, set_weight, weight_of


def site_view(model: nn.Module, structure: Structure, site: Site) -> SiteView:
    """The tensors of a site: weights and biases in fp32, which are views where the model is fp32, and its norm if it has one.

    The norm is given in the checkpoint's dtype where that holds its values exactly, otherwise in the dtype it has in the model.
    """
    weights = {layer.name: weight_of(model.get_submodule(layer.name)).float() for layer in site.layers}
    found = {layer.name: bias_of(model.get_submodule(layer.name)) for layer in site.layers}
    biases = {name: bias.float() for name, bias in found.items() if bias is not None}
    if site.norm is None:
        return SiteView(site, weights, biases=biases)
    live = norm_view(model, site.norm)
    dtype = DTYPES[structure.dtype]
    bias = None if live.bias is None else _stored(live.bias, dtype)
    return SiteView(site, weights, NormView(live.name, _stored(live.weight, dtype), bias, live.unit_offset), biases)


class Installer:
    """Swaps the edits of sites into a model and back, bit for bit: weights by reference, activation rules as forward pre-hooks.

    Use it as a context manager, or call `restore` when done.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model = model
        self._structure = structure
        self._undo: dict[str, list[Callable[[], None]]] = {}
        self._replaced: dict[str, str] = {}

    def install(self, site: str, edit: Edit | None) -> None:
        """Makes the site as `edit` says; None, like an empty edit, makes it dense again. What stood there before is taken out first.

        Raises KeyError for an unknown site, and ValueError, with the site left dense, for an edit that does not fit it.
        """
        spec = self._structure.site(site)
        self._remove(site)
        if edit is None:
            return
        self._check(spec, edit)
        undo = self._undo.setdefault(site, [])
        for name, compressed in edit.linears.items():
            module = self._model.get_submodule(name)
            undo.append(_restorer(module.get_parameter("weight")))
            set_weight(module, compressed.dense.to(weight_of(module).dtype))
            if compressed.format.act_bits != 16:
                undo.append(module.register_forward_pre_hook(_input_rounder(compressed)).remove)
        for name, tensor in edit.tensors.items():
            parameter = self._model.get_parameter(name)
            undo.append(_restorer(parameter))
            self._replaced[name] = site
            parameter.data = tensor.to(parameter.dtype)

    def restore(self) -> None:
        """Takes out everything; leaves no hook behind."""
        for site in list(self._undo):
            self._remove(site)

    def __enter__(self) -> Installer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def _remove(self, site: str) -> None:
        for step in reversed(self._undo.pop(site, [])):
            step()
        self._replaced = {name: owner for name, owner in self._replaced.items() if owner != site}

    def _check(self, site: Site, edit: Edit) -> None:
        layers = {layer.name: (layer.d_out, layer.d_in) for layer in site.layers}
        for name, compressed in edit.linears.items():
            if layers.get(name) != tuple(compressed.dense.shape):
                raise ValueError(
                    f"{site.name}: the edit holds {name} {tuple(compressed.dense.shape)}; the site's layers are {layers}"
                )
        for name, tensor in edit.tensors.items():
            if name in self._replaced:
                raise ValueError(
                    f"{site.name}: {name} is already replaced by the edit of {self._replaced[name]}; take that out first"
                )
            shape = self._model.get_parameter(name).shape
            if tensor.shape != shape:
                raise ValueError(f"{site.name}: the edit makes {name} {tuple(tensor.shape)}; it is {tuple(shape)}")


def _input_rounder(compressed: Compressed) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that rounds the input as the format, and what the payload says of inputs, demand."""
    beside = {part: tensor for part, tensor in compressed.payload.items() if "." in part}

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = arguments[0]
        return (quantize_activation(x, compressed.format, beside).to(x.dtype), *arguments[1:])

    return hook


def _restorer(parameter: nn.Parameter) -> Callable[[], None]:
    original = parameter.data

    def restore() -> None:
        parameter.data = original

    return restore


def _stored(tensor: Tensor, dtype: Any) -> Tensor:
    narrow = tensor.to(dtype)
    return narrow if bool((narrow.to(tensor.dtype) == tensor).all()) else tensor
