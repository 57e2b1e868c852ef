"""Dense formats with zeros or of low rank in spaces, runtimes and exporters: refused, each with a reason."""

from __future__ import annotations

import pytest

from methods.formats.format import Format, parse_format
from methods.model.structure import LayerSpec, Site, Structure
from search.export.registry import EXPORTERS, exporter
from spaces.runtimes import RUNTIMES
from spaces.space import build

SITE = Site("a.down", "down", 0, (LayerSpec("a.down", "down", 0, 192, 96),))
NAMES = ("bf16-s90", "fp16-s1", "fp32-r64")


def _anything(fmt: Format, site: Site) -> str | None:
    return None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_spaces_say_why_they_are_not_offered(runtime: str) -> None:
    structure = Structure("LlamaForCausalLM", ("a",), (SITE,), "head", "embed", True, 96, 128, 6, 3, 16, "bf16", 10**6)
    space = build(structure, ["w4a16-g32", "w4a8-g32", *NAMES], ["rtn"], RUNTIMES[runtime], _anything)
    reasons = space.dropped[SITE.name]
    whose = "no method makes" if runtime == "isolatency" else f"{runtime} gets"
    assert all(any(name in label and whose in reason for label, reason in reasons.items()) for name in NAMES)
    assert not any(choice.format.thinned for choice in space.choices[SITE.name])


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name != "dense"])
def test_exporters_refuse_them(name: str) -> None:
    assert all(exporter(name).supports(parse_format(fmt), SITE) for fmt in NAMES)
