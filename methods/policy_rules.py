"""Rules of a policy file: few patterns over module names that stand for one decision a module. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from methods import catalogue
from methods.formats.format import DENSE_DTYPES, Format, parse_format
from methods.globs import Glob, GlobError, either, from_regex, is_regex, numbers
from methods.model.structure import Structure
from methods.policy import DENSE, Decision, Knob, Policy
from methods.typed import shown

Decisions = tuple[Decision, ...]
Spec = dict[str, object]
"""One module's decisions in the words of the file, the fields of `SPEC_FIELDS`."""

_GRID_FIELDS = ("bits", "group", "sym", "act", "act_group")
_FIELDS_OF = {"none": (), "float": ("dtype",), "int": _GRID_FIELDS, "grid": ("format",)}
SPEC_FIELDS = ("method", "dtype", "format", *_GRID_FIELDS, "algo")
DEFAULT_ALGO = "rtn"


@dataclass(frozen=True)
class Rule:
    """What the modules whose whole name matches a glob (`methods.globs`) get; of several rules the last one wins."""

    match: str
    decisions: Decisions
    note: str = ""


def spec_of(decisions: Decisions) -> Spec:
    """The canonical spec of a module's decisions: every field that has a meaning, none that has not.

    Raises ValueError where the format is not the last decision's: the file has one number format a module.
    """
    if decisions in ((), (DENSE,)):
        return {"method": "none"}
    labels = " + ".join(decision.label for decision in decisions)
    named = [index for index, decision in enumerate(decisions) if decision.knob("format") is not None]
    algo = [_algo_of(decision) for decision in decisions]
    if not named:
        return {"method": "grid" if catalogue.format_of(decisions[-1]) else "none", "algo": algo}
    if named != [len(decisions) - 1]:
        raise ValueError(f"policy file: {labels}: only the last decision of a site may set the format")
    fmt = parse_format(str(decisions[-1].knob("format")))
    if fmt.dense:
        return {"method": "float", "dtype": fmt.name, "algo": algo}
    if not _by_fields(fmt):
        return {"method": "grid", "format": fmt.name, "algo": algo}
    spec: Spec = {"method": "int", "bits": fmt.bits, "group": fmt.group, "sym": fmt.symmetric, "act": fmt.act_bits}
    if fmt.act_bits != 16:
        spec["act_group"] = "token" if fmt.act_group == -1 else "group"
    return {**spec, "algo": algo}


def _by_fields(fmt: Format) -> bool:
    """Whether the fields of an integer grid say all of a format."""
    return fmt.integer and (fmt.act_element, fmt.act_rows) == ("int", 1)


def _algo_of(decision: Decision) -> dict[str, Knob]:
    knobs = {name: value for name, value in decision.knobs if name != "format"}
    if "name" in knobs:
        raise ValueError(f"policy file: {decision.label}: a knob cannot be called 'name', which the file uses for the method")
    return {"name": decision.method, **knobs}


def decisions_of(spec: Mapping[str, object], algo: str = DEFAULT_ALGO) -> Decisions:
    """Inverse of `spec_of`, with the defaults group -1, sym true, act 16, act_group token and `algo` filled in.

    Raises ValueError naming the field for a value of the wrong type or range and for a field that means nothing there.
    """
    method = spec.get("method")
    if not isinstance(method, str) or method not in _FIELDS_OF:
        raise ValueError(f"method={method!r}; this version knows {', '.join(map(repr, _FIELDS_OF))}")
    for name in set(spec) - {"method", "algo", *_FIELDS_OF[method]}:
        raise ValueError(f"{name}={spec[name]!r} means nothing with method: {method}; remove it or change the method")
    if method == "none":
        return tuple(_decision(item) for item in _items(spec["algo"])) if "algo" in spec else (DENSE,)
    *before, last = [_decision(item) for item in _items(spec.get("algo", algo))]
    if method == "grid" and "format" not in spec and catalogue.format_of(last):
        return (*before, last)
    fmt = {"int": _format, "float": _dense, "grid": _named}[method](spec)
    if last == DENSE:
        raise ValueError(f"algo=none with method: {method}; name the method that rounds, e.g. algo: rtn")
    return (*before, Decision(last.method, (*last.knobs, ("format", fmt.name))))


def _dense(spec: Mapping[str, object]) -> Format:
    dtype = str(spec.get("dtype"))
    if dtype.partition("-")[0] not in DENSE_DTYPES:
        raise ValueError(f"dtype={spec.get('dtype')!r} with method: float; use one of {', '.join(DENSE_DTYPES)}")
    return parse_format(dtype)


def _named(spec: Mapping[str, object]) -> Format:
    fmt = parse_format(str(spec.get("format")))
    if fmt.dense or _by_fields(fmt):
        raise ValueError(f"format={fmt.name!r} with method: grid; write it as method: {'float' if fmt.dense else 'int'}")
    return fmt


def _format(spec: Mapping[str, object]) -> Format:
    if "bits" not in spec:
        raise ValueError("method: int needs bits")
    act = _whole(spec, "act", 16)
    if act == 16 and "act_group" in spec:
        raise ValueError("act_group means nothing with act: 16; remove it or write act: 8")
    shared = spec.get("act_group", "token")
    if shared not in ("token", "group"):
        raise ValueError(f"act_group={shared!r}; use token or group")
    symmetric = spec.get("sym", True)
    if not isinstance(symmetric, bool):
        raise ValueError(f"sym={symmetric!r}; use true or false")
    group = _whole(spec, "group", -1)
    return Format(_whole(spec, "bits", 0), group, symmetric, act, group if shared == "group" else -1)


def _whole(spec: Mapping[str, object], name: str, default: int) -> int:
    value = spec.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}; use a whole number")
    return value


def _items(algo: object) -> list[object]:
    items = algo if isinstance(algo, list) else [algo]
    if not items:
        raise ValueError("algo is an empty list; name at least one method")
    return items


def _decision(item: object) -> Decision:
    fields = {"name": item} if isinstance(item, str) else item
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
        raise ValueError(f"algo={item!r}; write a method's name or {{name: METHOD, knob: value}}")
    if "format" in fields:
        raise ValueError("algo: the format is written as bits, group, sym, act and act_group")
    for name, value in fields.items():
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"algo: {name}={value!r}; use true, false, a number or a word")
    return Decision(fields["name"], tuple((name, value) for name, value in fields.items() if name != "name"))


def table_of(policy: Policy, structure: Structure) -> dict[str, Decisions]:
    """The decisions of every linear, by module name; raises KeyError for a site that the model has not."""
    for name in policy.sites:
        structure.site(name)
    return {layer.name: policy.at(site.name) for site, layer in structure.layers()}


def sites_of(table: Mapping[str, Decisions], structure: Structure) -> dict[str, Decisions]:
    """The decisions of every site that is not dense; raises ValueError where a site's layers disagree."""
    sites = {}
    for site in structure.sites:
        found = {table[layer.name]: layer.name for layer in site.layers}
        if len(found) > 1:
            (a, first), (b, second), *_ = found.items()
            raise ValueError(
                f"{first} has {_label(a)} but {second} has {_label(b)}; runtimes fuse {site.name}, so its layers need the same rule"
            )
        decisions = table[site.layers[0].name]
        if decisions != (DENSE,):
            sites[site.name] = decisions
    return sites


def _label(decisions: Decisions) -> str:
    return " + ".join(decision.label for decision in decisions)


def digest_of(table: Mapping[str, Decisions]) -> str:
    """`sha256:…` of the canonical JSON of every module's spec: what the rules mean, however they are written."""
    specs = {module: spec_of(decisions) for module, decisions in table.items()}
    return "sha256:" + hashlib.sha256(json.dumps(specs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def expand(rules: Iterable[Rule], default: Decisions, structure: Structure) -> dict[str, Decisions]:
    """The decisions of every linear under the rules; raises ValueError for a rule that matches none."""
    table = {layer.name: default for _, layer in structure.layers()}
    for index, rule in enumerate(rules):
        try:
            pattern = Glob(from_regex(rule.match) if is_regex(rule.match) else rule.match)
        except GlobError as error:
            raise GlobError(f"rules[{index}]: {error}") from None
        hits = [module for module in table if pattern.matches(module)]
        if not hits:
            example = next(iter(table), "none")
            raise ValueError(
                f"rules[{index}]: match {shown(rule.match)} matches no linear of this model; a name is like {example!r}"
            )
        table.update(dict.fromkeys(hits, rule.decisions))
    return table


def compress(table: Mapping[str, Decisions], structure: Structure) -> tuple[Rule, ...]:
    """Few rules that expand, over a dense default, to the table: what most blocks do first, then the exceptions with their numbers.

    Deterministic, and checked: the result is expanded again before it is returned.
    """
    places = _places(structure)
    blocks: dict[str, dict[int, Decisions]] = {}
    exact = []
    for site, layer in structure.layers():
        if layer.name in places:
            blocks.setdefault(places[layer.name], {})[site.block] = table[layer.name]
        elif table[layer.name] != (DENSE,):
            exact.append(Rule(layer.name, table[layer.name]))
    leaves: dict[tuple[bool, Decisions, tuple[int, ...]], list[str]] = {}
    for leaf, by_block in blocks.items():
        usual = Counter(by_block.values()).most_common(1)[0][0]
        if usual != (DENSE,):
            leaves.setdefault((False, usual, ()), []).append(leaf)
        for decisions in dict.fromkeys(by_block.values()):
            if decisions != usual:
                where = tuple(block for block, other in sorted(by_block.items()) if other == decisions)
                leaves.setdefault((True, decisions, where), []).append(leaf)
    ordered = sorted(leaves, key=lambda key: (key[0], _label(key[1]), key[2]))
    rules = (*exact, *(Rule(_pattern(structure, key[2], leaves[key]), key[1]) for key in ordered))
    assert expand(rules, (DENSE,), structure) == dict(table)
    return rules


def _places(structure: Structure) -> dict[str, str]:
    """Each module's place in its block as a glob, the same in every block; modules outside numbered blocks are absent.

    Numbers inside a block (experts) become `{0..}` where all that the glob then matches belongs to one site.
    """
    stem = _stem(structure)
    general: dict[str, str] = {}
    exact: dict[str, str] = {}
    owners: dict[tuple[int, str], set[str]] = {}
    for site, layer in structure.layers():
        prefix = f"{stem}.{site.block}."
        if layer.name.startswith(prefix):
            exact[layer.name] = layer.name.removeprefix(prefix)
            general[layer.name] = re.sub(r"(?<=\.)\d+(?=\.)", "{0..}", exact[layer.name])
            owners.setdefault((site.block, general[layer.name]), set()).add(site.name)
    shared = {pattern for (_, pattern), sites in owners.items() if len(sites) > 1}
    return {name: exact[name] if pattern in shared else pattern for name, pattern in general.items()}


def _stem(structure: Structure) -> str:
    return structure.blocks[0].rpartition(".")[0] if structure.blocks else ""


def _pattern(structure: Structure, where: tuple[int, ...], leaves: list[str]) -> str:
    number = numbers(where) if where else "*"
    parents: dict[str, list[str]] = {}
    for leaf in leaves:
        parent, dot, last = leaf.rpartition(".")
        parents.setdefault(parent + dot, []).append(last)
    leaf = either([parent + either(last) for parent, last in parents.items()])
    return f"{_stem(structure)}.{number}.{leaf}"
