"""The store on a real PostgreSQL server, which the test starts in a folder of its own: shared, killed, and refused in one line."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from methods.policy import Decision, Policy
from search.study import ForeignStudy, Store, TrialRecord

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = {"model": "f00d"}

pytest.importorskip("psycopg", reason="psycopg, PostgreSQL's client, is not installed")


def binaries() -> Path | None:
    """Where initdb and postgres lie."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of an empty database of a server that runs as a user without rights, as PostgreSQL insists."""
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server here: neither initdb in PATH nor /usr/lib/postgresql/*/bin")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    user = "nobody" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    made = [programs / "initdb", "-D", data, "-U", "study", "--auth=trust", "--no-sync"]
    subprocess.run(made, check=True, capture_output=True, user=user, cwd=folder)
    started = [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(started, stdout=log, stderr=log, user=user, cwd=folder)
    try:
        yield f"postgresql+psycopg://study@127.0.0.1:{port}/{_ready(port, server)}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder)


def _ready(port: int, server: subprocess.Popen[bytes]) -> str:
    import psycopg

    for _ in range(300):
        assert server.poll() is None
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="study", dbname="postgres", connect_timeout=1).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            break
    return "postgres"


def trial(k: int, **other: object) -> TrialRecord:
    policy = Policy({f"site{i}": (Decision.of("rtn", format="w8a16-g64", k=k),) for i in range(6)})
    fields = {
        "kl": 0.1 + k,
        "kl_stderr": 0.01,
        "n_tokens": 1024,
        "latency_ms": 5.0 + k,
        "role": "search",
        "per_sequence": (0.1, 0.2),
    }
    return TrialRecord(policy, **{**fields, **other})  # type: ignore[arg-type]


def writer(url: str, name: str, first: int, n: int) -> subprocess.Popen[str]:
    """Another process that writes `n` trials and says so after each."""
    code = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("t", {str(Path(__file__))!r})
        t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
        store = t.Store({url!r}, {name!r}, t.CONTEXT)
        for k in range({first}, {first + n}):
            store.record(t.trial(k)); print(k, flush=True)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_make_and_share_one_store(database: str) -> None:
    """Two of one study and one of another begin at once, on a server that has no tables yet."""
    processes = [writer(database, "s", 0, 6), writer(database, "s", 3, 6), writer(database, "other", 0, 2)]
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and said
    shared = Store(database, "s", CONTEXT)
    assert sorted(record.latency_ms for record in shared.records()) == [5.0 + k for k in range(9)]
    assert {record.policy.key() for record in shared.records()} == {trial(k).policy.key() for k in range(9)}
    assert len(Store(database, "other", CONTEXT).records()) == 2


def test_what_is_written_is_read_and_strangers_are_refused(database: str) -> None:
    store = Store(database, "mine", CONTEXT)
    full = trial(0, name="refine", seconds=1.5, latency_label="measured", scores={"perplexity": 20.5})
    broken = trial(1, kl=float("inf"))
    assert store.record(full) and store.record(broken) and not store.record(full)
    store.record_failure(trial(2).policy, "refined", "search", "out of memory")
    again = Store(database, "mine", CONTEXT)
    assert again.records() == [full, broken]
    assert [failure.reason for failure in again.failures()] == ["out of memory"]
    with pytest.raises(ForeignStudy, match="model is 'f00d' there and 'beef' here"):
        Store(database, "mine", {"model": "beef"})


def test_a_killed_writer_leaves_whole_trials(database: str) -> None:
    process = writer(database, "killed", 0, 10_000)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = Store(database, "killed", CONTEXT).records()
    assert len(found) >= len(said) and found == [trial(k) for k in range(len(found))]


def test_a_server_that_is_not_there_is_one_line_without_the_password() -> None:
    with pytest.raises(ValueError, match="cannot be opened as a study") as refused:
        Store("postgresql+psycopg://me:secret@127.0.0.1:1/study", "s", CONTEXT)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value) and "127.0.0.1:1" in str(refused.value)
    with pytest.raises(ValueError, match=r"postgresql\+psycopg://"):
        Store("postgresql+pg8000://me@127.0.0.1:1/study", "s", CONTEXT)
