"""`RunConfig`: one definition behind the flags, the TOML file and the saved run. Imports nothing heavy."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from methods.catalogue import model_method
from methods.policy import Decision
from profilers.workload import Workload, parse_workload


class ConfigError(ValueError):
    """A configuration that cannot be run; one line says which value and what to write instead."""


@dataclass(frozen=True)
class Objective:
    """A latency to meet: milliseconds, or a share of the dense model's latency measured in the same interleaved run."""

    value: float
    relative: bool

    @property
    def text(self) -> str:
        """`30ms` or `0.6x`."""
        return f"{self.value:g}x" if self.relative else f"{self.value:g}ms"

    def resolve(self, dense_ms: float) -> float:
        """The objective in milliseconds, given the dense model's latency."""
        return self.value * dense_ms if self.relative else self.value


def parse_objective(text: str) -> Objective:
    """`30ms`, `1.5s`, `800us` or `0.6x`; raises ConfigError without a unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(us|ms|s|x)?\s*", text)
    if not match:
        raise ConfigError(f"--latency {text!r}: not a latency; write 30ms, 1.5s or 0.6x (of the dense model's latency)")
    if match[2] is None:
        raise ConfigError(f"--latency {text!r} has no unit; write {match[1]}ms, {match[1]}s or a share of dense such as 0.6x")
    value = float(match[1])
    if value <= 0:
        raise ConfigError(f"--latency {text!r}: must be above zero")
    return Objective(value * {"us": 1e-3, "ms": 1.0, "s": 1e3, "x": 1.0}[match[2]], relative=match[2] == "x")


def _option(default: Any, help_text: str, *, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    meta = {"help": help_text, "metavar": metavar, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=meta)
    return field(default=default, metadata=meta)


def default_cache() -> Path:
    """`$ISOLATENCY_CACHE`, else `$XDG_CACHE_HOME/isolatency`, else `~/.cache/isolatency`."""
    explicit = os.environ.get("ISOLATENCY_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "isolatency"


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. Defaults are the command line's."""

    model: str = _option(
        "default", "hub id, folder with safetensors, GGUF file or package:NAME; default: SmolLM2-135M-Instruct"
    )
    target: str = _option("cpu", "machine to search for; `search targets` lists them")
    latency: str = _option("", "objective: 30ms, 1.5s, or 0.6x of the dense model's latency", metavar="LATENCY")
    workload: str = _option("decode:batch=1,context=512", "decode:batch=B,context=C or prefill:batch=B,prompt=P")
    runtime: Literal["isolatency", "vllm"] = _option(
        "isolatency", "engine the result is for; restricts the formats to what it loads", choices=("isolatency", "vllm")
    )
    formats: tuple[str, ...] = _option([], "number formats, comma separated; default: what the runtime runs", metavar="F,F,…")
    methods: tuple[str, ...] = _option(
        ["gptq:fitter=mse"],
        "quantizing methods, comma separated, each NAME or NAME:KNOB=VALUE:…; `search methods`",
        metavar="M,M,…",
    )
    transform: str = _option(
        "none",
        "method of the whole model before anything at its sites: none, quarot or spinquant, with :KNOB=VALUE:…",
        metavar="M",
    )
    data: tuple[str, ...] = _option(
        [], "text: FILE, FOLDER or hf:NAME, for all roles or ROLE=SOURCE; may be repeated", metavar="SRC"
    )
    sequence: int = _option(512, "tokens of a sequence")
    calibration_tokens: int = _option(8192, "tokens of calibration; at least 5 times the widest layer's inputs is safe")
    search_tokens: int = _option(4096, "tokens on which candidates are compared")
    validation_tokens: int = _option(4096, "tokens on which finalists are chosen, and as many again for the report")
    evaluations: int = _option(8, "true evaluations that the refinement may spend")
    finalists: int = _option(2, "policies that are recompressed in order, materialised and measured")
    max_kl: float = _option(0.0, "quality floor in nats per token; 0: none")
    tasks: tuple[str, ...] = _option(
        [], "lm-eval tasks for the answer and the dense model: names or YAML files", metavar="T,T,…"
    )
    limit: int = _option(0, "examples of each task; 0: all")
    threads: int = _option(0, "threads of the measured runtime; 0: half of the machine's cores")
    seed: int = _option(0, "seed of everything random")
    study: str = _option("", "name of the study; default: from model, target, runtime and workload")
    results: str = _option("results", "folder of the studies")
    storage: str = _option("", "Optuna storage URL; default: SQLite in the study's folder")
    cache: str = _option("", "folder of converted models, kernels and latency tables; default: ~/.cache/isolatency")
    export: tuple[str, ...] = _option([], "export the answer; for example compressed-tensors", metavar="FORMAT")

    def __post_init__(self) -> None:
        for name in ("sequence", "calibration_tokens", "search_tokens", "validation_tokens", "finalists"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: must be at least 1")
        for name in ("evaluations", "limit", "threads", "max_kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: must not be negative")
        if self.runtime not in ("isolatency", "vllm"):
            raise ConfigError(f"--runtime {self.runtime!r}: use isolatency or vllm")
        if self.latency:
            parse_objective(self.latency)
        _ = self.transform_decision
        try:
            parse_workload(self.workload)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None

    @property
    def transform_decision(self) -> Decision | None:
        """What is decided for the model as a whole, or None; raises ConfigError where there is no such method or setting."""
        if self.transform == "none":
            return None
        try:
            decision = Decision.parse(self.transform.replace(":", ",").replace(",", ":", 1))
            method = model_method(decision.method)
            method.resolve(dict(decision.knobs))
        except ValueError as error:
            raise ConfigError(f"--transform {self.transform}: {error}") from None
        if not method.rotates:
            raise ConfigError(f"--transform {self.transform}: changes no weight of the model; use quarot or spinquant")
        return decision

    @property
    def objective(self) -> Objective:
        """The parsed objective; raises ConfigError where none was given."""
        if not self.latency:
            raise ConfigError("--latency is missing: write an objective such as --latency 30ms or --latency 0.6x")
        return parse_objective(self.latency)

    @property
    def load(self) -> Workload:
        """The parsed workload."""
        return parse_workload(self.workload)

    @property
    def cache_folder(self) -> Path:
        """Where converted models, kernels and tables are kept."""
        return Path(self.cache).expanduser() if self.cache else default_cache()

    @property
    def study_name(self) -> str:
        """The given name, or one made of model, target, runtime and workload."""
        if self.study:
            return self.study
        model = "smollm2-135m-instruct" if self.model == "default" else Path(self.model).name
        changed = [name for name, plain in ((self.transform, "none"), (self.runtime, "isolatency")) if name != plain]
        parts = [model, self.target, *changed, self.load.name]
        return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.results) / self.study_name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_LISTS = ("formats", "methods", "tasks", "export")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field; unset flags are absent from the namespace, so that a TOML file's values show through."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags; flags win", default=None)
    for item in dataclasses.fields(RunConfig):
        meta = item.metadata
        kind: Any = {"int": int, "float": float}.get(str(item.type), str)
        action = "append" if item.name == "data" else "store"
        default = item.default if item.default is not dataclasses.MISSING else None
        shown = "" if default in (None, "", 0, 0.0) else f" [{default}]"
        text = meta["help"].replace("%", "%%") + shown
        parser.add_argument(
            _flag(item.name),
            dest=item.name,
            action=action,
            default=argparse.SUPPRESS,
            help=text,
            metavar=meta["metavar"] or (None if meta["choices"] else {"int": "N", "float": "X"}.get(str(item.type), "TEXT")),
            **({"choices": meta["choices"]} if meta["choices"] else {}),
            **({"type": kind} if kind is not str else {}),
        )


def from_arguments(arguments: argparse.Namespace) -> RunConfig:
    """Defaults, then the TOML file, then the flags."""
    values: dict[str, Any] = {}
    if getattr(arguments, "config", None):
        values.update(read_toml(Path(arguments.config)))
    for item in dataclasses.fields(RunConfig):
        if hasattr(arguments, item.name):
            values[item.name] = getattr(arguments, item.name)
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = tuple(part for part in re.split(r",(?![^(]*\))", values[name]) if part)
    if "data" in values:
        values["data"] = (values["data"],) if isinstance(values["data"], str) else tuple(values["data"])
    return RunConfig(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; raises ConfigError for unknown names and wrong types."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path}: not TOML: {error}") from None
    known = {item.name: item for item in dataclasses.fields(RunConfig)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = name.replace("-", "_")
        if key not in known:
            raise ConfigError(f"--config {path}: unknown name {name!r}; known: {', '.join(sorted(known))}")
        values[key] = _typed(path, name, value, str(known[key].type))
    return values


def _typed(path: Path, name: str, value: Any, annotation: str) -> Any:
    if annotation.startswith("tuple"):
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif annotation == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif annotation == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif annotation not in ("int", "float") and isinstance(value, str):
        return value
    raise ConfigError(f"--config {path}: {name} = {value!r} is not {annotation}")


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML; `read_toml` reads it back."""
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        text = "[" + ", ".join(_quoted(v) for v in value) + "]" if isinstance(value, tuple) else _scalar(value)
        lines.append(f"{item.name.replace('_', '-')} = {text}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
