"""`RunConfig`: one definition behind the flags, the TOML file and the saved run. Imports nothing heavy."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from methods.catalogue import method, model_method
from methods.errors import InputError
from methods.formats.format import parse_format
from methods.policy import Decision
from methods.typed import Range, WrongValue, read, shown, words
from profilers.cache_folder import cache_folder
from profilers.datasheets import DEVICE_TABLES
from profilers.duration import parse_duration
from profilers.workload import LENGTHS, Workload
from search.objectives import BYTES, TIMES, Objective, Objectives, parse_workloads
from search.places import check_places, moved_study
from spaces.runtimes import RUNTIMES
from spaces.space import parsed_method


class ConfigError(InputError):
    """A configuration that cannot be run; one line says which value and what to write instead."""


def _option(
    default: Any,
    help_text: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    allowed: Range | None = None,
) -> Any:
    meta = {"help": help_text, "metavar": metavar, "choices": choices, "allowed": allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=meta)
    return field(default=default, metadata=meta)


def default_cache() -> Path:
    """Where things are kept that can be made again, unless `--cache` says otherwise."""
    return cache_folder()


def device_folders(devices: str) -> tuple[Path, ...]:
    """Where tables of other machines are looked for: the folder given, then the project's own."""
    return (Path(devices).expanduser(), DEVICE_TABLES) if devices else (DEVICE_TABLES,)


SEQUENCES = Range(2, LENGTHS.high)
"""A loss needs a token to read and one to predict."""

TOKENS = Range(1, 2**33)
"""Of a text: one of so many would not fit into the memory of any machine; what fits into this one's is checked with the model."""

MOST_THREADS = 2**12
"""Of any machine, for a study may be of another one; those of this one are `profilers.cores.check_threads`."""


def check_range(flag: str, value: object, allowed: Range, kind: type[int] | type[float] = int) -> None:
    """Raises ConfigError, naming the flag, where a value is not of its kind or out of its range."""
    if not isinstance(value, int | kind) or isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{flag} {shown(value)}: use {words(kind)}{allowed.words}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. Defaults are the command line's."""

    model: str = _option(
        "default", "hub id, folder with safetensors, GGUF file or package:NAME; default: SmolLM2-135M-Instruct"
    )
    target: str = _option("cpu", "machine to search for; `search targets` lists them")
    latency: str = _option(
        "",
        "objective: median time of every stated workload, 30ms, 1.5s, 0.6x of the dense model's, or auto: one that binds on the machine",
        metavar="LATENCY",
    )
    ttft: str = _option("", "objective: median time to the first token (prefill), 200ms or 0.6x", metavar="LATENCY")
    tpot_p95: str = _option("", "objective: 95th percentile of the time per output token, 40ms", metavar="LATENCY")
    throughput: str = _option("", "objective: tokens decoded a second over the whole batch, 50tok/s", metavar="RATE")
    memory: str = _option("", "objective: weights and key/value cache of the largest workload, 1.5GiB", metavar="BYTES")
    size: str = _option("", "objective: stored bytes of the model, 100MB", metavar="BYTES")
    workload: str | tuple[str, ...] = _option(
        ["decode:batch=1,context=512"], "decode:batch=B,context=C or prefill:batch=B,prompt=P; may be repeated", metavar="W"
    )
    runtime: str = _option(
        "isolatency",
        "engine the result is for; restricts the formats to what it loads",
        choices=tuple(RUNTIMES),
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
        ["shipped"],
        "text: FILE, FOLDER, hf:NAME or shipped (prose, code and dialogue of the package), for all roles or ROLE=SOURCE; may be repeated; "
        "or generated: the model writes its own",
        metavar="SRC",
    )
    sequence: int = _option(512, "tokens of a sequence, at most as many as the model has positions", allowed=SEQUENCES)
    calibration_tokens: int = _option(
        8192, "tokens of calibration; at least 5 times the widest layer's inputs is safe", allowed=TOKENS
    )
    search_tokens: int = _option(4096, "tokens on which candidates are compared", allowed=TOKENS)
    validation_tokens: int = _option(
        4096, "tokens on which finalists are chosen, and as many again for the report", allowed=TOKENS
    )
    evaluations: int = _option(8, "true evaluations that the refinement may spend", allowed=Range(0, 10**6))
    budget: str = _option(
        "", "time that true evaluations may take, 10m, 90s or 2h, if it is used up before --evaluations", metavar="TIME"
    )
    tokens: int = _option(
        0,
        "tokens that true evaluations may read, if they are used up before --evaluations; 0: no limit",
        allowed=Range(0, 2**50),
    )
    finalists: int = _option(2, "policies that are recompressed in order, materialised and measured", allowed=Range(1, 1000))
    max_kl: float = _option(0.0, "quality floor in nats per token; 0: none", allowed=Range(0, 1000))
    tasks: tuple[str, ...] = _option(
        [], "lm-eval tasks for the answer and the dense model: names or YAML files", metavar="T,T,…"
    )
    limit: int = _option(0, "examples of each task; 0: all", allowed=Range(0, 10**9))
    trust_tasks: bool = _option(False, "let YAML files of --tasks run the Python functions that they name")
    devices: str = _option(
        "", "folder of latency tables from other machines; results/devices is always looked into", metavar="DIR"
    )
    allow_modelled: bool = _option(False, "let latencies of a target that nobody measured come from its datasheet, labelled so")
    threads: int = _option(
        0, "threads of the measured runtime, at most the machine's; 0: half of its cores", allowed=Range(0, MOST_THREADS)
    )
    seed: int = _option(0, "seed of everything random", allowed=Range(0, 2**31 - 1))
    study: str = _option("", "name of the study; default: from model, target, runtime and workload")
    results: str = _option("results", "folder of the studies")
    store: str = _option(
        "",
        "where evaluations are kept: a SQLite file or a database's URL such as postgresql+psycopg://HOST/NAME; default: study.db in the "
        "study's folder",
        metavar="URL",
    )
    cache: str = _option("", "folder of converted models, kernels and latency tables; default: ~/.cache/isolatency")
    export: tuple[str, ...] = _option([], "export the answer; for example compressed-tensors", metavar="FORMAT")

    def __post_init__(self) -> None:
        check_places({_flag(item.name): getattr(self, item.name) for item in dataclasses.fields(self)})
        for item in dataclasses.fields(self):
            if item.metadata["allowed"] is not None:
                kind = float if item.name == "max_kl" else int
                check_range(_flag(item.name), getattr(self, item.name), item.metadata["allowed"], kind)
        if self.runtime not in RUNTIMES:
            raise ConfigError(f"--runtime {self.runtime!r}: use one of {', '.join(RUNTIMES)}")
        if self.budget:
            _parsed(parse_duration, self.budget)
        if isinstance(self.workload, str):
            object.__setattr__(self, "workload", (self.workload,))
        if tuple(self.data) == ("generated",):  # one way to write it: studies from before there was a shipped text have none
            object.__setattr__(self, "data", ())
        _ = self.transform_decision, self.stated_workloads, self._asked
        self._check_names()

    def _check_names(self) -> None:
        """Raises ConfigError for formats and methods that nothing has ever heard of, before a model is loaded for them."""
        for name in self.formats:
            try:
                parse_format(name)
            except ValueError as error:
                raise ConfigError(f"--formats {name}: {error}") from None
        for name in self.methods:
            try:
                decision = parsed_method(name)
                method(decision.method).resolve({**dict(decision.knobs), "format": "bf16"})
            except ValueError as error:
                raise ConfigError(f"--methods {name}: {error}") from None

    @property
    def transform_decision(self) -> Decision | None:
        """What is decided for the model as a whole, or None; raises ConfigError where there is no such method or setting."""
        if self.transform == "none":
            return None
        try:
            decision = parsed_method(self.transform)
            whole = model_method(decision.method)
            whole.resolve(dict(decision.knobs))
        except ValueError as error:
            raise ConfigError(f"--transform {self.transform}: {error}") from None
        if not whole.rotates:
            raise ConfigError(f"--transform {self.transform}: changes no weight of the model; use quarot or spinquant")
        return decision

    @property
    def stated_workloads(self) -> tuple[Workload, ...]:
        """The workloads as they were written."""
        try:
            return parse_workloads(self.workload)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None

    @property
    def _asked(self) -> Objectives | None:
        try:
            return Objectives.of(
                {kind: getattr(self, kind.replace("-", "_")) for kind in (*TIMES, *BYTES)}, self.stated_workloads
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def objectives(self) -> Objectives:
        """Everything asked for; raises ConfigError where nothing was."""
        if self._asked is None:
            raise ConfigError("--latency is missing: write an objective such as --latency 30ms or --latency 0.6x")
        return self._asked

    @property
    def objective(self) -> Objective:
        """The main objective; raises ConfigError where none was given."""
        return self.objectives.main

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Every workload that latencies are of, the main objective's first."""
        asked = () if self._asked is None else self._asked.workloads
        return tuple(dict.fromkeys((*asked, *self.stated_workloads)))

    @property
    def load(self) -> Workload:
        """The main workload."""
        return self.workloads[0]

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
        parts = [model, self.target, *changed, *(workload.name for workload in self.stated_workloads)]
        return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.results).expanduser() / self.study_name


def _parsed(parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_LISTS = ("formats", "methods", "tasks", "export")
_REPEATED = ("data", "workload")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field; unset flags are absent from the namespace, so that a TOML file's values show through."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags; flags win", default=None)
    for item in dataclasses.fields(RunConfig):
        meta = item.metadata
        kind: Any = {"int": int, "float": float}.get(str(item.type), str)
        if str(item.type) == "bool":
            parser.add_argument(
                _flag(item.name), dest=item.name, action="store_true", default=argparse.SUPPRESS, help=meta["help"]
            )
            continue
        action = "append" if item.name in _REPEATED else "store"
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
    if getattr(arguments, "config", None) is not None:
        try:
            values.update(read_toml(Path(arguments.config)))
        except ConfigError as error:
            raise ConfigError(f"--config {error}") from None
        values.update(moved_study(Path(arguments.config), RunConfig(**values).folder))
    for item in dataclasses.fields(RunConfig):
        if hasattr(arguments, item.name):
            values[item.name] = getattr(arguments, item.name)
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = tuple(part for part in re.split(r",(?![^(]*\))", values[name]) if part)
    for name in _REPEATED:
        if name in values:
            values[name] = (values[name],) if isinstance(values[name], str) else tuple(values[name])
    return RunConfig(**values)


_RENAMED = {"storage": "store"}
"""Names in files of earlier versions."""


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; raises ConfigError for unknown names and wrong types."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path}: not TOML: {reason}") from None
    known = get_type_hints(RunConfig)
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = _RENAMED.get(name, name.replace("-", "_"))
        if key not in known:
            near = difflib.get_close_matches(key, known, 3) or sorted(known)[:6]
            raise ConfigError(f"{path}: unknown name {shown(name)}; names are those of the flags, such as {', '.join(near)}")
        typed = _typed(path, name, value, known[key])
        values[key] = (typed,) if key in _REPEATED and isinstance(typed, str) else typed
    return values


def _typed(path: Path, name: str, value: Any, kind: Any) -> Any:
    """A list may stand as one text, as flags do."""
    try:
        return read(kind | str if get_origin(kind) is tuple else kind, value, f"{path}: {name}")
    except WrongValue as error:
        raise ConfigError(str(error)) from None


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML; `read_toml` reads it back."""
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        text = "[" + ", ".join(_quoted(v) for v in value) + "]" if isinstance(value, tuple) else _scalar(value)
        lines.append(f"{item.name.replace('_', '-')} = {text}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
