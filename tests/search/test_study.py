"""The store: killed, resumed, shared, and refused to strangers."""

import contextlib
import logging
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError

from methods.policy import Decision, Policy
from search.study import Failure, ForeignStudy, Store, TrialRecord, damage

CONTEXT = {"model": "f00d", "target": "cpu", "batch": 1}
ROOT = Path(__file__).resolve().parents[2]


def trial(k: int, **other: Any) -> TrialRecord:
    policy = Policy({f"site{i}": (Decision.of("rtn", format=f"w{4 if (i + k) % 3 else 8}a16-g64", k=k),) for i in range(6)})
    fields: dict[str, Any] = {"kl": 0.1 + k, "kl_stderr": 0.01, "n_tokens": 1024, "latency_ms": 5.0 + k, "role": "search"}
    return TrialRecord(policy, **{**fields, **other})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "study.db", "s", CONTEXT)
    full = trial(0, per_sequence=(0.1, 0.25), scores={"perplexity": 20.5}, name="refine", seconds=1.5, latency_label="measured")
    broken = trial(1, kl=float("inf"))
    assert store.record(full) and store.record(broken)
    again = Store(tmp_path / "deep" / "study.db", "s", CONTEXT)
    assert again.records() == [full, broken]
    assert again.lookup(full.policy.key(), 1024, "search") == full


def test_the_same_evaluation_is_written_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.db", "s", CONTEXT)
    assert store.record(trial(0))
    assert not store.record(trial(0, kl=9.0))
    assert store.record(trial(0, n_tokens=2048))
    assert store.record(trial(0, role="validate"))
    assert store.lookup(trial(0).policy.key(), 4096, "search") is None
    assert [r.kl for r in store.records()] == [0.1] * 3


def test_two_stores_see_each_other(tmp_path: Path) -> None:
    first = Store(tmp_path / "study.db", "s", CONTEXT)
    second = Store(tmp_path / "study.db", "s", CONTEXT)
    assert first.records() == []
    assert second.record(trial(3))
    assert first.lookup(trial(3).policy.key(), 1024, "search") == trial(3)
    assert not first.record(trial(3))


def test_a_duplicate_of_a_race_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Store(tmp_path / "study.db", "s", CONTEXT) for _ in range(2))
    monkeypatch.setattr(second, "lookup", lambda *_: None)  # it looked before the first one wrote
    assert first.record(trial(0))
    assert second.record(trial(0, kl=7.0))
    assert [r.kl for r in Store(tmp_path / "study.db", "s", CONTEXT).records()] == [0.1]


@pytest.mark.parametrize(
    ("context", "key"),
    [({**CONTEXT, "model": "beef"}, "model"), ({**CONTEXT, "seed": 1}, "seed"), ({"model": "f00d"}, "target")],
)
def test_another_study_is_refused(tmp_path: Path, context: dict[str, Any], key: str) -> None:
    Store(tmp_path / "study.db", "s", CONTEXT).record(trial(0))
    with pytest.raises(ForeignStudy, match=f"{key} is"):
        Store(tmp_path / "study.db", "s", context)
    assert Store(tmp_path / "study.db", "another", context).records() == []
    assert len(Store(tmp_path / "study.db", "s", CONTEXT).records()) == 1


def test_files_that_are_no_study(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match=r"cannot be opened as a study: it is damaged \(file is not a database\); restore it"):
        Store(tmp_path / "study.db", "s", CONTEXT)
    url = f"sqlite:///{tmp_path / 'other.db'}"
    foreign = optuna.create_study(storage=url, study_name="s", directions=["minimize", "minimize"])
    foreign.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    with pytest.raises(ForeignStudy, match="not made by this program"):
        Store(url, "s", CONTEXT)


def test_optunas_own_tools_see_the_trials(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'study.db'}", "s", CONTEXT)
    store.record(trial(0))
    study = optuna.load_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="s")
    (read,) = study.trials
    assert read.values == [0.1, 5.0]
    assert read.params == {"share w4a16-g64": pytest.approx(4 / 6), "share w8a16-g64": pytest.approx(2 / 6)}


def test_logging_is_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("optuna")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logger.addHandler(listener)
    try:
        Store(tmp_path / "study.db", "s", CONTEXT).record(trial(0))
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        logger.removeHandler(listener)
        optuna.logging.set_verbosity(before)
    assert said == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("other", [{"kl": float("nan")}, {"latency_ms": float("inf")}, {"n_tokens": 0}, {"role": ""}])
def test_bad_trials_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trial of"):
        trial(0, **other)


def writer(path: Path, first: int, n: int) -> subprocess.Popen[str]:
    """Another process that writes `n` trials and says so after each."""
    code = f"""
        import importlib.util
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("t", {str(Path(__file__))!r})
        t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
        store = t.Store(Path({str(path)!r}), "s", t.CONTEXT)
        for k in range({first}, {first + n}):
            store.record(t.trial(k)); print(k, flush=True)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    process = writer(path, 0, 10_000)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = Store(path, "s", CONTEXT).records()
    assert len(found) >= len(said)
    assert found == [trial(k) for k in range(len(found))]
    store = Store(path, "s", CONTEXT)
    assert not store.record(trial(0)) and store.record(trial(len(found)))


def test_processes_share_a_new_store(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    processes = [writer(path, first, 6) for first in (0, 3)]
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    found = Store(path, "s", CONTEXT).records()
    assert sorted(record.latency_ms for record in found) == [5.0 + k for k in range(9)]


def test_damaged_pages_are_found_when_a_study_is_opened(tmp_path: Path) -> None:
    """A reader of other pages would not notice; what a study made itself is moved aside and made again, another's file is left alone."""
    path, said = tmp_path / "study.db", []
    store = Store(path, "s", CONTEXT)
    for k in range(40):
        store.record(trial(k))
    assert damage(path) == ""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = database.execute("PRAGMA page_size").fetchone()
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'trial_intermediate_values'").fetchone()
    store._study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    data = bytearray(path.read_bytes())
    data[(page - 1) * size : (page - 1) * size + 64] = b"\xff" * 64
    path.write_bytes(data)

    assert damage(path)
    with pytest.raises(ValueError, match=r"it is damaged \(.*\); restore it, or choose another --store") as raised:
        Store(path, "s", CONTEXT)
    assert "\n" not in str(raised.value) and path.read_bytes() == data
    again = Store(path, "s", CONTEXT, mend=said.append)
    assert again.records() == [] and again.record(trial(0)) and damage(path) == ""
    assert (tmp_path / ".damaged-study.db").read_bytes() == data
    assert len(said) == 1 and "is moved to .damaged-study.db, and evaluations are made again" in said[0]
    assert Store(path, "s", CONTEXT, mend=said.append).records() == [trial(0)] and len(said) == 1


def test_what_a_damaged_study_had_not_written_back_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"no database" * 1000)
    path.with_name("study.db-wal").write_bytes(b"left by it")
    assert Store(path, "s", CONTEXT, mend=lambda _: None).record(trial(0))
    assert (tmp_path / ".damaged-study.db-wal").read_bytes() == b"left by it"


def test_failures_are_kept_apart_and_may_be_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.db", "s", CONTEXT)
    store.record_failure(trial(0).policy, "refined", "search", "out of memory (asked for 3 GiB)")
    assert store.records() == [] and store.lookup(*trial(0).key) is None
    assert store.record(trial(0))
    again = Store(tmp_path / "study.db", "s", CONTEXT)
    assert again.records() == [trial(0)]
    (failure,) = again.failures()
    assert failure == Failure(trial(0).policy, "refined", "search", "out of memory (asked for 3 GiB)")


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    store, reader = (Store(tmp_path / "study.db", "s", CONTEXT) for _ in range(2))
    store.record(trial(0))
    with sqlite3.connect(tmp_path / "study.db", isolation_level=None) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        other.execute("BEGIN IMMEDIATE")
        assert reader.records() == [trial(0)]


def test_a_database_appears_with_all_its_tables_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: object, **options: object) -> None:
        raise OperationalError("CREATE TABLE", {}, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patched:
        patched.setattr("optuna.storages._rdb.storage._VersionManager._init_alembic", cut)
        with pytest.raises(ValueError, match="disk is full"):
            Store(tmp_path / "study.db", "s", CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["study.db.lock"]
    assert Store(tmp_path / "study.db", "s", CONTEXT).record(trial(0))


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "study.db", "s", CONTEXT)
    assert store.record(trial(0))
    (pages,) = sqlite3.connect(tmp_path / "study.db").execute("PRAGMA page_count").fetchone()
    with monkeypatch.context() as patched:
        engine = store._study._storage._backend.engine  # type: ignore[attr-defined]
        listening = sqlalchemy.event.listens_for(engine, "checkout")
        listening(lambda connection, *_: connection.execute(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(ValueError, match=r"cannot be written \(.*full.*\); make room") as raised:
            for k in range(1, 200):
                store.record(trial(k))
        assert "\n" not in str(raised.value)
        patched.undo()
    found = Store(tmp_path / "study.db", "s", CONTEXT)
    n = len(found.records())
    assert found.records() == [trial(k) for k in range(n)] and found.record(trial(n))


def test_two_studies_share_a_file(tmp_path: Path) -> None:
    one, other = (Store(tmp_path / "all.db", name, {"model": name}) for name in ("one", "other"))
    assert one.record(trial(0)) and other.record(trial(0, kl=3.0)) and other.record(trial(1))
    assert [record.kl for record in one.records()] == [0.1] and [record.kl for record in other.records()] == [3.0, 1.1]
    assert Store(f"sqlite:///{tmp_path / 'all.db'}", "one", {"model": "one"}).records() == one.records()


def test_a_study_that_was_renamed_keeps_its_evaluations(tmp_path: Path) -> None:
    Store(tmp_path / "study.db", "before (2)", CONTEXT).record(trial(0))
    Store(tmp_path / "study.db", "before (1)", CONTEXT).record(trial(2))
    renamed = Store(tmp_path / "study.db", "after (2)", CONTEXT, ending=" (2)")
    assert renamed.records() == [trial(0)]
    renamed.record(trial(1))
    assert len(Store(tmp_path / "study.db", "before (2)", CONTEXT).records()) == 2
    assert Store(tmp_path / "study.db", "after (2)", CONTEXT).records() == []  # a shared one holds others beside it


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "places.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"places\.db holds another program's tables \(bookmarks\); choose another --store"):
        Store(path, "s", CONTEXT)
    assert path.read_bytes() == before


def test_a_file_beside_the_store_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("mine")
    Store(tmp_path / "poetry", "s", CONTEXT)
    assert (tmp_path / "poetry.lock").read_text() == "mine"


def test_a_folder_as_a_store_is_refused_and_an_empty_file_filled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder cannot be opened as a study"):
        Store(tmp_path / "folder", "s", CONTEXT)
    (tmp_path / "empty.db").touch()
    assert Store(tmp_path / "empty.db", "s", CONTEXT).record(trial(0))


@pytest.mark.parametrize("name", ["a?b", "100%", "a%20b", "a#b", "größe"])
def test_a_store_lies_where_it_was_said_to(tmp_path: Path, name: str) -> None:
    assert Store(tmp_path / name / "study.db", "s", CONTEXT).record(trial(0))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert Store(tmp_path / name / "study.db", "s", CONTEXT).records() == [trial(0)]
