"""How commands end: what a user can act on is one line and status 2, whatever else happens is one line and status 3."""

import json

import pytest

from search.cli import main

COMMAND = "search.method_list.rows"


def ended(error: Exception | None, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The status of a command in which a library raises."""

    def fail(*_: object) -> None:
        if error is None:
            json.loads("{")
        else:
            exec("raise error", {"error": error})

    monkeypatch.setattr(COMMAND, fail)
    return main(["methods", "--json", *flags])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Probabilities do not sum to 1"),
        KeyError("sites"),
        KeyError("Field record does not exist"),
        RuntimeError("mat1 and mat2\nshapes"),
        TypeError("no"),
        AttributeError("no"),
        ZeroDivisionError("no"),
        RecursionError("no"),
        AssertionError(),
        OSError("Can't load it"),
        ImportError("needs something"),
        ExceptionGroup("several", [ValueError("no")]),
        None,
    ],
)
def test_what_a_library_raises_is_one_line_with_its_place(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(error, monkeypatch) == 3
    out, err = capsys.readouterr()
    name = "JSONDecodeError" if error is None else type(error).__name__
    assert out == "" and err.count("\n") == 1
    assert err.startswith("search: internal error: ") and f"({name} in search/cli.py:" in err
    assert err.endswith("run again with --debug for the traceback\n")


def test_debug_shows_the_traceback_and_ends_alike(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyError("sites"), monkeypatch, "--debug") == 3
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.splitlines()[-1].startswith(
        "search: internal error: sites (KeyError"
    )


def test_a_look_up_of_this_program_that_fails_is_internal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("methods.catalogue.METHODS", None)
    assert main(["methods", "gptq"]) == 3
    assert "internal error" in capsys.readouterr().err


def test_what_this_program_raises_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "no-such-method"]) == 2
    err = capsys.readouterr().err
    assert "no-such-method" in err and err.count("\n") == 1 and "internal" not in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.json"), "search: x.json: No such file or directory\n"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModuleNotFoundError("No module named 'psycopg'", name="psycopg"), "the Python package psycopg is not installed"),
    ],
)
def test_what_the_system_says_needs_no_traceback(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(error, monkeypatch) == 2
    assert said in capsys.readouterr().err
