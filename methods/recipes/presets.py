"""Deployments as they were published: a recipe and a format for every site, with groups that fit its width. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from methods.catalogue import refuses
from methods.model.structure import Site
from methods.policy import Decision, Knob


@dataclass(frozen=True)
class Preset:
    """A published deployment.

    method: at every site that takes it; elsewhere: at the others, since a scale needs a norm to fold into. knobs: of `method`.
    format: without its group; group: the one that was published, -1 for none, of which `decide` takes the largest that fits.
    """

    name: str
    method: str
    elsewhere: str
    format: str
    group: int = -1
    knobs: Mapping[str, Knob] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("smoothquant-o1", "smoothquant", "rtn", "w8a8-token"),
        Preset("smoothquant-o2", "smoothquant", "rtn", "w8a8-tensor"),
        Preset("smoothquant-o3", "smoothquant-static", "static", "w8a8-tensor"),
        Preset("zeroquant-w8a8", "zeroquant", "zeroquant", "w8a8-token", 128),
        Preset("zeroquant-w4a8", "zeroquant", "zeroquant", "w4a8-token", 128),
        Preset("zeroquant-fp-w4a8", "zeroquant-fp", "zeroquant-fp", "e2m1ae4m3-token", 256),
        Preset("fptq-w4a8", "fptq", "rtn", "w4a8-token", 128),
        Preset("fptq-static-w4a8", "fptq-static", "static", "w4a8-tensor", 128),
        Preset("outlier-suppression-w6a6", "outlier-suppression", "static", "w6a6-tensor"),
        Preset("outlier-suppression-plus-w4a4", "outlier-suppression-plus", "rtn", "w4a4-token"),
        Preset("rptq-w4a4", "rptq", "rptq", "w4a4-tensor", knobs={"clusters": 32}),
        Preset("llm-fp4-w4a4", "llm-fp4", "rtn", "e2m1ae2m1-tensor"),
        Preset("w4a8", "smooth-gptq", "gptq", "w4a8-token", 128),
        Preset("w4a4", "smooth-gptq", "gptq", "w4a4-token", 128),
    )
}
"""By name. The last two are what serving engines run today: scales from SmoothQuant where they fold, rounding by GPTQ."""


def largest_group(d_in: int, most: int) -> int:
    """The largest group of at most `most` inputs, a multiple of 16, that divides `d_in`; -1, a whole row, where there is none."""
    return next((group for group in range(most - most % 16, 0, -16) if d_in % group == 0), -1)


def decide(preset: Preset, site: Site) -> Decision:
    """What the preset does at a site; raises ValueError with both reasons where neither of its methods can stand there."""
    group = largest_group(site.d_in, preset.group)
    name = preset.format if group == -1 else f"{preset.format}-g{group}"
    knobs = preset.knobs if preset.method == preset.elsewhere else {}
    first = Decision.of(preset.method, format=name, **preset.knobs)
    reason = refuses(site, first)
    if reason is None:
        return first
    other = Decision.of(preset.elsewhere, format=name, **knobs)
    second = refuses(site, other)
    if second is not None:
        raise ValueError(f"{preset.name}: {site.name} takes neither of its methods ({reason}; {second}); leave the site dense")
    return other
