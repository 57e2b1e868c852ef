"""A run's session as far as its model's configuration tells it, before a weight is read: for plans, and for early refusals."""

from __future__ import annotations

from pathlib import Path

from methods.model.load import LoadedModel
from methods.model.outline import outline
from search.config import RunConfig
from search.progress import Progress
from search.session import Session
from search.writable import check_exports
from spaces.runtimes import default_formats, runtime
from spaces.space import build


def foreseen(config: RunConfig, progress: Progress, *, fetch: bool = False) -> Session | None:
    """A session whose model has no weights and no tokenizer: structure, space and targets are those of the run.

    None where the configuration does not tell the structure. Raises as `methods.model.load.load` does for what it refuses by that alone.
    fetch: whether the hub is asked for a configuration that is not cached.
    """
    spec = None if config.model == "default" else config.model
    found = outline(spec, config.cache_folder, fetch=fetch)
    if found is None:
        return None
    label = "the default model" if config.model == "default" else Path(config.model).name
    session = Session(config, progress)
    session.stored = session.loaded = LoadedModel(found.model, None, found.structure, config.model, label, digest="")
    return session


def refuse_early(config: RunConfig) -> None:
    """Raises for a model, or a runtime or export of it, that is refused without a weight: before minutes of fetching and converting."""
    session = foreseen(config, Progress(quiet=True), fetch=True)
    if session is not None:
        formats = config.formats or default_formats(config.runtime, [load.phase for load in config.workloads])
        space = build(session.loaded.structure, formats, config.methods, runtime(config.runtime), lambda *_: None)
        check_exports(config, session.loaded, space)
