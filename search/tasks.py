"""lm-eval tasks for an answer: names, or YAML files of the user's own, none of whose code runs unless it is trusted."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from methods.errors import InputError
from methods.model.tokenizer import checked_ids
from search.words import shortened

FUNCTION = "!function"
"""The tag by which a task file names a Python function, of a module beside it first."""

_SUFFIXES = (".yaml", ".yml")


class TaskError(InputError):
    """A task that lm-eval does not know, cannot load or cannot score, or that would run code that nobody trusted."""


@dataclass(frozen=True)
class TaskFile:
    """A task or group file as it lies there: parsed, and nothing that it names imported.

    root: its mapping; include: the files that it takes keys from, which its own override.
    """

    path: Path
    text: str
    root: yaml.MappingNode
    include: tuple[TaskFile, ...]

    @classmethod
    def read(cls, path: Path, above: tuple[Path, ...] = ()) -> TaskFile:
        """Raises TaskError where it, or a file that it includes, is not there, no YAML mapping, or includes itself."""
        if path.resolve() in above:
            raise TaskError(f"--tasks {above[0]}: {path} includes itself")
        try:
            text = path.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except FileNotFoundError:
            raise TaskError(f"--tasks {above[0] if above else path}: no such file: {path}") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TaskError(f"--tasks {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(root, yaml.MappingNode):
            raise TaskError(f"--tasks {path}: not a YAML mapping; a task file has keys such as task and dataset_path")
        names = [path.parent / name for name in _scalars(_values(root).get("include"))]
        return cls(path, text, root, tuple(cls.read(name, (*above, path.resolve())) for name in names))

    @cached_property
    def nodes(self) -> dict[str, yaml.Node]:
        """Its keys and those that it includes."""
        found: dict[str, yaml.Node] = {}
        for file in self.include:
            found |= file.nodes
        found.pop("include", None)
        return found | _values(self.root)

    @property
    def name(self) -> str:
        """Of the group or the task, as it is written: `no` and `1e3` are names. Raises TaskError where there is none."""
        for key in ("group", "task"):
            node = self.nodes.get(key)
            if isinstance(node, yaml.ScalarNode) and node.value:
                return str(node.value)
        raise TaskError(f"--tasks {self.path}: no `task:` names the task")

    @property
    def group(self) -> bool:
        """Whether it puts others together."""
        return "group" in self.nodes

    @property
    def names(self) -> set[str]:
        """By which others can mean it: its name and its tags."""
        return {self.name, *_scalars(self.nodes.get("tag"))}

    @property
    def members(self) -> list[str]:
        """The tasks, groups and tags that a group consists of; none of a task."""
        node = self.nodes.get("task")
        return list(_members(node)) if self.group and isinstance(node, yaml.SequenceNode) else []

    @property
    def texts(self) -> tuple[str, ...]:
        """Of everything that it is made of."""
        return (self.text, *(text for file in self.include for text in file.texts))

    @property
    def code(self) -> str | None:
        """What of it would run code, in words, or None."""
        for node in _below(self.root, set()):
            if node.tag == FUNCTION:
                return f"{self.path} names the Python function {getattr(node, 'value', '')}"
        if any(_true(node) for node in _keyed(self.root, "hf_evaluate", set())):
            return f"{self.path} has metrics that bring their own code (hf_evaluate)"
        if "pandas" in _scalars(_values(self.root).get("dataset_path")):
            return f"{self.path} reads pickles (dataset_path: pandas)"
        return next((file.code for file in self.include if file.code), None)

    def values(self) -> dict[str, Any]:
        """What lm-eval takes in place of a task's file: functions imported, the name a text whatever YAML reads it as."""
        merged: dict[str, Any] = {}
        for file in self.include:
            merged |= {key: value for key, value in file.values().items() if key != "task_list"}
        loader = _loader(self.path.parent)(self.text)
        try:
            own = loader.get_single_data()
        finally:
            loader.dispose()
        merged |= {key: value for key, value in own.items() if key != "include"}
        return {**merged, "task": self.name}


def _values(root: yaml.MappingNode) -> dict[str, yaml.Node]:
    return {str(key.value): value for key, value in root.value if isinstance(key, yaml.ScalarNode)}


def _scalars(node: yaml.Node | None) -> list[str]:
    """A text or a list of texts."""
    if isinstance(node, yaml.ScalarNode):
        return [str(node.value)]
    return [str(item.value) for item in node.value if isinstance(item, yaml.ScalarNode)] if node is not None else []


def _members(node: yaml.SequenceNode) -> Iterator[str]:
    for item in node.value:
        inside = list(_values(item).items()) if isinstance(item, yaml.MappingNode) else []
        yield from _scalars(item) if not inside else ()
        for key, value in inside:
            if key in ("task", "group"):
                yield from _members(value) if isinstance(value, yaml.SequenceNode) else _scalars(value)


def _below(node: yaml.Node, seen: set[int]) -> Iterator[yaml.Node]:
    """The node and all below it, each once: aliases may close a circle."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for child in item if isinstance(item, tuple) else (item,):
                yield from _below(child, seen)


def _keyed(root: yaml.Node, key: str, seen: set[int]) -> Iterator[yaml.Node]:
    for node in _below(root, seen):
        if isinstance(node, yaml.MappingNode) and key in _values(node):
            yield _values(node)[key]


def _true(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value.lower() in ("true", "yes", "on", "y")


def _loader(folder: Path) -> type[yaml.SafeLoader]:
    """Plain values, and functions of modules in the folder or of installed ones."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor(FUNCTION, lambda loader, node: _function(str(node.value), folder))
    return Loader


def _function(name: str, folder: Path) -> Any:
    module, _, function = name.rpartition(".")
    path = folder / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return getattr(importlib.import_module(module), function)
    spec = importlib.util.spec_from_file_location(str(path.with_suffix("")), path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found, and whose code, if they have any, is trusted.

    names: those that lm-eval knows itself; files: of the user; folders: where groups look for their members; texts: what the scores
    depend on; own: whether nothing but the files is needed, none of lm-eval's own.
    """

    names: tuple[str, ...]
    files: tuple[TaskFile, ...]
    folders: tuple[str, ...]
    texts: tuple[str, ...]
    own: bool


def find_tasks(tasks: Sequence[str], trust: bool = False) -> Tasks:
    """Tasks that lm-eval knows or that YAML files define, among them names of files in the folder of another; imports no code.

    Raises TaskError with the files that are not there or unreadable, and with one that would run code, unless `trust`.
    """
    files = [TaskFile.read(Path(task).expanduser()) for task in tasks if task.endswith(_SUFFIXES)]
    names = [task for task in tasks if not task.endswith(_SUFFIXES)]
    folders = sorted({file.path.parent for file in files})
    beside = [file for folder in folders for file in _beside(folder)] if names or any(file.group for file in files) else []
    files += [file for name in names if (file := next((f for f in beside if f.name == name), None)) is not None]
    used = _reachable(files, beside)
    for file in used:
        if file.code and not trust:
            raise TaskError(f"--tasks: {file.code}, which would run here; read it, and add --trust-tasks if you trust it")
    given = {file.name for file in files}
    known = tuple(name for name in names if name not in given)
    beside_names = {name for file in used for name in file.names}
    return Tasks(
        known,
        tuple(files),
        tuple(sorted({str(file.path.parent.resolve()) for file in used if file.group})),
        (*names, *(text for file in used for text in file.texts)),
        not known and all(name in beside_names for file in used for name in file.members),
    )


def _beside(folder: Path) -> list[TaskFile]:
    """The readable task files of a folder and those below, as lm-eval looks for them."""
    found = []
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            file = TaskFile.read(path)
            _ = file.name
        except TaskError:
            continue
        found.append(file)
    return found


def _reachable(files: Sequence[TaskFile], beside: Sequence[TaskFile]) -> list[TaskFile]:
    """The files, and those that their groups mean."""
    found, wanted = list(files), [name for file in files for name in file.members]
    while wanted:
        name = wanted.pop()
        for file in beside:
            if name in file.names and all(file.path.resolve() != known.path.resolve() for known in found):
                found.append(file)
                wanted += file.members
    return found


def load_tasks(tasks: Tasks) -> None:
    """Loads the tasks with their data sets, which are then at hand; raises TaskError where they cannot be loaded, or not be scored here."""
    specs, manager = _specs(tasks)
    with _errors("cannot be loaded"), _sandbox():
        found = manager.load(specs)["tasks"]
    for what, why in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "needs more than text")):
        own = [name for name, task in found.items() if getattr(task, what, False)]
        if own:
            raise TaskError(f"--tasks: {shortened(own)} {why}, which is not done here; leave it out")


def _specs(tasks: Tasks) -> tuple[list[Any], Any]:
    """What lm-eval's manager loads, and the manager."""
    manager = _manager(tasks.folders, not tasks.own)
    unknown = [name for name in tasks.names if name not in manager.all_tasks]
    if unknown:
        raise TaskError(
            f"--tasks: lm-eval does not know {shortened(unknown)}; `lm-eval ls tasks` lists them, or give a YAML file"
        )
    with _errors("cannot be loaded"):
        # A group goes by its name: lm-eval hands what a dictionary says of it down to its members, their names too.
        return [*tasks.names, *(file.name if file.group else file.values() for file in tasks.files)], manager


@functools.cache
def _manager(folders: tuple[str, ...], known: bool) -> Any:
    """lm-eval's manager of the tasks in folders and, where `known`, of its own: it reads thousands of files for those."""
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=list(folders) or None, include_defaults=known)
    except TypeError:  # it sorts the names of all files in the folders
        raise TaskError(
            f"--tasks: in {', '.join(folders)} is a file whose task: is a number or a truth value to YAML; write it in quotes"
        ) from None


def score_tasks(model: nn.Module, tokenizer: Any, tasks: Tasks, limit: int) -> dict[str, dict[str, float]]:
    """Scores of tasks, on the first `limit` examples of each, 0 for all.

    Returns task -> metric -> value, standard errors as `metric_stderr`. Raises TaskError where they cannot be loaded or scored.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    specs, manager = _specs(tasks)
    with _errors("cannot be scored"), _sandbox(), checked_ids(model, tokenizer, "--tasks: their text"):
        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
        result = simple_evaluate(model=adapter, tasks=specs, limit=limit or None, task_manager=manager, log_samples=False)
    return {
        name: {
            metric.split(",")[0]: float(value)
            for metric, value in scores.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and metric != "sample_len"
        }
        for name, scores in result["results"].items()
    }


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Whatever lm-eval, its data sets or a task's own code raise, as a TaskError of one line."""
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise TaskError(f"--tasks: {what}: {type(error).__name__}: {lines[0] if lines else 'no message'}") from error


@contextmanager
def _sandbox() -> Iterator[None]:
    """Templates of tasks see their documents, and no way from there into Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    free = utils.env
    caged = SandboxedEnvironment(loader=free.loader, undefined=free.undefined, keep_trailing_newline=free.keep_trailing_newline)
    caged.filters.update(free.filters)
    utils.env = caged
    try:
        yield
    finally:
        utils.env = free
