"""`Recipe`: a named method as a choice of parts. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from methods.formats.elements import OWN_LEVELS
from methods.formats.format import Format, parse_format
from methods.method import Cost, Edit, Need, Plan, SiteView, Source, Stage
from methods.model.structure import Site
from methods.policy import Knob

if TYPE_CHECKING:
    from methods.method import Stats

_COUNTED = frozenset({Need.HESSIAN, Need.FIRST})

PART_NEEDS: Mapping[str, frozenset[Need]] = {
    "smooth": frozenset({Need.ABS_MAX}),
    "awq": frozenset({Need.ABS_MEAN, Need.SAMPLE, Need.FIRST}),
    "log-equalize": frozenset({Need.ABS_MAX}),
    "outlier-plus": frozenset({Need.RANGE, Need.SAMPLE}),
    "pre-shift": frozenset({Need.ABS_MAX}),
    "static-range": frozenset({Need.RANGE}),
    "static-quiet": frozenset({Need.RANGE}),
    "static-clusters": frozenset({Need.RANGE}),
    "static-groups": frozenset({Need.RANGE}),
    "token-clip": frozenset({Need.SAMPLE}),
    "scale-search": frozenset({Need.SAMPLE}),
    "disassembly": frozenset({Need.ABS_MAX}),
    "reassembly": frozenset({Need.ABS_MAX, Need.SAMPLE}),
    "feedback": _COUNTED,
    "loud-columns": frozenset({Need.ABS_MAX}),
    "sensitive-columns": _COUNTED,
    "leave-one-out": _COUNTED,
    "sensitive-or-large": frozenset({Need.FISHER}),
    "fisher": frozenset({Need.FISHER}),
    "lqer": frozenset({Need.ABS_MEAN}),
    "qera": _COUNTED,
    "feedback-drift": frozenset({*_COUNTED, Need.DRIFT, Need.FIRST_DRIFT}),
    "feedback-outliers": _COUNTED,
    "ldlq": _COUNTED,
    "obq": _COUNTED,
    "nearest+greedy": _COUNTED,
    "feedback+greedy": _COUNTED,
    "ldlq+greedy": _COUNTED,
    "output-clip": _COUNTED,
    "incoherence": frozenset({Need.HESSIAN}),
    "adaround": _COUNTED,
    "adaround-block": frozenset({Need.BLOCK}),
    "flexround": frozenset({Need.BLOCK}),
    "signround": frozenset({Need.BLOCK}),
    "omniquant": frozenset({Need.BLOCK, Need.ABS_MAX}),
    "lkd": frozenset({Need.BLOCK}),
    "imatrix": frozenset({Need.HESSIAN}),
}
"""The statistics that a part reads; parts that are not here read none. The parts themselves are in `methods.quant.parts`."""


@dataclass(frozen=True)
class KnobSpec:
    """What a knob may be: one of `options`, or, where `low` and `high` are set, a number of `kind` between them, both included."""

    default: Knob
    options: tuple[Knob, ...] = ()
    low: float | None = None
    high: float | None = None
    kind: type[int] | type[float] = float

    def allows(self, value: Knob) -> bool:
        """Whether the value is legal; True and 1 are not the same."""
        if any(type(value) is type(option) and value == option for option in self.options):
            return True
        if self.low is None or self.high is None or isinstance(value, bool | str):
            return False
        return (self.kind is float or isinstance(value, int)) and self.low <= value <= self.high

    @property
    def text(self) -> str:
        """What is allowed, in words."""
        words = [str(option).lower() if isinstance(option, bool) else str(option) for option in self.options]
        if self.low is not None and self.high is not None:
            whole = self.kind is int
            low, high = (int(self.low), int(self.high)) if whole else (self.low, self.high)
            words.append(f"{'a whole number' if whole else 'a number'} from {low:.10g} to {high:.10g}")
        return " or ".join(words)


def any_format(fmt: Format) -> str | None:
    """Every format."""
    return None


def any_site(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    """Every site."""
    return None


def norm_site(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    """Sites that follow a norm which a scale can fold into."""
    return (
        None if site.norm else f"{site.name} follows no norm of its own that its scale could fold into; use rtn or gptq there"
    )


FOLD = KnobSpec("norms", options=("norms", "rows"))
"""Where a site's scale may go: into the norm before it, or where it has none of its own also into the rows that feed it.

Rows lower the loss where the scale is chosen by the outputs' error; a fixed rule takes more from the weights there than the inputs gain.
"""


def fold_site(site: Site, knobs: Mapping[str, Knob]) -> str | None:
    """Those, and with the knob `fold` at `rows` sites that other rows feed."""
    return None if knobs["fold"] == "rows" and site.feed else norm_site(site, knobs)


def lifts(site: Site, knobs: Mapping[str, Knob]) -> bool:
    """Whether a recipe with these knobs, defaults included, may leave its scale to the rows that feed the site."""
    return knobs.get("fold") == "rows" and site.norm is None and site.feed is not None


def grid_format(fmt: Format) -> str | None:
    """Formats with a grid, of whatever element."""
    return f"{fmt.name} has no grid to fit; use rtn to store a dense dtype" if fmt.dense else None


def integer_format(fmt: Format) -> str | None:
    """Formats with an integer grid and bf16 scales a channel or a group."""
    reason = None if fmt.integer else f"{fmt.name} is no integer grid with bf16 scales a channel or group; use rtn or gptq"
    return grid_format(fmt) or reason


def scaled_format(fmt: Format) -> str | None:
    """Formats whose levels are fixed up to a scale."""
    fitted = f"{fmt.name} has levels that are fitted one by one; use the fitter minmax, or a method for {fmt.element}"
    return grid_format(fmt) or (fitted if fmt.element in OWN_LEVELS else None)


def offset_format(fmt: Format) -> str | None:
    """Formats with a float offset."""
    return integer_format(fmt) or (f"{fmt.name} has no offset to solve for; use {fmt.name}-asym" if fmt.symmetric else None)


PART_FORMATS: Mapping[str, Callable[[Format], str | None]] = {
    "mse": scaled_format,
    "kl": integer_format,
    "output-clip": integer_format,
}
"""Why a fitter that is chosen by a knob refuses a format that its recipe takes, or None; fitters that are not here refuse none."""


Family = Literal["rounding", "transform", "partition", "format", "activation", "compensation"]
"""What a recipe is about, for listings."""


@dataclass(frozen=True)
class Limit:
    """Settings at which a recipe is exactly another one, in every code: the tests hold it to that.

    knobs: of this recipe; method, with_knobs: the other; format: of both, where the identity needs a certain one.
    """

    knobs: Mapping[str, Knob]
    method: str
    with_knobs: Mapping[str, Knob] = field(default_factory=dict)
    format: str = "w4a16-g48"


@dataclass(frozen=True)
class Recipe:
    """A named method. It fulfils the protocol `methods.method.Method`; torch is imported when `apply` runs.

    transform, partition, fitter, rounder, compensator, learner: names of parts in `methods.quant.parts`, "" for none; a knob named
    `fitter` chooses that one. stacks: layers that share their inputs may be compressed as one weight, row below row.
    format: the one that it was published with, which decisions take that name none; "" where each has to name one.
    knobs: all but `format`, which every quantizing recipe has. formats: why a format is refused, or None. sites: likewise for a site.
    side_bits: stored bits a weight beside the grid, (d_out, d_in, knobs) -> bits, for what the recipe keeps there at most.
    simulated: why no kernel runs what the recipe stores, so that it has no latency of its own; "" where the format's kernels do.
    """

    name: str
    summary: str
    source: Source
    family: Family = "rounding"
    stage: Stage = Stage.QUANTIZE
    transform: str = ""
    partition: str = ""
    fitter: str = "minmax"
    rounder: str = "nearest"
    compensator: str = ""
    learner: str = ""
    stacks: bool = True
    format: str = ""
    knobs: Mapping[str, KnobSpec] = field(default_factory=dict)
    formats: Callable[[Format], str | None] = integer_format
    sites: Callable[[Site, Mapping[str, Knob]], str | None] = any_site
    side_bits: Callable[[int, int, Mapping[str, Knob]], float] | None = None
    simulated: str = ""
    limits: tuple[Limit, ...] = ()

    @property
    def parts(self) -> dict[str, str]:
        """The parts by slot, in the order in which they run; empty slots and the plain defaults of a cast are left out."""
        slots = ("transform", "partition", "fitter", "rounder", "compensator", "learner")
        return {slot: part for slot in slots if (part := str(getattr(self, slot)))}

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics of the parts."""
        none: frozenset[Need] = frozenset()
        return none.union(*(PART_NEEDS.get(part, none) for part in self.parts.values()))

    def resolve(self, knobs: Mapping[str, Knob]) -> dict[str, Knob]:
        """The knobs with defaults filled in; raises ValueError naming what is allowed for an unknown knob, value or format."""
        quantizes = self.stage is Stage.QUANTIZE
        allowed = [*(["format"] if quantizes else []), *self.knobs]
        for name, value in knobs.items():
            if name not in allowed:
                raise ValueError(f"{self.name}: unknown knob {name!r}; allowed are {', '.join(allowed) or 'none at all'}")
            if name != "format" and not self.knobs[name].allows(value):
                raise ValueError(f"{self.name}: {name}={value!r} is not allowed; use {self.knobs[name].text}")
        if quantizes and self.format:
            knobs = {"format": self.format, **knobs}
        if quantizes and "format" not in knobs:
            raise ValueError(f"{self.name}: the knob format is missing; write {self.name}:format=w4a16-g64, for example")
        if quantizes:
            parse_format(str(knobs["format"]))
        return {**{name: spec.default for name, spec in self.knobs.items()}, **knobs}

    def refuses(self, site: Site, knobs: Mapping[str, Knob]) -> str | None:
        """Why the recipe cannot stand at this site with these knobs, or None; raises ValueError as `resolve` does."""
        resolved = self.resolve(knobs)
        if self.stage is not Stage.QUANTIZE:
            return None
        fmt = parse_format(str(resolved["format"]))
        reason = f"no method makes {fmt.name} weights yet; its kernels can be timed" if fmt.thinned else self.formats(fmt)
        if not reason and not fmt.dense:
            reason = PART_FORMATS.get(str(resolved.get("fitter", self.fitter)), any_format)(fmt)
        idle = sorted(set(knobs) - {"format"})
        if not reason and fmt.dense and idle:
            reason = f"{fmt.name} is a cast, on which {', '.join(idle)} has no effect"
        reason = reason or self.sites(site, resolved)
        if reason:
            return f"{self.name}: {reason}"
        if not fmt.divides(site.d_in):
            return f"{self.name}: group={fmt.unit} of {fmt.name} does not divide d_in={site.d_in} of {site.name}"
        return None

    def plan(self, site: Site, knobs: Mapping[str, Knob], dtype: str = "bf16") -> Plan:
        """Format and cost; `dtype` is the checkpoint's, which `none` keeps. Raises ValueError with the reason of `refuses`."""
        reason = self.refuses(site, knobs)
        if reason:
            raise ValueError(reason)
        resolved = self.resolve(knobs)
        fmt = parse_format(str(resolved["format"]) if self.stage is Stage.QUANTIZE else dtype)
        # Layers of a site each have scales, and what stands beside the grid, of their own.
        bits = sum(fmt.overhead_bits(layer.d_out, layer.d_in) for layer in site.layers) / site.n_weights
        if self.side_bits is not None:
            own = [self.side_bits(layer.d_out, layer.d_in, resolved) * layer.d_out * layer.d_in for layer in site.layers]
            bits += sum(own) / site.n_weights
        return Plan(fmt, Cost(fmt.bits + bits), self.simulated)

    def apply(self, view: SiteView, stats: Mapping[str, Stats], knobs: Mapping[str, Knob]) -> Edit:
        """The edit of a site; raises ValueError where the recipe refuses it or a statistic is missing."""
        return self.apply_many(view, stats, [knobs])[0]

    def apply_many(self, view: SiteView, stats: Mapping[str, Stats], many: Sequence[Mapping[str, Knob]]) -> list[Edit]:
        """The edits of several settings; the same as `apply` gives, with what they share computed once."""
        if self.stage is Stage.NONE:
            for knobs in many:
                self.resolve(knobs)
            return [Edit() for _ in many]
        from methods.quant.runner import run_many

        return run_many(self, view, stats, many)
