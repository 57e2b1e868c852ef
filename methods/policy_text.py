"""The YAML of policy files: a strict subset that reads back what it wrote, and one line a rule. Imports no torch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

Plain = bool | int | float | str | None | list["Plain"] | dict[str, "Plain"]
"""What a policy file holds."""

_NUMBERS = {
    "tag:yaml.org,2002:bool": (r"true|false", "tf"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)|\.nan",
        "-+0123456789.",
    ),
}
"""YAML 1.2's core types: in 1.1, `1e-5` is text, `12:30` the number 750 and `no` false."""


def plain(value: object, where: str) -> Plain:
    """The value as lists and dicts of plain values; raises ValueError at anything else, NaN and infinity included."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is not text; quote it")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a number that can be compared; leave the entry out")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: {value!r} is a {type(value).__name__}; use text, numbers, true, false, lists and mappings")


def dump(document: Mapping[str, Plain]) -> str:
    """The document as YAML, keys in their order; an item of a top-level list takes one line."""
    import yaml

    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            lines.append(f"{key}:")
            flow = [
                yaml.dump(item, Dumper=_dialect()[1], default_flow_style=True, sort_keys=False, width=2**20) for item in value
            ]
            lines.extend(f"  - {text.removesuffix('...' + chr(10)).strip()}" for text in flow)
        else:
            style = None if isinstance(value, dict) else False
            text = yaml.dump({key: value}, Dumper=_dialect()[1], default_flow_style=style, sort_keys=False, width=2**20)
            lines.append(text.rstrip())
    return "\n".join(lines) + "\n"


def load(text: str) -> Plain:
    """Inverse of `dump`, for what people write too; raises ValueError in one line for bad YAML, repeated keys and aliases."""
    import yaml

    try:
        document = yaml.load(text, Loader=_dialect()[0])
    except RecursionError:
        raise ValueError("not YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML{line}: {getattr(error, 'problem', None) or error}") from None
    return plain(document, "document")


def _unused_tag(event: Any) -> str:
    """Which explicit tag an event has: each is one more way to write a value, and some of them end in a crash of the parser."""
    tag = getattr(event, "tag", None)
    return "" if tag in (None, "!") else f"the tag {tag} is"


@functools.cache
def _dialect() -> tuple[Any, Any]:
    """Loader and dumper with `_NUMBERS`; built at the first use, so that importing this module needs no PyYAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            unused = "aliases are" if isinstance(event, yaml.AliasEvent) else _unused_tag(event)
            if unused:
                raise yaml.MarkedYAMLError(problem=f"{unused} not used here", problem_mark=event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem="a name is a list or mapping", problem_mark=key_node.start_mark)
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key_node.value!r} is given twice", problem_mark=key_node.start_mark)
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    null = "tag:yaml.org,2002:null"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag == null]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, (pattern, first) in _NUMBERS.items():
        for dialect in (Loader, Dumper):
            dialect.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), list(first))
    Loader.add_constructor(
        "tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
    )
    return Loader, Dumper
