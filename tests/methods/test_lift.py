"""Scales that leave a site for the rows that feed it: the same model bit for bit, whether they have moved yet or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import catalogue, checkpoint
from methods.apply import Installer, site_view
from methods.bank import Bank
from methods.calibrate import sweep
from methods.formats.halves import in_halves
from methods.formats.numerics import Compressed, payload_bits
from methods.formats.sides import plain
from methods.formats.turns import POWER
from methods.lift import Lifted
from methods.method import Edit, Stats
from methods.model.describe import describe
from methods.model.load import LoadedModel
from methods.model.structure import Site, Structure
from methods.model.weights import bias_of, weight_of
from methods.policy import Decision, Policy
from methods.policy_file import PolicyFile
from profilers.runtime import Runtime, RuntimeRefusal
from profilers.target import local_cpu
from search.export.standalone import export_checkpoint
from search.generate import simulated_sites
from tests.search.export.wide import wide_model
from tests.tiny import tiny_model, tiny_tokens

IDS = tiny_tokens(2, 40)


def uneven_(model: Any, structure: Structure) -> None:
    """Rows that feed others become of very unequal size, so that there is something to fold."""
    for index, site in enumerate(site for site in structure.sites if site.feed):
        module = model.get_submodule(site.feed.layer)
        rows = torch.tensor(sorted(set(site.feed.rows(site.d_in))))
        size = torch.exp2(torch.randn(len(rows), generator=torch.Generator().manual_seed(index)).mul(1.5).round())
        weight_of(module)[rows] *= size[:, None]
        if bias_of(module) is not None:
            bias_of(module)[rows] *= size


def by_rows(method: str, fmt: str) -> Decision:
    return Decision.of(method, format=fmt, fold="rows")


def decided(structure: Structure, method: str = "smoothquant", fmt: str = "w4a16-g16") -> dict[str, Decision]:
    """The method at every site, but that what feeds down is dense in the second block, and what feeds o in the third."""
    kept = {1: "up", 2: "v"}

    def dense(site: Site) -> bool:
        return any(layer.kind == kept.get(site.block) for layer in site.layers)

    decision = by_rows(method, fmt)
    return {
        site.name: decision if catalogue.refuses(site, decision) is None else Decision.of("rtn", format=fmt)
        for site in structure.sites
        if not dense(site)
    }


def made(model: Any, structure: Structure, decisions: Mapping[str, Decision]) -> dict[str, Edit]:
    edits: dict[str, Edit] = {}

    def visit(block: int, stats: Mapping[str, Stats]) -> None:
        for site in structure.in_block(block):
            if site.name in decisions:
                edits[site.name] = catalogue.apply(site_view(model, structure, site), stats, decisions[site.name])

    needs = {name: catalogue.needs([decision]) for name, decision in decisions.items()}
    sweep(model, structure, [tiny_tokens(2, 24, seed=1)], needs, visit)
    return edits


def logits(model: Any, structure: Structure, edits: Mapping[str, Edit]) -> torch.Tensor:
    with Installer(model, structure) as installer, torch.inference_mode():
        for site, edit in edits.items():
            installer.install(site, edit)
        result: torch.Tensor = model(IDS).logits
        return result


def powers(edits: Mapping[str, Edit]) -> dict[str, torch.Tensor]:
    return {name: c.payload[POWER] for edit in edits.values() for name, c in edit.linears.items() if POWER in c.payload}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Grouped queries, biases at v, sizes that exports take."""
    found = wide_model(tmp_path_factory.mktemp("wide"))
    uneven_(found.model, found.structure)
    return found


# Separate and fused linears, biases, transposed weights, ReLU; two query heads to a value head in all but gpt2, opt and falcon-7b.
@pytest.mark.parametrize("arch", ["llama-untied", "phi3", "gpt2", "opt", "qwen2", "falcon-7b", "neox"])
@pytest.mark.parametrize("fmt", ["w4a16-g16", "w4a8-g16", "w8a8-token"])
def test_lifted_is_the_same_model_bit_for_bit(arch: str, fmt: str) -> None:
    model = tiny_model(arch)
    structure = describe(model)
    uneven_(model, structure)
    edits = made(model, structure, decided(structure, fmt=fmt))
    assert len(powers(edits)) == sum(site.feed is not None for site in structure.sites) > 0
    lifted = Lifted(edits, structure, model)
    assert not lifted.kept and lifted.keys() == edits.keys()
    assert all(plain(c.payload) for edit in lifted.values() for c in edit.linears.values())
    expected = logits(model, structure, edits)
    assert torch.equal(logits(model, structure, lifted), expected)
    assert not torch.equal(expected, logits(model, structure, {}))


@pytest.mark.parametrize("arch", ["llama-untied", "phi3", "gpt2", "opt"])
def test_without_rounding_it_is_the_dense_model(arch: str) -> None:
    """Eight bits in groups of 16 change little; a scale that does not cancel, be it that of a bias, changes everything."""
    model = tiny_model(arch)
    structure = describe(model)
    uneven_(model, structure)
    decisions = {site.name: by_rows("smoothquant", "w8a16-g16") for site in structure.sites if site.feed}
    edits = made(model, structure, decisions)
    dense, found = logits(model, structure, {}), logits(model, structure, Lifted(edits, structure, model))
    assert float((found - dense).norm() / dense.norm()) < 0.05


def test_rows_take_what_inputs_lose_and_the_heads_of_a_group_share_it(loaded: LoadedModel) -> None:
    model, structure = loaded.model, loaded.structure
    edits = made(model, structure, decided(structure))
    lifted, found = Lifted(edits, structure, model), powers(edits)
    site_of = {layer.name: site for site, layer in structure.layers()}
    for name, power in found.items():
        site = site_of[name]
        assert site.feed is not None and int(power.min()) == 0 < int(power.max()) <= 15
        factor = torch.ones(weight_of(model.get_submodule(site.feed.layer)).shape[0])
        factor[site.feed.rows(site.d_in)] = torch.exp2(power.float())
        home = site_of[site.feed.layer].name
        rows = f"{site.feed.layer}.weight"
        if home in edits:
            compressed = lifted[home].linears[site.feed.layer]
            assert torch.equal(compressed.dense, edits[home].linears[site.feed.layer].dense * factor[:, None])
            assert torch.equal(compressed.payload["codes"], edits[home].linears[site.feed.layer].payload["codes"])
        else:
            home = site.name
            assert torch.equal(lifted[home].tensors[rows], model.get_parameter(rows) * factor[:, None])
        assert torch.equal(lifted[site.name].linears[name].payload["codes"], edits[site.name].linears[name].payload["codes"])
        if site.kind == "o":
            heads = power.view(structure.n_kv_heads, -1, structure.head_dim)
            assert heads.shape[1] == 2 and torch.equal(heads[:, 0], heads[:, 1])
            bias = f"{site.feed.layer}.bias"
            assert torch.equal(lifted[home].tensors[bias], model.get_parameter(bias) * factor)


@pytest.mark.parametrize("method", ["awq", "awq-gptq", "smoothquant", "smooth-gptq", "outlier-suppression-plus", "fptq"])
def test_every_scaling_method_stands_where_rows_feed_a_site(loaded: LoadedModel, method: str) -> None:
    structure, fmt = loaded.structure, "w4a8-g32"
    fed = [site for site in structure.sites if site.feed]
    assert {site.kind for site in fed} == {"o", "down"}
    decisions = {site.name: by_rows(method, fmt) for site in fed}
    if method == "fptq":
        decisions = {name: Decision.of(method, format=fmt, fold="rows", quiet=0.0) for name in decisions}
    edits = made(loaded.model, structure, decisions)
    assert powers(edits)
    lifted = Lifted(edits, structure, loaded.model)
    assert torch.equal(logits(loaded.model, structure, lifted), logits(loaded.model, structure, edits))
    for site in fed:
        own = edits[site.name].linears[site.layers[0].name]
        stored = payload_bits(own.format, own.payload) / site.n_weights
        assert catalogue.plan(site, decisions[site.name]).cost.bits_per_weight == stored
        off = Decision.of(method, format=fmt, fold="norms")
        assert "follows no norm of its own" in str(catalogue.refuses(site, off))
        assert catalogue.lifts(site, decisions[site.name]) and not catalogue.lifts(site, off)


def test_awq_lowers_the_error_behind_unequal_rows(loaded: LoadedModel) -> None:
    model, structure = loaded.model, loaded.structure
    down = [site for site in structure.sites if site.kind == "down"]

    def error(method: str) -> float:
        decisions = {site.name: Decision.of(method, format="w3a16-g32") for site in down}
        dense = logits(model, structure, {})
        return float((logits(model, structure, made(model, structure, decisions)) - dense).norm() / dense.norm())

    assert error("awq") < 0.9 * error("rtn")


@pytest.mark.parametrize("fmt", ["w4a16-g32", "w8a8-token"])
def test_what_is_evaluated_is_what_is_stored_exported_and_run(tmp_path: Path, loaded: LoadedModel, fmt: str) -> None:
    model, structure = loaded.model, loaded.structure
    decisions = decided(structure, "awq", fmt)
    edits = made(model, structure, decisions)
    assert powers(edits)
    expected = logits(model, structure, edits)

    bank = Bank(tmp_path / "bank")
    for name, edit in edits.items():
        bank.put(name, decisions[name], edit)
    assert torch.equal(logits(model, structure, {name: bank.get(name, d) for name, d in decisions.items()}), expected)

    file = PolicyFile(Policy({name: (decision,) for name, decision in decisions.items()}), id="fold")
    checkpoint.write(tmp_path / "ckpt", loaded, file, edits)
    held, back = checkpoint.read(tmp_path / "ckpt"), checkpoint.load_dense(tmp_path / "ckpt")
    assert back.structure == structure
    assert torch.equal(logits(back.model, structure, held.edits), expected)
    assert torch.equal(logits(back.model, structure, Lifted(held.edits, structure, back.model)), expected)

    check = export_checkpoint(tmp_path / "ckpt", "compressed-tensors", tmp_path / "ct")
    assert check.ok and check.max_weight_diff == 0.0
    check = export_checkpoint(tmp_path / "ckpt", "dense", tmp_path / "plain")
    assert check.ok and check.max_weight_diff == 0.0
    if fmt == "w4a16-g32":
        check = export_checkpoint(tmp_path / "ckpt", "gptq", tmp_path / "gptq")
        assert check.ok and check.max_weight_diff == 0.0
    with torch.inference_mode():
        ours = Runtime(model, structure, local_cpu(1)).materialize(edits)(IDS).logits.float()
    assert float((ours - expected).norm() / expected.norm()) < 0.1
    assert simulated_sites(structure, Lifted(edits, structure, model), local_cpu(1)) == {}


def test_rows_that_cannot_take_powers_are_refused_by_name(tmp_path: Path, loaded: LoadedModel) -> None:
    model, structure = loaded.model, loaded.structure
    up, down = structure.in_block(0)[2:]
    decisions = {up.name: Decision.of("rtn", format="fp8-tensor"), down.name: by_rows("smoothquant", "w4a16-g32")}
    edits = made(model, structure, decisions)
    lifted = Lifted(edits, structure, model)
    reason = "up_proj cannot be multiplied by powers of two: fp8-tensor has scales that several rows share"
    assert list(lifted.kept) == [down.name] and reason in lifted.kept[down.name]
    assert torch.equal(logits(model, structure, lifted), logits(model, structure, edits))
    with pytest.raises(RuntimeRefusal, match=reason):
        Runtime(model, structure, local_cpu(1)).materialize(edits)
    file = PolicyFile(Policy({name: (decision,) for name, decision in decisions.items()}), id="fold")
    checkpoint.write(tmp_path / "ckpt", loaded, file, edits)
    with pytest.raises(ValueError, match="fp8-tensor"):
        export_checkpoint(tmp_path / "ckpt", "compressed-tensors", tmp_path / "ct")
    assert export_checkpoint(tmp_path / "ckpt", "dense", tmp_path / "plain").ok


def test_scales_are_held_in_halves_behind_a_lift(loaded: LoadedModel) -> None:
    down = loaded.structure.in_block(0)[-1]
    edit = made(loaded.model, loaded.structure, {down.name: by_rows("smoothquant", "w4a16-g32")})[down.name]
    compressed = edit.linears[down.layers[0].name]
    tiny = Compressed.of(compressed.format, {**compressed.payload, "scale": compressed.payload["scale"] * 2.0**-12})
    held = in_halves(tiny)
    assert not torch.equal(held.payload["scale"], tiny.payload["scale"])
    assert torch.equal(held.payload["scale"].half().float(), held.payload["scale"].float())
    assert float((held.dense - tiny.dense).norm() / tiny.dense.norm()) < 0.1


@pytest.mark.parametrize("method", ["awq", "awq-gptq", "smoothquant", "smooth-gptq", "outlier-suppression-plus", "fptq"])
def test_rows_are_the_default_where_the_outputs_choose_the_scale(loaded: LoadedModel, method: str) -> None:
    down = loaded.structure.in_block(0)[-1]
    refused = catalogue.refuses(down, Decision.of(method, format="w4a16-g32"))
    assert (refused is None) == method.startswith("awq")
