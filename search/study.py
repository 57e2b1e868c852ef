"""The store of a study: every evaluation is an Optuna trial, safe to kill and resumed by whoever opens it next."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from methods.policy import Policy

if TYPE_CHECKING:
    import optuna

_VERSION = 1
_TIMEOUT_S = 120

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
    n_tokens: int
    latency_ms: float
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


class ForeignStudy(ValueError):
    """The study at hand is about something else; names the keys that differ."""


class Store:
    """All evaluations of a study, in SQLite at a path or in any database that Optuna knows at a URL (`postgresql://…`).

    Several processes may hold the same store. A trial is written in one transaction: a killed process leaves it whole or not at all.
    The sites of a policy are a user attribute, not parameters: a row a site makes writing ten times slower. The share of sites that
    each format has stands in the parameters, so that Optuna's own tools show something.
    Raises `ForeignStudy` where the study was made with another context, ValueError where the file is no study at all.
    """

    def __init__(self, where: Path | str, name: str, context: Context) -> None:
        url, lock = _url(where)
        with _locked(lock) if lock else nullcontext():
            self._study = _open(url, name)
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
        self._study.add_trial(frozen)
        return True

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

    def _refresh(self) -> None:
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[self._n_read :]:
            record = _parse(trial)
            self._records.setdefault(record.key, record)  # two processes may both have written it
        self._n_read = len(trials)

    def _check(self, name: str, where: str, context: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps({**context, "version": _VERSION}))
        stored = self._study.user_attrs.get("context")
        if stored is None:
            if self._study.get_trials(deepcopy=False):
                raise ForeignStudy(f"study {name!r} in {where} was not made by this program; choose another name or folder")
            self._study.set_user_attr("context", wanted)
            return
        differing = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
        if differing:
            pairs = ", ".join(f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here" for key in differing)
            raise ForeignStudy(f"study {name!r} in {where} is another one: {pairs}; choose another name or folder")


def _url(where: Path | str) -> tuple[str, Path | None]:
    """The database's URL, and the lock file that guards the making of a SQLite one."""
    if isinstance(where, str) and "://" in where:
        return where, None
    path = Path(where).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}", path.with_name(path.name + ".lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two processes that make the tables at once would see each other's half."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(url: str, name: str) -> optuna.Study:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        options = {"connect_args": {"timeout": _TIMEOUT_S}} if url.startswith("sqlite") else {}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        return optuna.create_study(storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        raise ValueError(f"{url} cannot be opened as a study ({reason}); remove it or choose another folder") from error
    finally:
        optuna.logging.set_verbosity(before)


def _shares(policy: Policy) -> dict[str, float]:
    """Share of the decided sites that each format, or method without one, stands at."""
    labels = ["+".join(str(d.knob("format", d.method)) for d in decisions) for decisions in policy.sites.values()]
    return {f"share {label}": labels.count(label) / len(labels) for label in sorted(set(labels))}


def _attributes(trial: TrialRecord) -> dict[str, Any]:
    plain = {name: value for name, value in vars(trial).items() if name not in ("policy", "kl", "latency_ms")}
    shared = {"per_sequence": list(trial.per_sequence), "scores": dict(trial.scores)}
    return {**plain, **shared, "policy": trial.policy.canonical(), "policy_key": trial.policy.key()}


def _parse(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    attributes = dict(trial.user_attrs)
    try:
        policy = Policy.from_canonical(attributes.pop("policy"))
        if attributes.pop("policy_key") != policy.key():
            raise ValueError("its policy does not have its key")
        attributes["per_sequence"] = tuple(attributes["per_sequence"])
        kl, latency_ms = trial.values
        return TrialRecord(policy=policy, kl=kl, latency_ms=latency_ms, **attributes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"trial {trial.number} of the study is not readable ({error}); use another study") from error
