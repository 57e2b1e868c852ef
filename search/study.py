"""The store of a study: every evaluation is an Optuna trial, safe to kill and resumed by whoever opens it next."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from methods.atomic import set_aside, staging_folder
from methods.errors import InputError
from methods.policy import Policy
from methods.typed import Count, Finite, WrongValue, read

if TYPE_CHECKING:
    import optuna

Value = TypeVar("Value")

_VERSION = 1
_TIMEOUT_S = 120
_CONNECT_S = 10
_ANOTHER = "it is not readable; use another study"
_LOCK_KEY = 0x150_1A7E
"""Of the advisory lock in a PostgreSQL server."""

Context = Mapping[str, str | int | float | bool | None]
"""What a study is about: model digest, target, workload, space, … — what must be equal for its numbers to be reused."""


@dataclass(frozen=True)
class TrialRecord:
    """One evaluation of a policy.

    kl: nats per token on `n_tokens` of the data of `role`, infinite where the model broke; kl_stderr over sequences;
    per_sequence: the KL of each sequence, for paired comparisons; latency_ms: of the fitted map or measured, as `latency_label` says;
    name: who proposed it; seconds: what the evaluation took; scores: further numbers by name.
    """

    policy: Policy
    kl: float
    kl_stderr: float
    n_tokens: Count
    latency_ms: Finite
    role: str
    latency_label: str = "modelled"
    name: str = ""
    seconds: float = 0.0
    per_sequence: tuple[float, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if np.isnan(self.kl) or not np.isfinite(self.latency_ms) or self.n_tokens < 1 or not self.role:
            raise ValueError(
                f"trial of {self.policy.key()}: kl={self.kl}, latency_ms={self.latency_ms}, n_tokens={self.n_tokens}, "
                f"role={self.role!r}; a broken model has an infinite kl, the others are numbers, tokens and role are given"
            )

    @property
    def key(self) -> tuple[str, int, str]:
        """What makes it the same evaluation: policy, tokens, role."""
        return self.policy.key(), self.n_tokens, self.role


class ForeignStudy(InputError):
    """The study at hand is about something else; names the keys that differ."""


@dataclass(frozen=True)
class Failure:
    """An evaluation that gave no number: of which policy, who proposed it, and why."""

    policy: Policy
    name: str
    role: str
    reason: str


class Store:
    """All evaluations of a study, in SQLite at a path or in any database that Optuna knows at a URL (`postgresql+psycopg://…`).

    Several processes, and several studies under names of their own, may hold the same store. A trial is written in one transaction: a
    killed process leaves it whole or not at all.
    The sites of a policy are a user attribute, not parameters: a row a site makes writing ten times slower. The share of sites that
    each format has stands in the parameters, so that Optuna's own tools show something.
    Raises `ForeignStudy` where the study was made with another context, ValueError where the file is no study at all.
    """

    def __init__(
        self,
        where: Path | str,
        name: str,
        context: Context,
        *,
        ending: str | None = None,
        mend: Callable[[str], None] | None = None,
    ) -> None:
        """ending: of the names of this study alone: what is there under such a name is this one before it was renamed.

        mend: told of a file whose pages are damaged, which is then moved aside and begun anew; where it is None, that is a ValueError.
        """
        url, path = _url(where)
        self._url = url
        with _locked(path.with_name(path.name + ".lock")) if path else _making(url):
            if path:
                _make(url, path, mend)
            self._study = _open(url, name, ending)
            self._check(name, str(where), dict(context))
        self.name = name
        self._records: dict[tuple[str, int, str], TrialRecord] = {}
        self._n_read = 0

    def record(self, trial: TrialRecord) -> bool:
        """Writes an evaluation; False, and nothing written, where the same one is there already."""
        import optuna

        if self.lookup(*trial.key) is not None:
            return False
        shares = _shares(trial.policy)
        frozen = optuna.trial.create_trial(
            values=[trial.kl, trial.latency_ms],
            params=dict(shares),
            distributions={label: optuna.distributions.FloatDistribution(0.0, 1.0) for label in shares},
            user_attrs=_attributes(trial),
        )
        self._add(frozen)
        return True

    def record_failure(self, policy: Policy, name: str, role: str, reason: str) -> None:
        """Writes down that an evaluation failed; it may be tried again."""
        import optuna

        attributes = {"policy": policy.canonical(), "name": name, "role": role, "reason": reason}
        self._add(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=attributes))

    def failures(self) -> list[Failure]:
        """All evaluations that failed, in the order they were written."""
        failed = [trial for trial in self._trials() if trial.state.name == "FAIL"]
        return [_read(Failure, trial, trial.user_attrs) for trial in failed]

    def lookup(self, policy_key: str, n_tokens: int, role: str) -> TrialRecord | None:
        """The evaluation of a policy on that many tokens of that role, or None; sees what other processes wrote."""
        key = (policy_key, n_tokens, role)
        if key not in self._records:
            self._refresh()
        return self._records.get(key)

    def records(self) -> list[TrialRecord]:
        """All evaluations in the order they were written, each once."""
        self._refresh()
        return list(self._records.values())

    def _add(self, trial: optuna.trial.FrozenTrial) -> None:
        with _explained(self._url, "cannot be written", "make room or bring it back, and the same command goes on"):
            self._study.add_trial(trial)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        with _explained(self._url, "cannot be read", "restore it, or choose another --store"):
            return self._study.get_trials(deepcopy=False)

    def _refresh(self) -> None:
        trials = self._trials()
        for trial in (trial for trial in trials[self._n_read :] if trial.state.name != "FAIL"):
            record = _parse(trial)
            self._records.setdefault(record.key, record)  # two processes may both have written it
        self._n_read = len(trials)

    def _check(self, name: str, where: str, context: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps({**context, "version": _VERSION}))
        stored = self._study.user_attrs.get("context")
        if stored is None or not isinstance(stored, dict):
            if self._trials() or stored is not None:
                raise ForeignStudy(f"study {name!r} in {where} was not made by this program; choose another name or folder")
            self._study.set_user_attr("context", wanted)
            return
        differing = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
        if differing:
            pairs = ", ".join(f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here" for key in differing)
            raise ForeignStudy(f"study {name!r} in {where} is another one: {pairs}; choose another name or folder")


def _url(where: Path | str) -> tuple[str, Path | None]:
    """The database's URL, and the file of a SQLite one."""
    where = str(where).removeprefix("sqlite:///")
    if "://" in where:
        return where, None
    path = Path(where).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return _sqlite(path), path


def _sqlite(path: Path) -> str:
    """The URL of a file, whose name may hold what means something else in a URL."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two processes that make the tables at once would see each other's half."""
    with path.open("a") as file:  # nothing is written: it may be another program's
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(url: str, path: Path, mend: Callable[[str], None] | None) -> None:
    """A SQLite database with its tables, whole or not at all: one without some of them could not be opened again."""
    import optuna
    from sqlalchemy import text

    if path.exists() and (path.is_dir() or path.stat().st_size):
        problem = "" if path.is_dir() else damage(path)
        if not problem:
            _check_ours(path)
            return
        if mend is None:
            raise ValueError(
                f"{path} cannot be opened as a study: it is damaged ({problem}); restore it, or choose another --store"
            )
        # With what was not yet written back into it, so that it can still be looked at.
        for beside in (path.with_name(path.name + end) for end in ("-wal", "-shm")):
            if beside.exists():
                set_aside(beside)
        mend(f"{path} is damaged ({problem}): it is moved to {set_aside(path).name}, and evaluations are made again")
    with _explained(url), staging_folder(path) as staging:
        storage = optuna.storages.RDBStorage(_sqlite(staging / path.name), engine_kwargs=_options(url))
        with storage.engine.connect() as connection:
            connection.execute(text("PRAGMA journal_mode=WAL"))  # in which a writer and readers do not wait for each other
        storage.remove_session()
        storage.engine.dispose()
        (staging / path.name).replace(path)


def damage(path: Path) -> str:
    """What is wrong with the pages of a SQLite file, "" where nothing is; what it holds is read with its types, not here."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_TIMEOUT_S)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        return ""  # locked, or not to be read: whoever opens it says so
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if found == "ok" else str(found).splitlines()[-1]


def _check_ours(path: Path) -> None:
    """Raises ValueError for another program's database, into which Optuna would write its own tables."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.Error:
        return  # whoever opens it says what it is
    if tables and "studies" not in tables:
        raise ValueError(f"{path} holds another program's tables ({', '.join(sorted(tables)[:3])}); choose another --store")


@contextmanager
def _making(url: str) -> Iterator[None]:
    """`_locked` in a PostgreSQL server, whose clients may be on several machines; other databases are left to themselves."""
    from sqlalchemy import create_engine, text

    with _explained(url):
        engine = create_engine(url, **_options(url))
        if engine.dialect.name != "postgresql":
            yield
            return
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})
        engine.dispose()


@contextmanager
def _explained(
    url: str, what: str = "cannot be opened as a study", way_out: str = "remove it or choose another --store"
) -> Iterator[None]:
    """A database's errors as one line, without the password."""
    import optuna
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--store {url.partition(':')[0]}: its driver {error.name} is not installed; for PostgreSQL write postgresql+psycopg://… "
            "and install psycopg[binary]"
        ) from error
    # Of a row that no Optuna wrote, Optuna raises whatever its parsing stumbles over.
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ValueError, LookupError, TypeError) as error:
        shown = url if "@" not in url else make_url(url).render_as_string(hide_password=True)
        cause = error if hasattr(error, "orig") else error.__cause__ or error
        reason = (str(getattr(cause, "orig", cause)).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"{shown} {what} ({reason}); {way_out}") from error


def _open(url: str, name: str, ending: str | None) -> optuna.Study:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with _explained(url):
            storage = optuna.storages.RDBStorage(url, engine_kwargs=_options(url))
            held = [] if ending is None else [held for held in optuna.get_all_study_names(storage) if held.endswith(ending)]
            if len(held) == 1:
                name = held[0]
            return optuna.create_study(
                storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
            )
    finally:
        optuna.logging.set_verbosity(before)


def _options(url: str) -> dict[str, Any]:
    """How to connect: wait for another writer of the same file, but not for a server that is not there."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": _TIMEOUT_S}}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_S} if url.startswith("postgresql") else {}}


def _shares(policy: Policy) -> dict[str, float]:
    """Share of the decided sites that each format, or method without one, stands at."""
    labels = ["+".join(str(d.knob("format", d.method)) for d in decisions) for decisions in policy.sites.values()]
    return {f"share {label}": labels.count(label) / len(labels) for label in sorted(set(labels))}


def _attributes(trial: TrialRecord) -> dict[str, Any]:
    plain = {name: value for name, value in vars(trial).items() if name not in ("policy", "kl", "latency_ms")}
    shared = {"per_sequence": list(trial.per_sequence), "scores": dict(trial.scores)}
    return {**plain, **shared, "policy": trial.policy.canonical(), "policy_key": trial.policy.key()}


def _parse(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    values = trial.values or []
    attributes = dict(zip(("kl", "latency_ms"), values, strict=False)) | dict(trial.user_attrs)
    key = attributes.pop("policy_key", None)
    record = _read(TrialRecord, trial, attributes)
    if key != record.policy.key():
        raise WrongValue(_title(trial), "policy_key", "its policy does not have its key", _ANOTHER)
    return record


def _read(kind: type[Value], trial: optuna.trial.FrozenTrial, attributes: Mapping[str, Any]) -> Value:
    """What a trial's attributes are of; raises WrongValue where they are not."""
    return read(kind, attributes, _title(trial), _ANOTHER, {Policy: Policy.from_canonical})


def _title(trial: optuna.trial.FrozenTrial) -> str:
    return f"trial {trial.number} of the study"
