"""The installer puts edits in and takes them out bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.apply import Installer, site_view
from methods.catalogue import apply
from methods.formats.format import parse_format
from methods.formats.numerics import Compressed, linear
from methods.method import Edit, SiteView, Stats
from methods.model.describe import describe
from methods.model.structure import Site, Structure
from methods.model.weights import bias_of, weight_of
from methods.policy import Decision
from tests.tiny import tiny_model, tiny_tokens


def described(arch: str) -> tuple[Any, Structure]:
    model = tiny_model(arch)
    return model, describe(model)


def rtn(model: Any, structure: Structure, site: Site, fmt: str = "w4a16-g16") -> Edit:
    return apply(site_view(model, structure, site), {}, Decision.of("rtn", format=fmt))


def smoothquant(model: Any, structure: Structure, site: Site) -> Edit:
    size = torch.exp(torch.randn(site.d_in, generator=torch.Generator().manual_seed(0)))
    stats = {layer.name: Stats(100, abs_max=size) for layer in site.layers}
    return apply(site_view(model, structure, site), stats, Decision.of("smoothquant", format="w8a8-token"))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def n_hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma", "phi3"])
def test_installs_and_restores_bit_for_bit(arch: str) -> None:
    model, structure = described(arch)
    before, addresses = state(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    tokens = tiny_tokens()
    with torch.no_grad():
        dense = model(tokens).logits
        with Installer(model, structure) as installer:
            expected = set()
            for site in structure.sites:
                edit = rtn(model, structure, site, "w4a8-g16")
                installer.install(site.name, edit)
                expected |= {f"{layer.name}.weight" for layer in site.layers}
                for layer in site.layers:
                    assert torch.equal(weight_of(model.get_submodule(layer.name)), edit.linears[layer.name].dense)
            assert changed(model, before) == expected
            assert n_hooks(model) == len(expected)
            assert not torch.equal(model(tokens).logits, dense)
        assert changed(model, before) == set()
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
        assert n_hooks(model) == 0
        assert torch.equal(model(tokens).logits, dense)


@pytest.mark.parametrize("arch", ["llama", "llama-untied", "gemma", "opt"])
def test_a_folded_norm_is_all_that_changes_besides_the_linears(arch: str) -> None:
    model, structure = described(arch)
    before = state(model)
    site = next(site for site in structure.sites if site.norm)
    with Installer(model, structure) as installer:
        edit = smoothquant(model, structure, site)
        installer.install(site.name, edit)
        norm = {f"{site.norm}.weight", f"{site.norm}.bias"} & set(before)
        assert changed(model, before) == {f"{layer.name}.weight" for layer in site.layers} | norm
        assert set(edit.tensors) == norm
        installer.install(site.name, None)
        assert changed(model, before) == set()


@pytest.mark.parametrize("fmt", ["w4a8-g16", "w8a8-token", "w4a16-g16-asym"])
@pytest.mark.parametrize("arch", ["llama-untied", "gpt2"])
def test_an_installed_linear_computes_the_reference_numerics(arch: str, fmt: str) -> None:
    model, structure = described(arch)
    site = structure.sites[0]
    layer = site.layers[0]
    module = model.get_submodule(layer.name)
    x = torch.randn(3, 5, layer.d_in, generator=torch.Generator().manual_seed(0))
    with Installer(model, structure) as installer, torch.no_grad():
        edit = rtn(model, structure, site, fmt)
        installer.install(site.name, edit)
        expected = linear(x, edit.linears[layer.name].dense, parse_format(fmt), bias_of(module))
        torch.testing.assert_close(module(x), expected)


def test_installing_again_replaces_the_edit_before() -> None:
    model, structure = described("llama")
    before, site = state(model), structure.sites[0]
    with Installer(model, structure) as installer:
        installer.install(site.name, smoothquant(model, structure, site))
        installer.install(site.name, None)
        second = rtn(model, structure, site)
        installer.install(site.name, smoothquant(model, structure, site))
        installer.install(site.name, second)
        assert changed(model, before) == {f"{layer.name}.weight" for layer in site.layers}
        assert n_hooks(model) == 0
        installer.install(site.name, Edit())
        assert changed(model, before) == set()


def test_restores_after_an_exception() -> None:
    model, structure = described("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), Installer(model, structure) as installer:
        installer.install(structure.sites[0].name, rtn(model, structure, structure.sites[0], "w4a8-g16"))
        raise RuntimeError("stop")
    assert changed(model, before) == set() and n_hooks(model) == 0


def test_a_model_in_half_precision_keeps_its_dtype() -> None:
    model = tiny_model("llama").bfloat16()
    structure = describe(model)
    site = structure.sites[0]
    with Installer(model, structure) as installer:
        installer.install(site.name, smoothquant(model, structure, site))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert torch.isfinite(model(tiny_tokens()).logits).all()


def test_edits_that_do_not_fit_leave_the_site_dense() -> None:
    model, structure = described("llama")
    before = state(model)
    first, second = structure.sites[:2]
    wrong = Compressed.of(parse_format("fp32"), {"weight": torch.zeros(3, 3)})
    with Installer(model, structure) as installer:
        with pytest.raises(KeyError, match="no site"):
            installer.install("nowhere", None)
        with pytest.raises(ValueError, match="the edit holds"):
            installer.install(first.name, rtn(model, structure, second))
        with pytest.raises(ValueError, match="the edit holds"):
            installer.install(first.name, Edit({first.layers[0].name: wrong}))
        with pytest.raises(ValueError, match="the edit makes"):
            installer.install(first.name, Edit(tensors={f"{first.norm}.weight": torch.zeros(3)}))
        assert changed(model, before) == set()
        replaced = {f"{first.norm}.weight": torch.zeros(first.d_in)}
        installer.install(first.name, Edit(tensors=replaced))
        with pytest.raises(ValueError, match=r"already replaced by the edit of .*q_proj"):
            installer.install(second.name, Edit(tensors=replaced))
    assert changed(model, before) == set()


@pytest.mark.parametrize(("arch", "offset"), [("llama", 0.0), ("gemma", 1.0), ("opt", 0.0)])
def test_site_view(arch: str, offset: float) -> None:
    model = tiny_model(arch).bfloat16().float()
    structure = describe(model)
    for site in structure.sites:
        view = site_view(model, structure, site)
        assert list(view.weights) == [layer.name for layer in site.layers]
        for layer in site.layers:
            assert view.weights[layer.name].shape == (layer.d_out, layer.d_in)
            assert view.weights[layer.name].data_ptr() == model.get_submodule(layer.name).weight.data_ptr()
        _check_norm(view, model, offset)
    assert any(site.norm for site in structure.sites)


def _check_norm(view: SiteView, model: Any, offset: float) -> None:
    assert (view.norm is None) == (view.site.norm is None)
    if view.norm is not None:
        live = model.get_submodule(view.site.norm).weight
        assert view.norm.unit_offset == offset and view.norm.weight.dtype == torch.bfloat16
        assert torch.equal(view.norm.weight.float(), live)


def test_a_norm_that_its_stored_dtype_does_not_hold_stays_as_it_is() -> None:
    model, structure = described("llama")
    view = site_view(model, structure, structure.sites[0])
    assert view.norm is not None and view.norm.weight.dtype == torch.float32
