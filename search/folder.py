"""A study's folder: what the study is about, who holds it, and the key of what was prepared for it."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import catalogue
from methods.atomic import remove_abandoned, write_text
from methods.locks import try_lock
from search.config import ConfigError, RunConfig, device_folders, read_toml, to_toml
from search.files import Steps, check_place, content_key
from search.places import LOCK
from search.prepared import Prepared

if TYPE_CHECKING:
    from search.session import Session
    from search.study import Store

_VERSION = 1

_IDENTITY = (
    "model",
    "transform",
    "target",
    "runtime",
    "workload",
    "data",
    "sequence",
    "calibration_tokens",
    "search_tokens",
    "threads",
    "seed",
)
"""What a study is about: numbers under other values cannot be compared."""

_NOT_PREPARED = (
    "latency",
    "ttft",
    "tpot_p95",
    "throughput",
    "memory",
    "size",
    "devices",
    "evaluations",
    "budget",
    "tokens",
    "finalists",
    "max_kl",
    "tasks",
    "limit",
    "trust_tasks",
    "study",
    "results",
    "store",
    "cache",
    "export",
)


class Busy(ConfigError):
    """Another process runs the study; says which."""


@contextmanager
def open_study(config: RunConfig) -> Iterator[Path]:
    """The study's folder with its resolved configuration, held against other runs until the block ends.

    What killed runs left unfinished in it is removed, and a new folder where an error ends the block before anything else lies in it.
    Raises ConfigError where the path is something else or the study is about something else, `Busy` where another run holds it.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --study or --results")
    if folder.is_dir() and not (folder / "config.toml").exists() and any(_visible(folder)):
        raise ConfigError(f"{folder} holds something that is no study; choose another --study or --results")
    if (folder / "config.toml").exists():
        _check_saved(config, folder)
    new = not (folder / "config.toml").exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; choose another --results") from None
    with held(folder):
        remove_abandoned(folder)
        save_config(config)
        try:
            yield folder
        except Exception:
            if new and {path.name for path in folder.iterdir()} <= {"config.toml", LOCK}:
                shutil.rmtree(folder)  # what was asked for was refused: there is no study
            raise


def save_config(config: RunConfig) -> None:
    """Writes the resolved configuration into the study's folder."""
    write_text(config.folder / "config.toml", to_toml(replace(config, store=_without_password(config.store))))


PLACES = ("steps", "bank", "models", "answers", "policies")
"""Folders of a study that a run writes into."""


def check_places(config: RunConfig) -> None:
    """Raises ConfigError where the study or the cache could not take what the run will write, hours later for some of it."""
    for name in (*PLACES, *(f"exports/{name}" for name in config.export)):
        check_place(config.folder / name, "--results", folder=True)
    check_place(config.cache_folder, "--cache", folder=True)


def _without_password(url: str) -> str:
    """A database's URL as it may lie about; whoever runs the file again gives the password as the database's client reads it."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1@", url)


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name != LOCK and not path.name.startswith("."))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a study's lock; raises `Busy` where another process has it. The system frees it however the process ends."""
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:
        if not try_lock(file.fileno()):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise Busy(f"{folder} is held by {owner}; wait for it, stop it, or choose another --study")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield


def _check_saved(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError where the folder's study is about something else; what only steers the search may change."""
    saved = read_toml(folder / "config.toml")
    for name in _IDENTITY:
        mine, theirs = getattr(config, name), saved.get(name, getattr(RunConfig(), name))
        if mine != theirs:
            raise ConfigError(
                f"{folder}: a study with --{name.replace('_', '-')} {_shown(name, theirs)}, here it is {_shown(name, mine)}; "
                "choose another --study"
            )


def _shown(name: str, value: Any) -> str:
    none = "generated" if name == "data" else "(none)"
    return ",".join(value) or none if isinstance(value, tuple) else str(value)


def study_key(config: RunConfig) -> str:
    """Key of everything that the prepared study depends on, local files by size and time.

    Limits on bytes are no part of it: they ask for more options, and change nothing of the others.
    """
    values = {name: value for name, value in vars(config).items() if name not in _NOT_PREPARED}
    files = [config.model, *(source.partition("=")[2] or source for source in config.data)]
    files += [str(folder) for folder in device_folders(config.devices) if config.target != "cpu"]
    asked = [workload.name for workload in config.workloads]
    return content_key(_VERSION, catalogue.REVISION, values, asked, [_stat(Path(name).expanduser()) for name in files])


def kept_prepared(steps: Steps, key: str, config: RunConfig) -> Prepared | None:
    """What the study prepared for these objectives, or for more than them; None where that is still to do.

    It is the study's latest again, which `search show` and others read.
    """
    every = _with_every_option(key)
    for wanted in (every,) if config.objectives.sizes else (every, key):
        stored = steps.get(_PREPARED, wanted)
        if stored is None and (stored := steps.get(f"{_PREPARED}-{wanted}", wanted)) is not None:
            steps.put(_PREPARED, wanted, stored)
        if stored is not None:
            return Prepared.from_json(stored, steps.folder / f"{_PREPARED}.json")
    return None


def keep_prepared(steps: Steps, key: str, config: RunConfig, prepared: Prepared) -> None:
    """Keep what was prepared as the study's latest, and beside what was prepared for other workloads."""
    own = _with_every_option(key) if config.objectives.sizes else key
    for name in (f"{_PREPARED}-{own}", _PREPARED):
        steps.put(name, own, prepared.to_json())


_PREPARED = "prepared"


def _with_every_option(key: str) -> str:
    return content_key(key, "every option")


def _stat(path: Path) -> list[Any]:
    if not path.exists():
        return []
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def check_same(session: Session, prepared: Prepared) -> None:
    """Raises ConfigError where the study was prepared for another model or device, and says in what the devices differ."""
    check_model(session, prepared)
    if session.target.fingerprint == prepared.target["fingerprint"]:
        return
    from profilers.target import differences

    apart = "; ".join(differences(prepared.target.get("facts") or {}, session.target.facts))
    raise ConfigError(
        f"{session.config.folder}: measured on another device or set-up ({prepared.target['description']}, fingerprint "
        f"{prepared.target['fingerprint']}; here {session.target.fingerprint}{f', which differs in {apart}' if apart else ''}); choose "
        f"another --study{', or make that equal' if apart else ''}"
    )


def check_model(session: Session, prepared: Prepared) -> None:
    """Raises ConfigError where the study was prepared for another model: what needs its weights alone needs no device."""
    if session.loaded.digest != prepared.model["digest"]:
        raise ConfigError(
            f"{session.config.folder}: a study of another model ({prepared.model['label']}, digest {prepared.model['digest']}; here "
            f"{session.loaded.digest}); choose another --study"
        )


def has_store(config: RunConfig) -> bool:
    """Whether the study's evaluations may lie somewhere already."""
    return bool(config.store) or (config.folder / "study.db").exists()


def open_store(session: Session) -> Store:
    """The study's Optuna store; raises ForeignStudy where it belongs to something else."""
    from search.study import Store

    config = session.config
    context = {
        "model": session.loaded.digest,
        "target": session.target_identity,
        "runtime": config.runtime,
        "workload": ", ".join(config.workload),
        "calibration text": session.corpora["calibrate"].sha256,
        "search text": session.corpora["search"].sha256,
    }
    # Evaluations of an earlier revision stay where they are, and count for nothing.
    revision = f" (methods {catalogue.REVISION})"
    if config.store:
        return Store(config.store, config.study_name + revision, context)
    name, mend = config.study_name + revision, session.progress.say
    return Store(config.folder / "study.db", name, context, ending=revision, mend=mend)
