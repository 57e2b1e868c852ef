"""The cache of compiled kernels: built once, checked before it is loaded, built again where it is damaged."""

from pathlib import Path

import pytest

from profilers.kernels import build


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that writes a few bytes; the files it was asked for."""
    made: list[str] = []

    def call(*command: str) -> None:
        out = Path(command[command.index("-o") + 1])
        made.append(out.name)
        out.write_bytes(b"\x7fELF" + out.name.encode())

    monkeypatch.setattr(build, "_call", call)
    monkeypatch.setattr(build, "kernel_folder", lambda: tmp_path / "kernels")
    return made


def test_a_library_is_built_once_and_nothing_else_is_left(compiled: list[str]) -> None:
    path = build._built("c++", (), ())
    assert build._built("c++", (), ()) == path and compiled.count("kernels.so") == 1
    assert sorted(file.name for file in path.parent.iterdir()) == [f"{path.stem}.sha256", path.name]
    assert build._built("c++", ("-O2",), ()) != path


def test_a_damaged_library_is_built_again(compiled: list[str]) -> None:
    path = build._built("c++", (), ())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert build._built("c++", (), ()) == path and compiled.count("kernels.so") == 2
    assert path.read_bytes() == whole
    path.with_suffix(".sha256").unlink()  # as earlier versions left it
    build._built("c++", (), ())
    assert compiled.count("kernels.so") == 2


def test_a_build_that_fails_leaves_nothing(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*command: str) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(build, "_call", broken)
    with pytest.raises(OSError, match="no compiler"):
        build._built("c++", (), ())
    assert list((tmp_path / "kernels").iterdir()) == []
