"""Every method at every site of every architecture: it compresses or refuses with a reason, from one real calibration sweep."""

from __future__ import annotations

import pytest
import torch

from methods.apply import Installer, site_view
from methods.calibrate import sweep
from methods.catalogue import METHODS, apply, refuses
from methods.formats.format import parse_format
from methods.formats.numerics import decode
from methods.method import Need, Stage
from methods.model.describe import describe
from methods.policy import Decision
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokens

FORMATS = (
    "w4a16-g16",
    "w4a16-g16-asym",
    "w4a8-token",
    "w8a8-tensor",
    "w4a8-tensor",
    "nvfp4a16",
    "lut3a16",
    "lut3a16-whole",
    "bcq2a16-g16",
)
SHORT = {"steps": 2, "iterations": 2, "rounds": 2, "passes": 1}


def decisions() -> list[Decision]:
    """One for each method, in the first format that it takes, short where it iterates."""
    result = []
    for name, recipe in METHODS.items():
        if recipe.stage is Stage.QUANTIZE:
            extra = (*FORMATS, "bcq2a16-g16-asym", "e2m1ae4m3-token-g16", "e2m1ae2m1-tensor", "w4a16-g16-u4", "nvfp4a4", "q4_0")
            fmt = next(fmt for fmt in extra if recipe.formats(parse_format(fmt)) is None)
            knobs = {knob: value for knob, value in SHORT.items() if knob in recipe.knobs}
            result.append(Decision.of(name, format=fmt, **knobs))
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_method_compresses_or_refuses(arch: str) -> None:
    model = tiny_model(arch)
    structure = describe(model)
    tokens = tiny_tokens(4, 24)
    found: list[str] = []

    def visit(block: int, stats):  # type: ignore[no-untyped-def]
        if block != 1:
            return
        for site in structure.in_block(block):
            view = site_view(model, structure, site)
            for decision in decisions():
                reason = refuses(site, decision)
                if reason is not None:
                    assert site.name in reason or decision.method in reason
                    continue
                edit = apply(view, stats, decision)
                assert edit.linears.keys() == view.weights.keys()
                for layer, compressed in edit.linears.items():
                    assert compressed.dense.shape == view.weights[layer].shape and torch.isfinite(compressed.dense).all()
                    assert torch.equal(decode(compressed.format, compressed.payload), compressed.dense)
                with Installer(model, structure) as installer:
                    installer.install(site.name, edit)
                    assert torch.isfinite(model(input_ids=tokens[:1]).logits).all()
                found.append(decision.method)

    needs = {site.name: frozenset(Need) for site in structure.in_block(1)}
    sweep(model, structure, [tokens[:2], tokens[2:]], needs, visit)
    assert len(set(found)) > 0.7 * len(decisions()), sorted({decision.method for decision in decisions()} - set(found))
