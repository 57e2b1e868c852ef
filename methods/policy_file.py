"""The policy file `llm-compression-policy/1`: what was decided for a model, why, and what was measured. Imports no torch.

    schema: llm-compression-policy/1
    transform: ['quarot:seed=0']  # what is done to the model as a whole, before anything else; most files have none
    default: {method: none}
    rules:            # the whole module name matches a glob (`methods.globs`), the LAST match wins
      - {match: 'model.layers.*.mlp.{up,down}_proj', method: int, bits: 4, group: 64, sym: true, act: 16, algo: {name: gptq}}
    measured:         # every number says how it was obtained
      - {metric: latency_ms, value: 17.9, source: measured, n: 200}

Fields of a rule: `method` none, float (with `dtype`), int (with the fields that follow) or grid (any other kind, with its name, e.g.
`format: nvfp4a16`, or without one the method's own); `bits`; `group` (-1: one scale a channel); `sym`; `act` 16, 8, 6 or 4;
`act_group` token or group; `algo`, the methods in order (a name, `{name: …, knob: value}`, or a list; without it
`weights_algo.name`); `note`.
`expanded_digest` is that of the table which the rules expand to, so that it does not depend on how they are written.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from methods import atomic, catalogue
from methods.model.structure import Structure
from methods.policy import Decision, Policy
from methods.policy_rules import (
    DEFAULT_ALGO,
    SPEC_FIELDS,
    Rule,
    compress,
    decisions_of,
    digest_of,
    expand,
    sites_of,
    spec_of,
    table_of,
)
from methods.policy_text import Plain, dump, load, plain

SCHEMA = "llm-compression-policy/1"
SOURCES = ("measured", "interpolated", "transferred", "modelled", "proxy", "predicted")
"""How a number of `measured` was obtained; a detail may follow after a colon."""
_FIELDS = (
    "schema",
    "id",
    "model",
    "transform",
    "default",
    "rules",
    "weights_algo",
    "target",
    "measured",
    "provenance",
    "expanded_digest",
)


@dataclass(frozen=True)
class PolicyFile:
    """A policy and what is known of it; equal contents are equal values, `policy` in its canonical form.

    model: `id`, `revision` …; target: `device`, `engine`, `batch` …; measured: mappings with `metric`, `value` and `source`
    (see `SOURCES`); weights_algo: `seed`, `calib`, and in hand-written files the `name` that rules without `algo` take; provenance: free.
    Raises ValueError for values that the file cannot hold.
    """

    policy: Policy
    id: str = ""
    model: Mapping[str, Plain] = field(default_factory=dict)
    target: Mapping[str, Plain] = field(default_factory=dict)
    measured: Sequence[Mapping[str, Plain]] = ()
    weights_algo: Mapping[str, Plain] = field(default_factory=dict)
    provenance: Mapping[str, Plain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy.from_canonical(self.policy.canonical()))
        for name in ("model", "target", "weights_algo", "provenance"):
            value = plain(getattr(self, name), name)
            if not isinstance(value, dict):
                raise ValueError(f"{name}: {value!r} is not a mapping")
            object.__setattr__(self, name, value)
        if {"arch", "n_modules"} & set(self.model):
            raise ValueError("model: arch and n_modules are written from the model's structure; leave them out")
        if not isinstance(self.measured, list | tuple):
            raise ValueError(f"measured: {self.measured!r} is not a list")
        numbers = tuple(_number(entry, f"measured[{index}]") for index, entry in enumerate(self.measured))
        object.__setattr__(self, "measured", numbers)


def _number(entry: object, where: str) -> dict[str, Plain]:
    value = plain(entry, where)
    if not isinstance(value, dict) or not {"metric", "value", "source"} <= set(value):
        raise ValueError(f"{where}: {value!r} needs metric, value and source")
    if isinstance(value["value"], bool) or not isinstance(value["value"], int | float):
        raise ValueError(f"{where}: value={value['value']!r} is not a number")
    if str(value["source"]).split(":")[0] not in SOURCES:
        raise ValueError(f"{where}: source={value['source']!r}; use one of {SOURCES}")
    return value


def expanded_digest(policy: Policy, structure: Structure) -> str:
    """`sha256:…` of what the policy does to every linear of the model; raises KeyError for a site that the model has not."""
    return _digest(table_of(policy, structure), policy.model)


def _digest(table: Mapping[str, tuple[Decision, ...]], transforms: Sequence[Decision]) -> str:
    """The table's digest, and with decisions of the whole model one over both."""
    if not transforms:
        return digest_of(table)
    text = "\n".join([digest_of(table), *(decision.label for decision in transforms)])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def render(file: PolicyFile, structure: Structure) -> str:
    """The text of a policy file; `parse` reads an equal value back.

    Raises ValueError for a policy that this model cannot have (see `parse`).
    """
    _check(file.policy, structure)
    table = table_of(file.policy, structure)
    rules: list[Plain] = [_fields(rule) for rule in compress(table, structure)]
    document: dict[str, Plain] = {"schema": SCHEMA}
    if file.id:
        document["id"] = file.id
    document["model"] = {**file.model, "arch": structure.architecture, "n_modules": len(table)}
    if file.policy.model:
        document["transform"] = [decision.label for decision in file.policy.model]
    document |= {"default": {"method": "none"}, "rules": rules}
    extra = {"weights_algo": file.weights_algo, "target": file.target, "measured": file.measured, "provenance": file.provenance}
    document |= {name: plain(value, name) for name, value in extra.items() if value}
    document["expanded_digest"] = _digest(table, file.policy.model)
    return dump(document)


def _fields(rule: Rule) -> Plain:
    spec = spec_of(rule.decisions)
    if "algo" in spec:
        items = [item["name"] if len(item) == 1 else item for item in spec["algo"]]  # type: ignore[attr-defined]
        spec["algo"] = items[0] if len(items) == 1 else items
    note = {"note": rule.note} if rule.note else {}
    return plain({"match": rule.match, **spec, **note}, "rules")


def parse(text: str, structure: Structure) -> PolicyFile:
    """The policy of a file's text, expanded to the sites of the model.

    Raises ValueError for another schema, an unknown field, a rule that matches nothing or has a wrong value, layers of a site that
    disagree, a decision that cannot stand at its site, and a model or digest that is not the one written.
    """
    document = load(text)
    if not isinstance(document, dict):
        raise ValueError(f"not a policy file: it holds {document!r} instead of fields like schema and rules")
    _check_schema(document.get("schema"))
    _known(document, _FIELDS, "policy file")
    weights_algo = _mapping(document, "weights_algo")
    algo = weights_algo.get("name", DEFAULT_ALGO)
    default = _rule({"match": "**", **_mapping(document, "default", {"method": "none"})}, "default", algo)
    items = document.get("rules", [])
    if not isinstance(items, list):
        raise ValueError(f"rules: {items!r} is not a list")
    rules = [_rule(item, f"rules[{index}]", algo) for index, item in enumerate(items)]
    table = expand(rules, default.decisions, structure)
    model = _same_model(_mapping(document, "model"), structure)
    policy = Policy(sites_of(table, structure), _transforms(document.get("transform", [])))
    _check(policy, structure)
    _same_digest(document.get("expanded_digest"), _digest(table, policy.model))
    return PolicyFile(
        policy,
        id=_text(document.get("id", ""), "id"),
        model=model,
        target=_mapping(document, "target"),
        measured=document.get("measured", []),  # type: ignore[arg-type]  # checked by PolicyFile
        weights_algo=weights_algo,
        provenance=_mapping(document, "provenance"),
    )


def write(path: Path, file: PolicyFile, structure: Structure) -> None:
    """Writes `render(file, structure)` in one step; see `render` for what it refuses."""
    atomic.write_text(path, render(file, structure))


def read(path: Path, structure: Structure) -> PolicyFile:
    """`parse` of a file; every error names the file."""
    try:
        return parse(path.read_text(encoding="utf-8"), structure)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check(policy: Policy, structure: Structure) -> None:
    """Raises ValueError with the catalogue's reason where a decision cannot stand at its site, or is none of the whole model's."""
    for decision in policy.model:
        catalogue.model_method(decision.method).resolve(dict(decision.knobs))
    for name, decisions in policy.sites.items():
        site = structure.site(name)
        for decision in decisions:
            reason = catalogue.refuses(site, decision)
            if reason:
                raise ValueError(f"{name}: {decision.label}: {reason}")


def _check_schema(schema: object) -> None:
    name, _, version = str(schema).partition("/")
    if name != SCHEMA.split("/")[0]:
        raise ValueError(f"schema={schema!r}; a policy file begins with schema: {SCHEMA}")
    if version.split(".")[0] != SCHEMA.split("/")[1]:
        raise ValueError(f"schema={schema!r}; this version reads {SCHEMA} only")


def _rule(item: object, where: str, algo: Plain) -> Rule:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: {item!r} is not a mapping of fields")
    _known(item, ("match", *SPEC_FIELDS, "note"), where)
    match, note = _text(item.get("match"), f"{where}.match"), _text(item.get("note", ""), f"{where}.note")
    spec = {name: value for name, value in item.items() if name in SPEC_FIELDS}
    try:
        return Rule(match, decisions_of(spec, _text(algo, "weights_algo.name")), note)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _known(fields: Mapping[str, object], allowed: Sequence[str], where: str) -> None:
    for name in fields:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(allowed)}"
            raise ValueError(f"{where}: unknown field {name!r}; {hint}")


def _mapping(document: Mapping[str, Plain], name: str, default: Mapping[str, Plain] | None = None) -> dict[str, Plain]:
    value = document.get(name, dict(default or {}))
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} is not a mapping of fields")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {value!r} is not text; quote it")
    return value


def _same_model(model: dict[str, Plain], structure: Structure) -> dict[str, Plain]:
    """The model's fields without those that describe its structure, which have to agree."""
    n_modules = sum(1 for _ in structure.layers())
    for name, value in (("arch", structure.architecture), ("n_modules", n_modules)):
        if model.get(name, value) != value:
            raise ValueError(
                f"written for a model with {name}={model[name]!r}, but this one has {value!r}; pass the model it names"
            )
    return {name: value for name, value in model.items() if name not in ("arch", "n_modules")}


def _transforms(items: Plain) -> tuple[Decision, ...]:
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"transform: {items!r} is not a list of METHOD or 'METHOD:knob=value,knob=value'")
    return tuple(Decision.parse(str(item)) for item in items)


def _same_digest(written: Plain, found: str) -> None:
    if written not in (None, found):
        raise ValueError(
            f"expanded_digest is {written}, but the rules expand to {found}: they were edited or it is another model; "
            "remove the expanded_digest line to accept them"
        )
